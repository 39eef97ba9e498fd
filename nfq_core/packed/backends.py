"""Which code decodes: chosen before the call, with a reason that can be shown."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec

import torch

from . import torch_decode
from .formats import BlockFormat, nf_format

log = logging.getLogger("nfq")

TRITON_DEVICES = ("cuda", "xpu")
"""Types of device that Triton compiles for; ROCm's are called cuda too."""

MIN_CAPABILITY = (7, 0)
"""The oldest CUDA devices that the kernel is compiled for in the tests."""

BF16_CAPABILITY = (8, 0)
"""The oldest CUDA devices with an instruction that rounds to bf16, without which Triton cannot compile it."""

PROBE_WEIGHTS = 64 * 300
"""Weights that are decoded to see whether Triton works."""

MAX_WEIGHTS = 2**31 - 2**20
"""Weights of one tensor that the Triton kernel, which counts in 32 bits, can name."""


@dataclass(frozen=True)
class Backend:
    """What decodes on a device, and why."""

    name: str
    reason: str
    dequantize_into: Callable[[torch.Tensor, torch.Tensor, BlockFormat], None]
    """See `torch_decode.dequantize_into`; every back-end gives the same bits."""


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """Decode a whole packed buffer into `out` with the back-end of both; see `torch_decode.dequantize_into`."""
    backend = backend_for(data.device, out.dtype)
    decode = backend.dequantize_into if out.numel() <= MAX_WEIGHTS else torch_decode.dequantize_into
    decode(out, data, fmt)


@lru_cache(32)
def backend_for(device: torch.device, dtype: torch.dtype = torch.float16) -> Backend:
    """The back-end for a device and the dtype of the weights; what keeps a GPU from the fast one is logged once."""
    obstacle = _without_triton(device)
    if not obstacle:
        from . import triton_decode

        obstacle = "" if dtype == torch.float16 else _without_dtype(device, dtype)
        if not obstacle:
            return Backend("triton", "one launch per weight", triton_decode.dequantize_into)
        if dtype == torch.bfloat16:
            return Backend("triton", f"bf16 is cast from fp16: {obstacle}", triton_decode.dequantize_via_fp16)
    if device.type in TRITON_DEVICES:
        log.warning("weights on %s are decoded in plain torch, which is slower: %s", device, obstacle)
    return Backend("torch", obstacle, torch_decode.dequantize_into)


def _without_dtype(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton, which works on a device, does not write a dtype there; empty where it does."""
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < BF16_CAPABILITY:
            return _too_old("Triton's bf16", BF16_CAPABILITY, capability)
    return _fails(device, dtype)


def _too_old(what: str, needed: tuple[int, int], found: tuple[int, int]) -> str:
    return "{} needs compute capability {}.{}, this device has {}.{}".format(what, *needed, *found)


@lru_cache(32)
def _without_triton(device: torch.device) -> str:
    """Why Triton is not used on a device; empty where it is."""
    if device.type not in TRITON_DEVICES:
        return f"plain torch serves {device.type} devices"
    if os.environ.get("NFQ_BACKEND") == "torch":
        return "NFQ_BACKEND=torch asks for it"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return _too_old("Triton", MIN_CAPABILITY, capability)
    return _fails(device)


def _fails(device: torch.device, dtype: torch.dtype = torch.float16) -> str:
    """Try Triton on a small buffer: it may lack a C compiler, or a driver. What went wrong; empty where nothing did."""
    from . import triton_decode

    fmt = nf_format(16)
    # Whatever device is torch's default, the levels 0 … 15, then a grid of exponent 0 and stride 1.
    with torch.device("cpu"):
        data = torch.arange(fmt.packed_bytes(PROBE_WEIGHTS), dtype=torch.int32).to(torch.uint8)
        data[: 2 * fmt.levels + 2] = torch.cat([torch.arange(16).half().view(torch.uint8), torch.tensor([0, 1])])
    data = data.to(device)
    wanted, found = (torch.empty(PROBE_WEIGHTS, dtype=dtype, device=device) for _ in range(2))
    torch_decode.dequantize_into(wanted, data, fmt)
    try:
        triton_decode.dequantize_into(found, data, fmt)
    except Exception as error:
        log.debug("Triton on %s", device, exc_info=True)
        return f"Triton fails here ({str(error).strip().partition(chr(10))[0] or 'without a reason'})"
    return "" if torch.equal(wanted, found) else "Triton computes other weights here"


def device_names() -> list[str]:
    """The names of all devices that torch sees."""
    names = ["cpu"]
    names += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu"):
        names += [f"xpu:{number}" for number in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def available() -> dict[str, Backend]:
    """The back-end of every device that torch sees, by its name; the reason tells of bf16 where that differs."""
    return {name: _for_both(torch.device(name)) for name in device_names()}


def _for_both(device: torch.device) -> Backend:
    """The back-end for fp16, and in its reason that for bf16 where it is another."""
    backend, other = backend_for(device), backend_for(device, torch.bfloat16)
    return backend if other.reason == backend.reason else replace(backend, reason=f"{backend.reason}; {other.reason}")
