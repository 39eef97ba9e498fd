"""Packed weights in Forge, in the place of its own quantised parameters.

Forge's layers for GGUF files take any parameter that has a `gguf_cls` with three functions, move it as it is, and call
for its weights in forward, before they apply LoRAs. Linear layers alone do that: convolutions, 13 % of SDXL's weights,
are dequantised when the file is read.
"""

from __future__ import annotations

from typing import Any

import torch

from ..nfq_core import NFTensor
from ..nfq_core.checkpoints.state_dict import StateDict
from ..nfq_core.checkpoints.whole_checkpoint import dequantize_state_dict
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from ..nfq_core.packed.formats import BlockFormat


class NFQ:
    """What Forge calls for a packed parameter; it shows the class's name when it loads a model."""

    @staticmethod
    def bake(parameter: PackedParameter) -> None:
        """Nothing has to be prepared."""

    @staticmethod
    def dequantize_pytorch(parameter: PackedParameter) -> torch.Tensor:
        """The weights, of the parameter's computation dtype, where the parameter is."""
        return parameter.unpacked()

    @staticmethod
    def quantize_pytorch(data: torch.Tensor, parent: PackedParameter) -> PackedParameter:
        """Have a parameter hold weights with LoRAs merged in: dense, for quantising them would lose the LoRAs."""
        parent.data = data.to(parent.computation_dtype)
        parent.gguf_cls = parent.format = None
        return parent


class PackedParameter(torch.nn.Parameter):
    """A UNet's parameter as Forge's layers for GGUF files want it: a packed weight, or one that was kept dense."""

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
        """The weight's shape, packed or not."""
        return self.weight_shape

    def unpacked(self) -> torch.Tensor:
        """The dense weight, of the computation dtype if it was packed."""
        if self.format is None:
            return self.data
        return NFTensor(self.data, self.format, self.weight_shape, torch.float16).dequantize(self.computation_dtype)

    def to(self, *args: Any, **kwargs: Any) -> PackedParameter:
        """The same parameter elsewhere; a packed one keeps its dtype."""
        if self.format is not None:
            device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            return self._like(self.data.to(device=device or self.device, non_blocking=non_blocking))
        return self._like(self.data.to(*args, **kwargs))

    def pin_memory(self, device: Any = None) -> PackedParameter:
        """The same parameter in pinned memory."""
        return self._like(self.data.pin_memory())

    def detach(self) -> PackedParameter:
        """The parameter itself, which has no gradient: a state dict then tells packed weights by their class."""
        return self

    def clone(self, **kwargs: Any) -> torch.Tensor:
        """The dense weight: what Forge saves of a model it clones first, and other programs are to read it."""
        return self.unpacked().clone()

    def _like(self, data: torch.Tensor) -> PackedParameter:
        return PackedParameter(data, self.format, self.weight_shape, self.computation_dtype)


def keep_packed(tensors: StateDict) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors for Forge's loader: those of the UNet as PackedParameters, the others as they are.

    Args:
        tensors: under the names of a whole LDM checkpoint; it is emptied.
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
