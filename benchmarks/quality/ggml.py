"""ggml's own quantisers, called by ctypes in the shared library of the `xllamacpp` wheel."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from math import gcd
from pathlib import Path

import torch
import torch.nn.functional as F

# Numbers of the types in `enum ggml_type`; they are part of GGUF files, so that they never change.
TYPES = dict(Q2_K=10, Q3_K=11, IQ4_XS=23, IQ4_NL=20, Q4_0=2, Q4_K=12, Q5_0=6, Q5_K=13, Q6_K=14, Q8_0=8)
# Types with blocks of 256 weights that are commonly used with an importance matrix.
K_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K")


class _TypeTraits(ctypes.Structure):
    """ggml's `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


@lru_cache
def library() -> ctypes.CDLL:
    """Load the shared library and check its types; OSError or RuntimeError if it is not as expected."""
    folders = find_spec("xllamacpp").submodule_search_locations
    path = next((path for folder in folders for path in Path(folder).glob("*.so")), None)
    if path is None:
        raise OSError(f"xllamacpp has no shared library in {folders[0]}")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    ggml.ggml_row_size.argtypes = ctypes.c_int, ctypes.c_int64
    ggml.ggml_row_size.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = ctypes.c_int, pointer, pointer, count, count, count, pointer
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name, number in TYPES.items():
        found = ggml.ggml_get_type_traits(number).contents.type_name.decode()
        if found.lower() != name.lower():
            raise RuntimeError(f"ggml's type {number} is {found}, {name} was expected")
    return ggml


def round_trip(weight: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """Quantise a weight and dequantise it.

    The weight is flattened and cut into rows of one block, the last one padded with zeros, so that every layer can have
    a K-quant, as in ComfyUI-GGUF. A weight whose own rows are whole blocks gets the usual result. `importance` is that
    of each input channel, shape (columns,), for K_TYPES only. Returns the weight, fp32, and its packed bytes.
    """
    ggml, number = library(), TYPES[name]
    traits = ggml.ggml_get_type_traits(number).contents
    flat = weight.detach().float().reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % traits.block)).view(-1, traits.block).contiguous()
    decoded = torch.empty_like(blocks)
    for chosen, matrix in _phases(len(blocks), traits.block, importance):
        source = blocks[chosen].contiguous()
        packed = torch.empty(len(source), ggml.ggml_row_size(number, traits.block), dtype=torch.uint8)
        sizes, pointer = (0, len(source), traits.block), None if matrix is None else matrix.data_ptr()
        written = ggml.ggml_quantize_chunk(number, source.data_ptr(), packed.data_ptr(), *sizes, pointer)
        if written != packed.numel():
            raise RuntimeError(f"ggml wrote {written:,} bytes of {name}, expected {packed.numel():,}")
        part = torch.empty_like(source)
        traits.to_float(packed.data_ptr(), part.data_ptr(), part.numel())
        decoded[chosen] = part
    return decoded.view(-1)[: flat.numel()].view(weight.shape), len(blocks) * traits.block_bytes


def _phases(blocks: int, block: int, importance: torch.Tensor | None) -> list[tuple[slice, torch.Tensor | None]]:
    """Groups of blocks that begin at the same column; the importance of their weights, fp32 of shape (block,)."""
    if importance is None:
        return [(slice(None), None)]
    columns, period = len(importance), len(importance) // gcd(len(importance), block)
    return [
        (slice(first, None, period), importance.float()[(first * block + torch.arange(block)) % columns].contiguous())
        for first in range(min(period, blocks))
    ]
