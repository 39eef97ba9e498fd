"""Packed weights in Forge and Forge Neo, as parameters for their own layers for GGUF files.

These layers accept any parameter with a `gguf_cls` that has three functions. They move the parameter unchanged, and
dequantise it in `forward` before they apply LoRAs. Forge has such Linear layers, Forge Neo such convolutions too;
other weights, 13 % of SDXL's in Forge, are dequantised when the file is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..nfq_core import NFTensor
from ..nfq_core.checkpoints.state_dict import StateDict
from ..nfq_core.checkpoints.whole_checkpoint import dequantize_state_dict
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from ..nfq_core.packed.layout import BlockFormat


class NFQ:
    """The functions that the program calls for a packed parameter; it shows the class's name when it loads a model."""

    @staticmethod
    def bake(parameter: PackedParameter) -> None:
        """Do nothing: no preparation is needed."""

    @staticmethod
    def dequantize_pytorch(parameter: PackedParameter) -> torch.Tensor:
        """Dequantise to the parameter's computation dtype, on its device."""
        return parameter.unpacked()

    @staticmethod
    def quantize_pytorch(data: torch.Tensor, parent: PackedParameter) -> PackedParameter:
        """Store weights with merged LoRAs in a parameter, dense: quantising them again would lose the LoRAs."""
        parent.data = data.to(parent.computation_dtype)
        parent.gguf_cls = parent.format = None
        return parent


class PackedParameter(torch.nn.Parameter):
    """A UNet's parameter for layers for GGUF files: a packed weight, or one that was kept dense.

    The program measures its memory by its elements, which are the packed bytes. Cast to a floating dtype, as the
    program does before it merges a LoRA, it is a dense tensor.
    """

    gguf_cls: type[NFQ] | None
    format: BlockFormat | None
    weight_shape: torch.Size
    computation_dtype: torch.dtype

    def __new__(
        cls,
        data: torch.Tensor,
        fmt: BlockFormat | None,
        shape: torch.Size,
        computation_dtype: torch.dtype = torch.float16,
    ) -> PackedParameter:
        """A parameter over `data`, a packed buffer of format `fmt` or, without one, a dense weight.

        There is no `__init__`: `torch.nn.Parameter(parameter)` would call it with arguments of its own.
        """
        parameter = super().__new__(cls, data, requires_grad=False)
        parameter.format = fmt
        parameter.gguf_cls = NFQ if fmt else None
        parameter.weight_shape = shape
        parameter.computation_dtype = computation_dtype
        return parameter

    @property
    def shape(self) -> torch.Size:
        """The weight's dense shape, also if it is packed."""
        return self.weight_shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weight computes: Forge Neo rounds a weight with a merged LoRA to it."""
        return self.data.dtype if self.format is None else self.computation_dtype

    def unpacked(self) -> torch.Tensor:
        """The dense weight, in the computation dtype if it was packed."""
        if self.format is None:
            return self.data
        return NFTensor(self.data, self.format, self.weight_shape, torch.float16).dequantize(self.computation_dtype)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        """Move or cast the parameter; a packed one that is cast to a floating dtype is dequantised.

        A packed buffer never changes, so a copy on the same device shares it.
        """
        if self.format is None:
            return self._like(self.data.to(*args, copy=copy, **kwargs))
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self._like(self.data.to(device=device or self.device, non_blocking=non_blocking))
        return moved.unpacked().to(dtype) if dtype is not None and dtype.is_floating_point else moved

    def pin_memory(self, device: Any = None) -> PackedParameter:
        """The same parameter in pinned memory."""
        return self._like(self.data.pin_memory())

    def detach(self) -> PackedParameter:
        """Return the parameter itself, which has no gradient, so a state dict keeps the class of packed weights."""
        return self

    def clone(self, **kwargs: Any) -> torch.Tensor:
        """Return the dense weight: the program clones the weights it saves, for other programs to read."""
        return self.unpacked().clone()

    def __deepcopy__(self, memo: dict) -> PackedParameter:
        return self._like(self.data.clone())

    def _like(self, data: torch.Tensor) -> PackedParameter:
        return PackedParameter(data, self.format, self.weight_shape, self.computation_dtype)


# Forge Neo pins a parameter in memory only if its class has this name.
PackedParameter.__name__ = torch.nn.Parameter.__name__


def packed_parameter(weight: NFTensor) -> PackedParameter:
    """A packed weight as a parameter."""
    return PackedParameter(weight.data, weight.format, weight.shape)


def kept_parameter(weight: torch.Tensor) -> PackedParameter:
    """A dense weight as a parameter for the same layers."""
    return PackedParameter(weight, None, weight.shape)


def keep_packed(
    tensors: StateDict, dimensions: Collection[int], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Prepare a checkpoint's tensors for layers that hold packed weights.

    Args:
        tensors: tensors by the names of a whole LDM checkpoint; the dictionary is emptied.
        dimensions: numbers of dimensions of the weights that stay packed; others are dequantised to fp16.
        device: device of the result.

    Returns:
        The UNet's tensors as PackedParameters, others unchanged.
    """
    stay = {
        key: tensors.pop(key).to(device)
        for key, value in list(tensors.items())
        if isinstance(value, NFTensor) and len(value.shape) in dimensions and key.startswith(CHECKPOINT_PREFIX)
    }
    result = dequantize_state_dict(tensors, device=device)
    for key, value in result.items():
        if key.startswith(CHECKPOINT_PREFIX):
            result[key] = kept_parameter(value)
    return result | {key: packed_parameter(value) for key, value in stay.items()}


def holds_ours(model: torch.nn.Module) -> bool:
    """Whether a model was loaded from one of our files, with layers for packed weights."""
    return any(isinstance(parameter, PackedParameter) for parameter in model.parameters())


def parameters_for(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A UNet's tensors as layers for packed weights take them: all are PackedParameters."""
    return {
        key: value if isinstance(value, torch.nn.Parameter) else kept_parameter(value) for key, value in tensors.items()
    }


def dense_only(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A UNet's tensors as any layer takes them: packed weights are dequantised."""
    return {key: value.unpacked() if isinstance(value, PackedParameter) else value for key, value in tensors.items()}
