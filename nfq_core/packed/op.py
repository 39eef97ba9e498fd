"""The decode as one opaque operation of torch, so that torch.compile keeps one graph.

The module cannot be reloaded: torch takes an operation once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .formats import format_by_id
from .tensor import NFTensor

_local = threading.local()

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Not what stands in for tensors, such as fakes."""

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


def dequantize_for_one_use(
    data: torch.Tensor, format_id: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """`dequantize` for a caller that is done with the result before its thread's next call, such as a layer's forward.

    On a CPU, where fresh memory costs more than the decode, all results of a thread then lie in the same memory. Where
    autograd might keep the result, or a graph is being made, it is always a new tensor.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or data.device.type != "cpu":
        return dequantize(data, format_id, shape, dtype)
    if type(data) not in _PLAIN or _get_current_dispatch_mode() is not None:
        return dequantize(data, format_id, shape, dtype)
    tensor = NFTensor(data, format_by_id(format_id), shape, dtype)
    return tensor.dequantize(out=_memory(tensor.numel() * dtype.itemsize).view(dtype).view(tensor.shape))


def _memory(nbytes: int) -> torch.Tensor:
    """The first bytes of this thread's memory, uint8; it grows to the largest that was asked for."""
    if getattr(_local, "memory", None) is None or _local.memory.numel() < nbytes:
        # What inference mode makes could not be used outside of it.
        with torch.inference_mode(False):
            _local.memory = None
            _local.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return _local.memory[:nbytes]
