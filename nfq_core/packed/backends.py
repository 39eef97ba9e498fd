"""Decode back-ends: chosen per device before the call, with a reason to show to users."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec

import torch

from . import torch_decode
from .formats import nf_format
from .layout import BlockFormat

log = logging.getLogger("nfq")

TRITON_DEVICES = ("cuda", "xpu")
"""Device types that Triton compiles for; ROCm devices are called cuda too."""

MIN_CAPABILITY = (7, 0)
"""Oldest compute capability that the tests compile the kernel for."""

BF16_CAPABILITY = (8, 0)
"""Oldest compute capability with an instruction that rounds to bf16, which Triton needs."""

PROBE_WEIGHTS = 64 * 300
"""Weights decoded to test whether Triton works."""

MAX_WEIGHTS = 2**31 - 2**20
"""Largest tensor, in weights, for the Triton kernel, whose indices have 32 bits."""


@dataclass(frozen=True)
class Backend:
    """The code that decodes on a device, and why it was chosen."""

    name: str
    reason: str
    dequantize_into: Callable[[torch.Tensor, torch.Tensor, BlockFormat], None]
    """As `torch_decode.dequantize_into`; every back-end returns the same bits."""


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """`torch_decode.dequantize_into`, with the back-end for the device and dtype."""
    if fmt.has_kernel and out.numel() <= MAX_WEIGHTS:
        backend_for(data.device, out.dtype).dequantize_into(out, data, fmt)
    else:
        torch_decode.dequantize_into(out, data, fmt)


@lru_cache(32)
def backend_for(device: torch.device, dtype: torch.dtype = torch.float16) -> Backend:
    """The back-end for a device and output dtype; logs once why a GPU cannot use Triton."""
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
    """Why Triton, which works on the device, cannot write this dtype; empty if it can."""
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < BF16_CAPABILITY:
            return _too_old("Triton's bf16", BF16_CAPABILITY, capability)
    return _fails(device, dtype)


def _too_old(feature: str, needed: tuple[int, int], actual: tuple[int, int]) -> str:
    return "{} needs compute capability {}.{}, this device has {}.{}".format(feature, *needed, *actual)


@lru_cache(32)
def _without_triton(device: torch.device) -> str:
    """Why Triton is not used on a device; empty if it is."""
    if device.type not in TRITON_DEVICES:
        return f"plain torch serves {device.type} devices"
    if os.environ.get("NFQ_BACKEND") == "torch":
        return "requested by NFQ_BACKEND=torch"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return _too_old("Triton", MIN_CAPABILITY, capability)
    return _fails(device)


def _fails(device: torch.device, dtype: torch.dtype = torch.float16) -> str:
    """Test Triton on a small buffer, since it may lack a C compiler or a driver.

    Returns:
        Why it fails; empty if it works.
    """
    from . import triton_decode

    fmt = nf_format(16)
    # The levels 0 … 15, scale exponent 0, scale stride 1. On the CPU, whatever torch's default is.
    with torch.device("cpu"):
        data = torch.arange(fmt.packed_bytes(PROBE_WEIGHTS), dtype=torch.int32).to(torch.uint8)
        data[: 2 * fmt.levels] = torch.arange(16).half().view(torch.uint8)
        data[-2:] = torch.tensor([0, 1])
    data = data.to(device)
    expected, actual = (torch.empty(PROBE_WEIGHTS, dtype=dtype, device=device) for _ in range(2))
    torch_decode.dequantize_into(expected, data, fmt)
    try:
        triton_decode.dequantize_into(actual, data, fmt)
    except Exception as error:
        log.debug("Triton on %s", device, exc_info=True)
        return f"Triton fails on this device ({str(error).strip().partition(chr(10))[0] or type(error).__name__})"
    return "" if torch.equal(expected, actual) else "Triton computes wrong weights on this device"


def device_names() -> list[str]:
    """Names of all devices that torch can use."""
    names = ["cpu"]
    names += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu"):
        names += [f"xpu:{number}" for number in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def available() -> dict[str, Backend]:
    """The back-end of every device that torch can use, by device name; see `_for_both`."""
    return {name: _for_both(torch.device(name)) for name in device_names()}


def _for_both(device: torch.device) -> Backend:
    """The back-end for fp16; its reason also covers bf16 if that differs."""
    backend, other = backend_for(device), backend_for(device, torch.bfloat16)
    return backend if other.reason == backend.reason else replace(backend, reason=f"{backend.reason}; {other.reason}")
