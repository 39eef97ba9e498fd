"""diffusers' packed models: the methods that differ from a stock model's, and how a model becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..checkpoints.whole_checkpoint import diffusers_unet_names
from ..errors import NFQError, UnsupportedFileError
from ..files.container import NFQFile
from ..layers.packing import packed_layers
from ..models.families import find_family
from .packed_base import (
    PackedBase,
    SavedFiles,
    lora_error,
    mark_quantized,
    packed_class,
    restore_layers,
    stock_class,
)
from .patches import wrap_copying
from .saving import saved_tensors


class PackedModel(PackedBase):
    """Base class of diffusers' packed models; see `packed_class`."""

    @property
    def _files(self) -> SavedFiles:
        return SavedFiles(self.config_name, SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)

    def _config_and_tensors(self) -> tuple[str, dict[str, Any]]:
        tensors = saved_tensors(self, stock_class(type(self)))
        return self.to_json_string(), tensors

    def fuse_qkv_projections(self) -> None:
        """Raise NFQError: packed weights cannot be concatenated."""
        raise NFQError("q, k and v cannot be fused while they are packed; call unet.dequantize() first")

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'.

        Raises:
            NFQError: the adapter needs the dense weights.
        """
        given = pretrained_model_name_or_path_or_dict
        error = lora_error(given if isinstance(given, Mapping) else ())
        if error is not None:
            raise error
        return super().load_lora_adapter(given, *args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; the LoRAs are added each time a weight is dequantised, packed weights do not change.

        Raises:
            NFQError: an adapter is not a plain LoRA.
        """
        from .lora import check_mergeable

        check_mergeable(self, kwargs.get("adapter_names"))
        super().fuse_lora(*args, **kwargs)


def make_packed(model: nn.Module, quantizer: DiffusersQuantizer) -> nn.Module:
    """Finish a model whose layers were packed: set its class, and diffusers' attributes of a quantised model.

    Args:
        model: the model, which is changed.
        quantizer: an `NFQQuantizer`; the settings in its `facts` go into the model's config.

    Returns:
        The same model.
    """
    wrap_copying(type(model))
    model.__class__ = packed_class(type(model), PackedModel)
    model.register_to_config(quantization_config=mark_quantized(model, quantizer))
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
    restore_layers(model, model.dtype)
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
    check_shapes(file, {name: stored[key] for key, name in names.items()}, shapes, config)


def check_shapes(
    file: NFQFile, actual: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], config: str
) -> None:
    """`check_fits` for the shapes of the file's tensors by the model's names."""
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
