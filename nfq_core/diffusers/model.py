"""The methods of a packed model that differ from a stock one's: saving, casts, LoRA."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..checkpoints.state_dict import save
from ..checkpoints.whole_checkpoint import diffusers_unet_names
from ..errors import NFQError, UnsupportedFileError
from ..files.atomic import AtomicFile
from ..files.container import NFQFile
from ..layers.packed_layers import CANNOT_TRAIN, needs_dense
from ..layers.packing import dense_layers, packed_layers
from ..models.families import find_family
from .patches import wrap_copying
from .saving import refuse_offloaded, saved_tensors

_NEED_DENSE = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
"""Adapters that need the dense weights, by parts of their tensors' names."""


class PackedModel:
    """Base class of packed models, before the diffusers model's own class; see `packed_class`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and the weights, as one `.nfq.safetensors` file under the name that diffusers expects.

        `from_pretrained` loads the folder; every reader of `.nfq.safetensors` files loads the weights file. An existing
        weights file is replaced.

        Args:
            save_directory: the folder; created if missing.
            is_main_process: if false, nothing is written.
            save_function: ignored.
            safe_serialization: must be true.
            variant: part of the file's name, as in diffusers.
            max_shard_size: ignored, because there is always one file.
            push_to_hub: must be false; use the model's `push_to_hub` method.
            kwargs: ignored.

        Raises:
            NFQError: the folder cannot be written or has a model in several files, or a LoRA is attached. The folder is
                then unchanged.
        """
        if not is_main_process:
            return
        if not safe_serialization:
            raise NFQError("a packed model is saved as safetensors only; leave out safe_serialization=False")
        if push_to_hub:
            raise NFQError("save_pretrained does not upload a packed model; use the model's push_to_hub")
        state = saved_tensors(self, stock_class(type(self)))
        folder = Path(save_directory)
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NFQError(f"{folder} cannot be made a folder: {error.strerror}; nothing was changed") from None
        if index.exists():
            raise NFQError(f"{folder} holds a model in several files; choose another folder")
        name = SAFETENSORS_WEIGHTS_NAME
        if variant is not None:
            name = name.replace(".safetensors", f".{variant}.safetensors")
        facts = self.hf_quantizer.facts
        # The config is written under a temporary name before the weights are replaced.
        with AtomicFile(folder / self.config_name, overwrite=True) as config:
            config.write_at(0, self.to_json_string().encode())
            save(state, folder / name, settings=facts.settings, source=facts.source, overwrite=True)
            config.commit()

    def to(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As torch's; a cast does not change packed weights."""
        with _casts_allowed(self):
            return super().to(*args, **kwargs)

    def half(self) -> nn.Module:
        """As torch's; packed weights do not change."""
        with _casts_allowed(self):
            return super().half()

    def float(self) -> nn.Module:
        """As torch's; packed weights do not change."""
        with _casts_allowed(self):
            return super().float()

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """As torch's.

        Raises:
            NFQError: `requires_grad` is true, because packed weights cannot be trained.
        """
        if requires_grad:
            raise NFQError(CANNOT_TRAIN)
        return super().requires_grad_(False)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch's. PEFT calls this after it added adapters, so adapters on packed layers are converted here."""
        if "peft" in sys.modules and not torch.compiler.is_compiling():
            from .lora import convert_adapters

            convert_adapters(self)
        return super().named_modules(*args, **kwargs)

    def add_adapter(self, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers'.

        Raises:
            NFQError: the adapter needs the dense weights.
        """
        self.check_adapter(adapter_config)
        loaded, configs = self._hf_peft_config_loaded, dict(getattr(self, "peft_config", {}))
        try:
            super().add_adapter(adapter_config, *args, **kwargs)
        except NFQError:
            # The adapter's layers were removed, so diffusers' records of it must go too.
            self._hf_peft_config_loaded = loaded
            if hasattr(self, "peft_config"):
                self.peft_config = configs
            raise

    def check_adapter(self, config: Any) -> None:
        """Check that an adapter can be added.

        Args:
            config: PEFT's configuration.

        Raises:
            NFQError: the adapter cannot work with packed weights.
        """
        from .lora import adapter_error

        error = adapter_error(config)
        if error is not None:
            raise error

    def dense_copy(self) -> nn.Module:
        """A stock copy with dequantised weights; this model stays packed."""
        return copy.deepcopy(self).dequantize()

    def fuse_qkv_projections(self) -> None:
        """Raise NFQError: packed weights cannot be concatenated."""
        raise NFQError("q, k and v cannot be fused while they are packed; call unet.dequantize() first")

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'.

        Raises:
            NFQError: the adapter needs the dense weights.
        """
        given = pretrained_model_name_or_path_or_dict
        names = list(given) if isinstance(given, Mapping) else []
        kind = next((kind for part, kind in _NEED_DENSE.items() if any(part in name for name in names)), None)
        if kind is not None:
            raise needs_dense(kind)
        return super().load_lora_adapter(given, *args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; the LoRAs are added each time a weight is dequantised, packed weights do not change.

        Raises:
            NFQError: an adapter is not a plain LoRA.
        """
        from .lora import check_mergeable

        check_mergeable(self, kwargs.get("adapter_names"))
        super().fuse_lora(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        make, (_, *arguments), *state = super().__reduce_ex__(protocol)
        return _empty_packed_model, (make, stock_class(type(self)), *arguments), *state


def _empty_packed_model(make: Callable, stock: type, *arguments: Any) -> nn.Module:
    """Create an empty packed model for copy and pickle, which cannot find its class by name."""
    return make(packed_class(stock), *arguments)


class _PackedClass(type):
    """Metaclass that makes a packed class equal to its stock class.

    This is needed because a pipeline's `from_pipe` compares classes with those of its signature.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is stock_class(cls)

    def __hash__(cls) -> int:
        return hash(stock_class(cls))


@lru_cache
def packed_class(stock: type) -> type:
    """The class of packed models for a diffusers model class.

    It has the stock class's name, because diffusers writes that to `config.json` and `model_index.json` and looks up
    features by it.
    """
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return _PackedClass(stock.__name__, (PackedModel, stock), names | {"_stock": stock})


def stock_class(packed: type) -> type:
    """The inverse of `packed_class`."""
    return packed._stock


def make_packed(model: nn.Module, quantizer: DiffusersQuantizer) -> nn.Module:
    """Finish a model whose layers were packed: set its class, and diffusers' attributes of a quantised model.

    Args:
        model: the model, which is changed.
        quantizer: an `NFQQuantizer`; the settings in its `facts` go into the model's config.

    Returns:
        The same model.
    """
    wrap_copying(type(model))
    model.__class__ = packed_class(type(model))
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    method = model.quantization_method.value
    model.register_to_config(quantization_config={"quant_method": method, **quantizer.facts.settings})
    for layer in packed_layers(model).values():
        layer.compute_dtype = model.dtype
    return model


def make_stock(model: nn.Module) -> nn.Module:
    """Restore stock layers and the stock class, with weights and fused LoRAs dequantised to the model's dtype.

    Returns:
        The same model; diffusers removes its quantiser.

    Raises:
        NFQError: weights are offloaded.
    """
    refuse_offloaded(model)
    dense_layers(model, model.dtype)
    if "peft" in sys.modules:
        from .lora import restore_adapters

        restore_adapters(model)
    model.__class__ = stock_class(type(model))
    del model.quantization_method
    model.is_quantized = False
    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = type(model.config)(config)
    return model


def names_in_model(file: NFQFile, shapes: Mapping[str, Any]) -> dict[str, str]:
    """A model's name of each tensor of a file, by key: the same names if they match, else diffusers' UNet names.

    A transformer's file may have a prefix before its names.

    Raises:
        UnsupportedFileError: the names differ and the file has no complete UNet of the SDXL family.
    """
    if set(file.keys()) == set(shapes):
        return {name: name for name in shapes}
    model = find_family(file.shapes())
    if model:
        names = {key: key[len(model.prefix) :] for key in file.keys() if key.startswith(model.prefix)}  # noqa: SIM118
        if not any(name in shapes for name in names.values()):
            raise UnsupportedFileError(
                f"{file.path} is {model.family.name} with ComfyUI's names; quantise the transformer's folder in "
                "diffusers' layout instead"
            )
        return names
    return diffusers_unet_names(file)


def check_fits(file: NFQFile, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], config: str) -> None:
    """Check that a file has exactly the tensors of a model.

    Args:
        file: the file.
        names: the model's name of each of the file's tensors, by key.
        shapes: shapes of the model's tensors, by name.
        config: the config that the model was built from, for the message.

    Raises:
        UnsupportedFileError: a tensor is missing, unknown to the model, or has another shape.
    """
    stored = file.shapes()
    actual = {name: stored[key] for key, name in names.items()}
    different = [name for name in {**shapes, **actual} if actual.get(name) != shapes.get(name)]
    if not different:
        return
    name = different[0]
    if name not in actual:
        reason = f"the file lacks {name!r}"
    elif name not in shapes:
        reason = f"the config has no {name!r}"
    else:
        reason = f"{name!r} is {actual[name]} in the file, {shapes[name]} in the config"
    others = f", and {len(different) - 1:,} more tensors differ" if len(different) > 1 else ""
    raise UnsupportedFileError(
        f"{file.path} (architecture: {file.facts.architecture}) does not fit {config}: {reason}{others}; "
        "use the config of the model that was quantised"
    )


@contextmanager
def _casts_allowed(model: nn.Module) -> Iterator[None]:
    """Allow casts inside the `with` block; diffusers refuses to cast quantised models."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True
