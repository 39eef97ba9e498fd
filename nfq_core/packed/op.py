"""The decode, of a weight or of rows, as opaque torch operations, so that torch.compile does not break the graph.

This module cannot be reloaded, because torch registers operations only once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .formats import format_by_id
from .rows import dequantize_rows as decode_rows
from .tensor import NFTensor

_local = threading.local()

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of real tensors, as opposed to fakes and other subclasses."""

NAMESPACE = f"nfq_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"
"""Namespace of the operations in torch: unique to each copy of this package in a process, installed or in a plugin."""


def _dequantize(data: torch.Tensor, format_id: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return NFTensor(data, format_by_id(format_id), shape, dtype).dequantize(dtype)


def _dequantize_fake(data: torch.Tensor, format_id: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    NFTensor(data, format_by_id(format_id), shape, dtype)
    return data.new_empty(shape, dtype=dtype)


def _dequantize_rows(
    data: torch.Tensor, format_id: str, shape: Sequence[int], rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return decode_rows(NFTensor(data, format_by_id(format_id), shape, dtype), rows, dtype)


def _dequantize_rows_fake(
    data: torch.Tensor, format_id: str, shape: Sequence[int], rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    NFTensor(data, format_by_id(format_id), shape, dtype)
    return data.new_empty((rows.shape[0], shape[1]), dtype=dtype)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("dequantize(Tensor data, str format_id, int[] shape, ScalarType dtype) -> Tensor")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.define("dequantize_rows(Tensor data, str format_id, int[] shape, Tensor rows, ScalarType dtype) -> Tensor")
_library.impl("dequantize_rows", _dequantize_rows, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::dequantize_rows", _dequantize_rows_fake, lib=_library)

dequantize = getattr(torch.ops, NAMESPACE).dequantize.default
"""``dequantize(data, format_id, shape, dtype) -> Tensor``: decode a packed buffer, see `NFTensor.dequantize`."""

dequantize_rows = getattr(torch.ops, NAMESPACE).dequantize_rows.default
"""``dequantize_rows(data, format_id, shape, rows, dtype) -> Tensor``: see `rows.dequantize_rows`."""


def dequantize_for_one_use(
    data: torch.Tensor, format_id: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """`dequantize` into memory that the thread's next call overwrites, for a layer's forward.

    Only on the CPU, where allocating costs more than decoding. The result is a new tensor where autograd might keep it,
    or a graph is being traced.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or data.device.type != "cpu":
        return dequantize(data, format_id, shape, dtype)
    if type(data) not in _PLAIN or _get_current_dispatch_mode() is not None:
        return dequantize(data, format_id, shape, dtype)
    tensor = NFTensor(data, format_by_id(format_id), shape, dtype)
    return tensor.dequantize(out=_memory(tensor.numel() * dtype.itemsize).view(dtype).view(tensor.shape))


def _memory(nbytes: int) -> torch.Tensor:
    """The first bytes of this thread's reused memory, uint8; it grows to the largest request."""
    if getattr(_local, "memory", None) is None or _local.memory.numel() < nbytes:
        # A tensor created in inference mode could not be used outside it.
        with torch.inference_mode(False):
            _local.memory = None
            _local.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return _local.memory[:nbytes]
