"""Packed weights in Forge, as its own quantised parameters.

Forge's Linear layers for GGUF files accept any parameter with a `gguf_cls` that has three functions. They move the
parameter unchanged, and dequantise it in `forward` before they apply LoRAs. Its convolutions, 13 % of SDXL's weights,
cannot do this: their weights are dequantised when the file is read.
"""

from __future__ import annotations

from typing import Any

import torch

from ..nfq_core import NFTensor
from ..nfq_core.checkpoints.state_dict import StateDict
from ..nfq_core.checkpoints.whole_checkpoint import dequantize_state_dict
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from ..nfq_core.packed.layout import BlockFormat


class NFQ:
    """The functions that Forge calls for a packed parameter; Forge shows the class's name when it loads a model."""

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
    """A UNet's parameter for Forge's GGUF layers: a packed weight, or one that was kept dense."""

    gguf_cls: type[NFQ] | None
    format: BlockFormat | None
    weight_shape: torch.Size
    computation_dtype: torch.dtype

    def __new__(cls, data: torch.Tensor, *_: Any) -> PackedParameter:
        """A parameter over `data`, a packed buffer or a dense weight."""
        return super().__new__(cls, data, requires_grad=False)

    def __init__(
        self,
        data: torch.Tensor,
        fmt: BlockFormat | None,
        shape: torch.Size,
        computation_dtype: torch.dtype = torch.float16,
    ) -> None:
        self.format = fmt
        self.gguf_cls = NFQ if fmt else None
        self.weight_shape = shape
        self.computation_dtype = computation_dtype

    @property
    def shape(self) -> torch.Size:
        """The weight's dense shape, also if it is packed."""
        return self.weight_shape

    def unpacked(self) -> torch.Tensor:
        """The dense weight, in the computation dtype if it was packed."""
        if self.format is None:
            return self.data
        return NFTensor(self.data, self.format, self.weight_shape, torch.float16).dequantize(self.computation_dtype)

    def to(self, *args: Any, **kwargs: Any) -> PackedParameter:
        """Move or cast the parameter; a packed one keeps its dtype."""
        if self.format is not None:
            device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            return self._like(self.data.to(device=device or self.device, non_blocking=non_blocking))
        return self._like(self.data.to(*args, **kwargs))

    def pin_memory(self, device: Any = None) -> PackedParameter:
        """The same parameter in pinned memory."""
        return self._like(self.data.pin_memory())

    def detach(self) -> PackedParameter:
        """Return the parameter itself, which has no gradient, so a state dict keeps the class of packed weights."""
        return self

    def clone(self, **kwargs: Any) -> torch.Tensor:
        """Return the dense weight: Forge clones the weights it saves, and other programs must be able to read them."""
        return self.unpacked().clone()

    def _like(self, data: torch.Tensor) -> PackedParameter:
        return PackedParameter(data, self.format, self.weight_shape, self.computation_dtype)


def keep_packed(tensors: StateDict) -> dict[str, torch.Tensor]:
    """Prepare a checkpoint's tensors for Forge's loader: the UNet's become PackedParameters, others stay unchanged.

    Args:
        tensors: tensors by the names of a whole LDM checkpoint; the dictionary is emptied.
    """
    stay = {
        key: tensors.pop(key)
        for key, value in list(tensors.items())
        if isinstance(value, NFTensor) and len(value.shape) == 2 and key.startswith(CHECKPOINT_PREFIX)
    }
    result = dequantize_state_dict(tensors)
    for key, value in result.items():
        if key.startswith(CHECKPOINT_PREFIX):
            result[key] = PackedParameter(value, None, value.shape)
    return result | {key: PackedParameter(value.data, value.format, value.shape) for key, value in stay.items()}
