"""The decode as one opaque operation of torch, so that torch.compile keeps one graph.

The module cannot be reloaded: torch takes an operation once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from .formats import format_by_id
from .tensor import NFTensor

NAMESPACE = f"nfq_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"
"""Where torch knows the operation: each copy of this package in a process, installed or in a plugin, has its own."""


def _dequantize(data: torch.Tensor, format_id: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return NFTensor(data, format_by_id(format_id), shape, dtype).dequantize(dtype)


def _dequantize_fake(data: torch.Tensor, format_id: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    NFTensor(data, format_by_id(format_id), shape, dtype)
    return data.new_empty(shape, dtype=dtype)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("dequantize(Tensor data, str format_id, int[] shape, ScalarType dtype) -> Tensor")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::dequantize", _dequantize_fake, lib=_library)

dequantize = getattr(torch.ops, NAMESPACE).dequantize.default
"""``dequantize(data, format_id, shape, dtype) -> Tensor``: a packed buffer's weights, see `NFTensor.dequantize`."""
