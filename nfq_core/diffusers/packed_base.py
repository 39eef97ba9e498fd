"""What packed models of diffusers and transformers share: saving, casts, adapters, copies, and their classes."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.state_dict import save
from ..errors import NFQError, reason_of
from ..files.atomic import AtomicFile
from ..layers.packed_layers import CANNOT_TRAIN, needs_dense
from ..layers.packing import dense_layers
from .saving import refuse_offloaded

_NEED_DENSE = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
"""Adapters that need the dense weights, by parts of their tensors' names."""


def lora_error(names: Iterable[str]) -> NFQError | None:
    """The error for an adapter's tensors that need dense weights, by their names; None if they may work."""
    names = list(names)
    kind = next((kind for part, kind in _NEED_DENSE.items() if any(part in name for name in names)), None)
    return None if kind is None else needs_dense(kind)


@dataclass(frozen=True)
class SavedFiles:
    """Names of the files that a stock model's `save_pretrained` writes: config, weights, index of several weights."""

    config: str
    weights: str
    index: str


class PackedBase:
    """Base class of packed models, before the model's own class; see `packed_class`."""

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
        """Write `config.json` and the weights, as one `.nfq.safetensors` file under the name that is expected.

        `from_pretrained` loads the folder; every reader of `.nfq.safetensors` files loads the weights file. An existing
        weights file is replaced.

        Args:
            save_directory: the folder; created if missing.
            is_main_process: if false, nothing is written.
            save_function: ignored.
            safe_serialization: must be true.
            variant: part of the file's name, as in the stock method.
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
        text, state = self._config_and_tensors()
        files, folder = self._files, Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NFQError(f"{folder} cannot be made a folder: {reason_of(error)}; nothing was changed") from None
        # The variant precedes the last part of a name.
        middle = "." if variant is None else f".{variant}."
        weights, index = (middle.join(name.rsplit(".", 1)) for name in (files.weights, files.index))
        if (folder / index).exists():
            raise NFQError(f"{folder} holds a model in several files; choose another folder")
        facts = self.hf_quantizer.facts
        # The config is written under a temporary name before the weights are replaced.
        with AtomicFile(folder / files.config, overwrite=True) as config:
            config.write_at(0, text.encode())
            save(state, folder / weights, settings=facts.settings, source=facts.source, overwrite=True)
            config.commit()

    @property
    def _files(self) -> SavedFiles:
        """Names of the files in a folder."""
        raise NotImplementedError

    def _config_and_tensors(self) -> tuple[str, dict[str, Any]]:
        """The text of the config file and the tensors of the weights file; NFQError if they cannot be saved."""
        raise NotImplementedError

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
        """As the stock method.

        Raises:
            NFQError: the adapter needs the dense weights.
        """
        self.check_adapter(adapter_config)
        with self._records_of_adapters():
            super().add_adapter(adapter_config, *args, **kwargs)

    @contextmanager
    def _records_of_adapters(self) -> Iterator[None]:
        """If an NFQError is raised inside, an adapter's layers were removed, and so its records are removed too."""
        loaded, configs = self._hf_peft_config_loaded, dict(getattr(self, "peft_config", {}))
        try:
            yield
        except NFQError:
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

    def __reduce_ex__(self, protocol: int) -> tuple:
        make, (_, *arguments), *state = super().__reduce_ex__(protocol)
        return _empty_packed_model, (make, stock_class(type(self)), type(self)._base, *arguments), *state


def _empty_packed_model(make: Callable, stock: type, base: type, *arguments: Any) -> nn.Module:
    """Create an empty packed model for copy and pickle, which cannot find its class by name."""
    return make(packed_class(stock, base), *arguments)


class _PackedClass(type):
    """Metaclass that makes a packed class equal to its stock class.

    This is needed because a pipeline's `from_pipe` compares classes with those of its signature.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is stock_class(cls)

    def __hash__(cls) -> int:
        return hash(stock_class(cls))


@lru_cache
def packed_class(stock: type, base: type) -> type:
    """The class of packed models for a model class of diffusers or transformers.

    It has the stock class's name, because both write that to `config.json` and `model_index.json` and look up features
    by it.

    Args:
        stock: the model class.
        base: a subclass of `PackedBase`, whose methods come before the stock class's.
    """
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return _PackedClass(stock.__name__, (base, stock), names | {"_stock": stock, "_base": base})


def mark_quantized(model: nn.Module, quantizer: Any) -> dict[str, Any]:
    """Set the attributes of a quantised model; returns what its config records about it.

    Args:
        model: the model.
        quantizer: the quantiser that packed it, with `facts`.
    """
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    return {"quant_method": model.quantization_method.value, **quantizer.facts.settings}


def restore_layers(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace a model's packed layers by stock ones, with fused LoRAs dequantised too.

    Args:
        model: the model.
        dtype: see `dense_layers`.

    Raises:
        NFQError: weights are offloaded.
    """
    refuse_offloaded(model)
    dense_layers(model, dtype)
    if "peft" in sys.modules:
        from .lora import restore_adapters

        restore_adapters(model)


def stock_class(packed: type) -> type:
    """The inverse of `packed_class`."""
    return packed._stock


@contextmanager
def _casts_allowed(model: nn.Module) -> Iterator[None]:
    """Allow casts inside the `with` block; diffusers refuses to cast quantised models."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True
