"""What a packed model does otherwise than a stock one: saving, casts, LoRA."""

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
from ..layers.packed_layers import CANNOT_TRAIN, dense_layers, needs_dense, packed_layers
from .patches import let_copy
from .saving import refuse_offloaded, saved_tensors

_NEED_WEIGHTS = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
"""Adapters that need the dense weights, by parts of their tensors' names."""


class PackedModel:
    """Goes before a diffusers model's own class, see `packed_class`."""

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
        """Write `config.json` and, as one `.nfq.safetensors` file under the name that diffusers expects, the weights.

        The folder can be given to `from_pretrained`, the file to everything that reads such files. A weights file that
        is there already is replaced.

        Args:
            save_directory: the folder; it is made where there is none.
            is_main_process: nothing is written where this is false.
            save_function: without effect.
            safe_serialization: must be true.
            variant: goes into the file's name, as in diffusers.
            max_shard_size: without effect: it is always one file.
            push_to_hub: must be false; the model's own `push_to_hub` does it.
            kwargs: without effect.

        Raises:
            NFQError: the folder cannot be written or holds a model in several files, or a LoRA is attached. The folder
                is then as it was.
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
        # The config is on the disk, under another name, before the weights that it belongs to are replaced.
        with AtomicFile(folder / self.config_name, overwrite=True) as config:
            config.write_at(0, self.to_json_string().encode())
            save(state, folder / name, settings=facts.settings, source=facts.source, overwrite=True)
            config.commit()

    def to(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As torch's; a cast leaves packed weights as they are."""
        with _casts_allowed(self):
            return super().to(*args, **kwargs)

    def half(self) -> nn.Module:
        """As torch's; packed weights stay as they are."""
        with _casts_allowed(self):
            return super().half()

    def float(self) -> nn.Module:
        """As torch's; packed weights stay as they are."""
        with _casts_allowed(self):
            return super().float()

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """As torch's.

        Raises:
            NFQError: packed weights would be trained.
        """
        if requires_grad:
            raise NFQError(CANNOT_TRAIN)
        return super().requires_grad_(False)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch's. PEFT walks the modules whenever it has added adapters: those meet packed layers here."""
        if "peft" in sys.modules and not torch.compiler.is_compiling():
            from .lora import adopt

            adopt(self)
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
            # The adapter's layers were taken away; diffusers must not remember them either.
            self._hf_peft_config_loaded = loaded
            if hasattr(self, "peft_config"):
                self.peft_config = configs
            raise

    def check_adapter(self, config: Any) -> None:
        """See that an adapter can be added.

        Args:
            config: PEFT's configuration.

        Raises:
            NFQError: it cannot work beside packed weights.
        """
        from .lora import refusal

        error = refusal(config)
        if error is not None:
            raise error

    def dense_copy(self) -> nn.Module:
        """A stock copy with the weights dequantised; this model stays packed."""
        return copy.deepcopy(self).dequantize()

    def fuse_qkv_projections(self) -> None:
        """NFQError: packed weights cannot be put together."""
        raise NFQError("q, k and v cannot be fused while they are packed; unet.dequantize() comes first")

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'.

        Raises:
            NFQError: the adapter needs the dense weights.
        """
        given = pretrained_model_name_or_path_or_dict
        names = list(given) if isinstance(given, Mapping) else []
        kind = next((kind for part, kind in _NEED_WEIGHTS.items() if any(part in name for name in names)), None)
        if kind is not None:
            raise needs_dense(kind)
        return super().load_lora_adapter(given, *args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; packed weights stay as they are, and the LoRAs are added whenever they are dequantised.

        Raises:
            NFQError: an adapter is no plain LoRA.
        """
        from .lora import let_merge

        let_merge(self, kwargs.get("adapter_names"))
        super().fuse_lora(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        make, (_, *arguments), *state = super().__reduce_ex__(protocol)
        return _blank, (make, stock_class(type(self)), *arguments), *state


def _blank(make: Callable, stock: type, *arguments: Any) -> nn.Module:
    """An empty packed model, for copy and pickle, which cannot find its class by name."""
    return make(packed_class(stock), *arguments)


class _Packed(type):
    """The type of packed classes: each equals its stock class.

    A pipeline's `from_pipe` compares classes with those of its signature.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is stock_class(cls)

    def __hash__(cls) -> int:
        return hash(stock_class(cls))


@lru_cache
def packed_class(stock: type) -> type:
    """The class of packed models for a diffusers model class.

    It bears the stock class's name, which diffusers writes to `config.json` and `model_index.json` and looks features
    up by.
    """
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return _Packed(stock.__name__, (PackedModel, stock), names | {"_stock": stock})


def stock_class(packed: type) -> type:
    """The inverse of `packed_class`."""
    return packed._stock


def become_packed(model: nn.Module, quantizer: DiffusersQuantizer) -> nn.Module:
    """Finish a model whose layers were packed: its class, and what diffusers wants to know of its quantiser.

    Args:
        model: is changed.
        quantizer: an `NFQQuantizer`, whose `facts` go into the model's config.

    Returns:
        The model itself.
    """
    let_copy(type(model))
    model.__class__ = packed_class(type(model))
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    method = model.quantization_method.value
    model.register_to_config(quantization_config={"quant_method": method, **quantizer.facts.settings})
    for layer in packed_layers(model).values():
        layer.compute_dtype = model.dtype
    return model


def become_stock(model: nn.Module) -> nn.Module:
    """Put stock layers and the stock class back, weights dequantised to the model's dtype, fused LoRAs in them.

    Returns:
        The model itself; diffusers takes its quantiser away.

    Raises:
        NFQError: weights are offloaded.
    """
    refuse_offloaded(model)
    dense_layers(model, model.dtype)
    if "peft" in sys.modules:
        from .lora import abandon

        abandon(model)
    model.__class__ = stock_class(type(model))
    del model.quantization_method
    model.is_quantized = False
    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = type(model.config)(config)
    return model


def names_in_model(file: NFQFile, shapes: Mapping[str, Any]) -> dict[str, str]:
    """What a model calls each tensor of a file: as the file does where all names are the model's.

    Raises:
        UnsupportedFileError: they are not, and the file holds no whole UNet of the SDXL family.
    """
    if set(file.keys()) == set(shapes):
        return {name: name for name in shapes}
    return diffusers_unet_names(file)


def check_fits(file: NFQFile, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], config: str) -> None:
    """See that a file holds exactly the tensors of a model.

    Args:
        file: the file.
        names: the model's name of each of the file's tensors.
        shapes: the model's tensors.
        config: what the model was built from, for the message.

    Raises:
        UnsupportedFileError: a tensor is missing, too much, or of another shape.
    """
    stored = file.shapes()
    found = {name: stored[key] for key, name in names.items()}
    unfit = [name for name in {**shapes, **found} if found.get(name) != shapes.get(name)]
    if not unfit:
        return
    name = unfit[0]
    if name not in found:
        reason = f"the file lacks {name!r}"
    elif name not in shapes:
        reason = f"the config has no {name!r}"
    else:
        reason = f"{name!r} is {found[name]} in the file, {shapes[name]} by the config"
    others = f", and {len(unfit) - 1:,} tensors more differ" if len(unfit) > 1 else ""
    raise UnsupportedFileError(
        f"{file.path} (architecture: {file.facts.architecture}) does not fit {config}: {reason}{others}; "
        "take the config of the model that was quantised"
    )


@contextmanager
def _casts_allowed(model: nn.Module) -> Iterator[None]:
    """diffusers refuses to cast quantised models, for most would be damaged."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True
