"""Dense weights of any MODEL, whatever form the host holds them in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..nfq_core import NFQError
from .host import UNET
from .ops import NFOps

LAYERS = {torch.nn.Linear: NFOps.Linear, torch.nn.Conv2d: NFOps.Conv2d, torch.nn.Embedding: NFOps.Embedding}
"""The layer types whose weights can be packed, and our own type for each."""

_OTHER_PLUGINS = {"GGMLTensor": "GGUF", "Params4bit": "4-bit bitsandbytes", "Int8Params": "8-bit bitsandbytes"}
"""User-readable names of other plugins' weight types."""

_EIGHT_BIT = re.compile(r"TensorCore(MX)?FP8\w*Layout|TensorWiseINT8Layout")
"""The host's own 8-bit layouts: such weights are dequantised and then quantised like any others."""


def key_patches(model: Any, prefix: str = UNET) -> dict[str, list]:
    """A network's weights with their patches, in the form of the host's `get_key_patches`.

    Args:
        model: the patcher of a MODEL or a CLIP.
        prefix: prefix of the wanted parameters; by default the UNet's.

    The host's function fails for weights with scales: the state dict contains the scales, but no layer has such
    parameters.
    """
    result = {}
    parameters = model.model.named_parameters(remove_duplicate=False)
    held = {name for name, _ in (*parameters, *model.model.named_buffers(remove_duplicate=False))}
    for key in model.model_state_dict(prefix):
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
    """A weight without the host's 8-bit quantisation; plain fp8 becomes fp16, other weights are returned unchanged."""
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize()
    return weight if weight.dtype.itemsize > 1 else weight.to(torch.float16)


def source_dtype(weights: Iterable[torch.Tensor]) -> torch.dtype:
    """The 16-bit dtype to record for fp32 weights: bf16 if the largest has only such values, else fp16.

    Hosts without 16-bit arithmetic hold files of both as fp32.
    """
    held = [weight for weight in weights if weight.dtype == torch.float32 and not isinstance(weight, QuantizedTensor)]
    largest = max(held, key=torch.Tensor.numel, default=None)
    is_bf16 = largest is not None and torch.equal(largest.to(torch.bfloat16).to(torch.float32), largest)
    return torch.bfloat16 if is_bf16 else torch.float16


def quantizable_layers(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers whose weights can be packed, by weight name."""
    kinds = tuple(LAYERS)
    return {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if isinstance(module, kinds) or is_host_quantized_linear(module)
    }


def is_host_quantized_linear(module: torch.nn.Module) -> bool:
    """Whether a module is the host's Linear for quantised weights, which is not a `torch.nn.Linear`."""
    is_linear = type(module).__name__ == "Linear" and not isinstance(module, torch.nn.Linear)
    return is_linear and isinstance(module, comfy.ops.CastWeightBiasOp)


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter is quantised, by us or others; a `QuantizedTensor` reports its original, floating dtype."""
    return isinstance(weight, QuantizedTensor) or not weight.dtype.is_floating_point


def is_eight_bit(weight: torch.Tensor) -> bool:
    """Whether a parameter is 8-bit, with or without a scale, in a form that `dense` can undo."""
    if isinstance(weight, QuantizedTensor):
        return bool(_EIGHT_BIT.fullmatch(str(weight._layout_cls)))
    return weight.dtype.is_floating_point and weight.dtype.itemsize == 1


def refuse_unsupported_quantization(model: torch.nn.Module) -> None:
    """Raise NFQError if weights are quantised in a form that `dense` cannot undo."""
    for weight in model.parameters():
        if is_quantized(weight) and not is_eight_bit(weight):
            raise NFQError(
                f"this MODEL is quantised already, as {_quantization_name(weight)}; load its fp16 or bf16 file instead"
            )


def _quantization_name(weight: torch.Tensor) -> str:
    """Name the form in which a weight is quantised."""
    if isinstance(weight, QuantizedTensor):
        return str(weight._layout_cls).removeprefix("TensorCore").removesuffix("Layout")
    kind = type(weight.data).__name__
    return _OTHER_PLUGINS.get(kind, f"{str(weight.dtype).removeprefix('torch.')} by another program")
