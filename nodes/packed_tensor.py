"""Packed weights in the host's own tensor type for quantised weights.

The host casts, moves, pins and counts comfy-kitchen's `QuantizedTensor`. `NFLayout` adds our block formats to it. The
packed buffer, which includes the scales, is the tensor's only data, so the host counts every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from ..nfq_core import NFQError, NFTensor
from ..nfq_core.packed.layout import BlockFormat
from ..nfq_core.packed.op import dequantize
from ..nfq_core.packed.rows import split_rows

LAYOUT = f"{__name__}.NFLayout"
"""The name of `NFLayout` in comfy-kitchen's registry; each copy of the plugin has its own."""


@dataclass(frozen=True)
class NFParams(BaseLayoutParams):
    """Everything about a packed weight except its buffer.

    `orig_dtype` is the dtype that the host sees; `source_dtype` is the dtype before quantising.
    """

    scale: None
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    format: BlockFormat
    source_dtype: torch.dtype

    def _tensor_fields(self) -> list[str]:
        return []


class NFLayout(QuantizedLayout):
    """Our block formats as a layout of comfy-kitchen."""

    Params = NFParams

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, NFParams]:
        """Not supported: a patched weight would lose its patch if it were quantised again."""
        raise NotImplementedError("NFQ weights are never quantised again by the host")

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: NFParams) -> torch.Tensor:
        """Dequantise to `params.orig_dtype` and `params.orig_shape`."""
        return dequantize(qdata, params.format.id, params.orig_shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """The packed buffer."""
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: NFParams) -> dict[str, torch.Tensor]:
        """The packed buffer under the weight's own name."""
        return {"": qdata}


register_layout_class(LAYOUT, NFLayout)


def wrap(packed: NFTensor, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """Wrap a packed weight in the host's tensor type.

    Args:
        packed: the packed weight.
        dtype: the dtype that the host sees; by default, and instead of fp8, the dtype before quantising.
    """
    return QuantizedTensor(packed.data, LAYOUT, _params(packed, dtype))


def _params(packed: NFTensor, dtype: torch.dtype | None) -> NFParams:
    shown = packed.dtype if dtype is None or dtype.itemsize == 1 else dtype
    return NFParams(None, shown, tuple(packed.shape), packed.format, packed.dtype)


def is_packed(weight: object) -> bool:
    """Whether a weight is packed by this plugin."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


def unwrap(weight: QuantizedTensor) -> NFTensor:
    """Undo `wrap`; the result shares the buffer."""
    params = weight._params
    return NFTensor(weight._qdata, params.format, params.orig_shape, params.source_dtype)


class LoadedTensor(QuantizedTensor):
    """A packed weight in a state dict that the host loads.

    Equal parts of its rows, such as the thirds of a fused projection, stay packed when the host slices them. A plain
    parameter gets the dequantised weight.
    """

    @classmethod
    def of(cls, packed: NFTensor, dtype: torch.dtype | None = None) -> LoadedTensor:
        """`wrap` for a state dict."""
        return cls(packed.data, LAYOUT, _params(packed, dtype))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Handle the host's operations on it."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], QuantizedTensor):
            return func(args[0], args[1].dequantize(), *args[2:], **kwargs)
        if func is torch.ops.aten.slice.Tensor and isinstance(args[0], cls):
            part = args[0]._part(*args[1:], **kwargs)
            if part is not None:
                return part
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _part(
        self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> LoadedTensor | None:
        """One of several equal parts of the rows; None if the slice is anything else."""
        rows = self.shape[0]
        start, end, _ = slice(start, end).indices(rows)
        length = end - start
        if dim != 0 or step != 1 or length <= 0 or rows % length or start % length:
            return None
        # The host slices the same tensor several times.
        parts = getattr(self, "_parts", ())
        if len(parts) != rows // length:
            try:
                parts = split_rows(unwrap(self), rows // length)
            except NFQError:
                return None
            self._parts = parts
        return self.of(parts[start // length], self.dtype)
