"""Wrappers around methods of diffusers and PEFT, installed when packed models are first used.

A wrapper calls a method of the object that it receives. If a process has two copies of this package, the first copy's
wrapper therefore works for both, and nothing is wrapped twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import diffusers
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import nn

_MARK = "_nfq_wrapper"

_COPYING = {
    "UNet2DConditionModel": {
        "ControlNetModel": "from_unet",
        "ControlNetUnionModel": "from_unet",
        "SparseControlNetModel": "from_unet",
        "UNetControlNetXSModel": "from_unet",
        "UNetMotionModel": "from_unet2d",
    },
    "FluxTransformer2DModel": {"FluxControlNetModel": "from_transformer"},
    "HunyuanDiT2DModel": {"HunyuanDiT2DControlNetModel": "from_transformer"},
    "QwenImageTransformer2DModel": {"QwenImageControlNetModel": "from_transformer"},
    "SD3Transformer2DModel": {"SD3ControlNetModel": "from_transformer"},
}
"""Method with which a diffusers class copies a model's weights: model class, copying class, method.

The state dict of packed layers refuses other copies.
"""


def wrap_once(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method by a wrapper, unless a copy of this package has wrapped it already.

    Args:
        owner: the class, which is changed.
        name: name of the method or class method.
        make: returns the wrapper for a plain function.
    """
    method = inspect.getattr_static(owner, name)
    function = method.__func__ if isinstance(method, classmethod) else method
    if getattr(function, _MARK, False):
        return
    wrapper = wraps(function)(make(function))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, classmethod(wrapper) if isinstance(method, classmethod) else wrapper)


def wrap_config_merging() -> None:
    """Make `from_pretrained` refuse a folder of another method; diffusers only warns and ignores our config."""

    def make(merge: Callable) -> Callable:
        def wrapper(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
            check = getattr(quantization_config_from_args, "check_folder", None)
            if check is not None:
                check(quantization_config)
            return merge(cls, quantization_config, quantization_config_from_args)

        return wrapper

    wrap_once(DiffusersAutoQuantizer, "merge_quantization_configs", make)


@lru_cache
def wrap_copying(stock: type) -> None:
    """Make diffusers' classes that copy a model's weights dequantise packed ones first.

    Args:
        stock: the model class. Only classes that copy it are imported.
    """
    for name, method in _COPYING.get(stock.__name__, {}).items():
        try:
            owner = getattr(diffusers, name, None)
            has_method = hasattr(owner, method)
        except (ImportError, RuntimeError):  # a package that it needs is missing; older versions raise the latter
            continue
        if has_method:
            wrap_once(owner, method, _with_dense_arguments)


def _with_dense_arguments(method: Callable) -> Callable:
    def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
        return method(cls, *map(_dense, args), **{name: _dense(value) for name, value in kwargs.items()})

    return wrapper


def _dense(value: Any) -> Any:
    return value.dense_copy() if isinstance(value, nn.Module) and hasattr(value, "dense_copy") else value


@lru_cache
def wrap_adapter_creation(adapter_error: Callable[[Any], Exception | None]) -> None:
    """Make PEFT check a LoRA's configuration with the packed model before it creates the first layer.

    Args:
        adapter_error: the error for a configuration that cannot work with packed weights; None if it can.
    """
    from peft.tuners.lora import LoraModel

    def make(create: Callable) -> Callable:
        def wrapper(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
            if adapter_error(config) is not None:
                for module in self.model.modules():
                    if hasattr(module, "check_adapter"):
                        module.check_adapter(config)
            return create(self, config, *args, **kwargs)

        return wrapper

    wrap_once(LoraModel, "_create_and_replace", make)


@lru_cache
def wrap_textual_inversion() -> None:
    """Make diffusers dequantise a packed table of tokens before it adds the rows of a textual inversion."""
    from diffusers.loaders import TextualInversionLoaderMixin

    def make(load: Callable) -> Callable:
        signature = inspect.signature(load)

        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(self, *args, **kwargs).arguments.get("text_encoder")
            encoder = getattr(self, "text_encoder", None) if given is None else given
            if hasattr(encoder, "unpack_tokens"):
                encoder.unpack_tokens()
            return load(self, *args, **kwargs)

        return wrapper

    wrap_once(TextualInversionLoaderMixin, "load_textual_inversion", make)
