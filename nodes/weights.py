"""The weights of any MODEL of the host, dense, whatever the host holds them as."""

from __future__ import annotations

import re
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..nfq_core import NFQError
from .host import UNET
from .ops import NFOps

LAYERS = {torch.nn.Linear: NFOps.Linear, torch.nn.Conv2d: NFOps.Conv2d}
"""The kinds of layers whose weights can be packed, and ours of each kind."""

_PROGRAMS = {"GGMLTensor": "GGUF", "Params4bit": "4 bits by bitsandbytes", "Int8Params": "8 bits by bitsandbytes"}
"""What other plugins' kinds of weights mean to a user."""

_EIGHT_BIT = re.compile(r"TensorCore(MX)?FP8\w*Layout|TensorWiseINT8Layout")
"""The names of the host's own layouts of 8 bits: such weights are dequantised, and then as good as any others."""


def key_patches(model: Any) -> dict[str, list]:
    """The UNet's weights with their patches, as the host's `get_key_patches` gives them.

    That fails for a MODEL whose weights have scales: its state dict holds them, its layers have no such parameters.
    """
    result = {}
    parameters = model.model.named_parameters(remove_duplicate=False)
    held = {name for name, _ in (*parameters, *model.model.named_buffers(remove_duplicate=False))}
    for key in model.model_state_dict(UNET):
        path, _, name = key.rpartition(".")
        is_linear = is_host_quantized_linear(comfy.utils.get_attr(model.model, path))
        if key not in held or (is_linear and name not in ("weight", "bias")):
            continue
        weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
        if key in model.backup:
            weight = model.backup[key].weight
        if key in model.hook_backup:
            weight = model.hook_backup[key][0]
        result[key] = [(weight, convert or _unchanged), *model.patches.get(key, [])]
    return result


def _unchanged(weight: torch.Tensor, **_: Any) -> torch.Tensor:
    return weight


def dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight with the host's 8-bit quantisation undone, fp16 instead of plain fp8; any other weight as it is."""
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize()
    return weight if weight.dtype.itemsize > 1 else weight.to(torch.float16)


def quantizable_layers(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers whose weights can be packed, by the name of the weight."""
    kinds = tuple(LAYERS)
    return {
        f"{name}.weight": module
        for name, module in unet.named_modules()
        if isinstance(module, kinds) or is_host_quantized_linear(module)
    }


def is_host_quantized_linear(module: torch.nn.Module) -> bool:
    """Whether a module is the host's Linear for quantised weights, which is no `torch.nn.Linear`."""
    is_linear = type(module).__name__ == "Linear" and not isinstance(module, torch.nn.Linear)
    return is_linear and isinstance(module, comfy.ops.CastWeightBiasOp)


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter is quantised, by us or others; a quantised tensor's dtype is that which it stands for."""
    return isinstance(weight, QuantizedTensor) or not weight.dtype.is_floating_point


def has_eight_bits(weight: torch.Tensor) -> bool:
    """Whether a parameter is held in 8 bits, with a scale or without, in a form that `dense` undoes."""
    if isinstance(weight, QuantizedTensor):
        return bool(_EIGHT_BIT.fullmatch(str(weight._layout_cls)))
    return weight.dtype.is_floating_point and weight.dtype.itemsize == 1


def refuse_other_forms(model: torch.nn.Module) -> None:
    """NFQError when weights are quantised in a form that `dense` does not undo."""
    for weight in model.parameters():
        if is_quantized(weight) and not has_eight_bits(weight):
            raise NFQError(f"this MODEL is quantised already, as {_form(weight)}; load its fp16 or bf16 file instead")


def _form(weight: torch.Tensor) -> str:
    """How a weight is quantised, in a few words."""
    if isinstance(weight, QuantizedTensor):
        return str(weight._layout_cls).removeprefix("TensorCore").removesuffix("Layout")
    kind = type(weight.data).__name__
    return _PROGRAMS.get(kind, f"{str(weight.dtype).removeprefix('torch.')} by another program")
