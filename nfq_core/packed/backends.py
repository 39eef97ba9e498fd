"""Decode back-ends: chosen per device before the call, with a reason to show to users.

NVIDIA devices use a CUDA kernel that is compiled at run time. AMD (ROCm) and Intel devices use a Triton kernel where
Triton is installed, as do NVIDIA devices whose CUDA kernel cannot be used. Plain torch serves all other devices.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec

import torch

from . import cuda_decode, torch_decode
from .cuda_driver import DriverError
from .layout import BLOCK, BlockFormat
from .nvrtc import NvrtcError

log = logging.getLogger("nfq")

KERNEL_DEVICES = ("cuda", "xpu")
"""Device types for which there is a kernel; ROCm devices are called cuda too."""

PROBE_WEIGHTS = BLOCK * 400 + 8
"""Weights decoded per format to test a kernel: several thread blocks, the last one incomplete."""

MAX_WEIGHTS = 2**31 - 2**20
"""Largest tensor, in weights, for the kernels, whose indices have 32 bits."""

Decode = Callable[[torch.Tensor, torch.Tensor, BlockFormat], None]
"""As `torch_decode.dequantize_into`."""

Load = Callable[[torch.device, torch.dtype], tuple[Decode, str]]
"""Makes a kernel ready for a device and an output dtype; returns it, and how it works in words."""

_choosing = threading.RLock()
"""Held while a back-end is chosen, so that a kernel is compiled and its failure logged once."""


@dataclass(frozen=True)
class Backend:
    """The code that decodes on a device, and why it was chosen."""

    name: str
    reason: str
    dequantize_into: Decode
    """Every back-end returns the same bits."""


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """`torch_decode.dequantize_into`, with the back-end for the device and dtype."""
    if fmt.has_kernel and out.numel() <= MAX_WEIGHTS:
        backend_for(data.device, out.dtype).dequantize_into(out, data, fmt)
    else:
        torch_decode.dequantize_into(out, data, fmt)


def backend_for(device: torch.device, dtype: torch.dtype = torch.float16) -> Backend:
    """The back-end for a device and output dtype; logs once what decodes on a GPU, and a warning if it is plain torch.

    The first call for a GPU compiles and tests its kernels, which takes seconds and waits for the device.

    Raises:
        RuntimeError: the first call happens while a CUDA graph is captured.
    """
    device = _with_index(device)
    with _choosing:
        return _choose(device, dtype)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Start `backend_for` in a thread, so that the first decode does not wait for the compiler.

    An error is left to the first decode, which meets it again.
    """

    def choose(device: torch.device) -> None:
        with suppress(Exception):
            backend_for(device, dtype)

    if device.type in KERNEL_DEVICES:
        # The current device is a thread's own.
        threading.Thread(target=choose, args=(_with_index(device),), name="nfq warm-up", daemon=True).start()


def _with_index(device: torch.device) -> torch.device:
    """A GPU without an index is the current one."""
    if device.type not in KERNEL_DEVICES or device.index is not None:
        return device
    return torch.device(device.type, getattr(torch, device.type).current_device())


@lru_cache(32)
def _choose(device: torch.device, dtype: torch.dtype) -> Backend:
    obstacle = _without_kernel(device)
    obstacles = [obstacle] if obstacle else []
    for name, load in () if obstacle else _kernels(device):
        if _is_cuda(device) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("dequantise a weight to this dtype once before you capture a CUDA graph")
        halves, reason = _tested(name, load, device, torch.float16)
        if halves is None:
            obstacles.append(reason)
            continue
        decode, reason = _tested(name, load, device, dtype)
        if decode is None:
            decode, reason = via_fp16(halves), f"{str(dtype)[6:]} is cast from fp16: {reason}"
        reason = "; ".join([reason, *obstacles])
        log.info("weights on %s are decoded to %s by the %s kernel: %s", device, str(dtype)[6:], name, reason)
        return Backend(name, reason, decode)
    reason = "; ".join(obstacles)
    if device.type in KERNEL_DEVICES:
        _warn_once(device, reason)
    return Backend("torch", reason, torch_decode.dequantize_into)


@lru_cache(32)
def _warn_once(device: torch.device, reason: str) -> None:
    """Warn for all dtypes together."""
    log.warning("weights on %s are decoded in plain torch, which is slower: %s", device, reason)


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_nvidia(device: torch.device) -> bool:
    return _is_cuda(device) and torch.version.hip is None


def _without_kernel(device: torch.device) -> str:
    """Why no kernel is tried on a device; empty if one is."""
    if device.type not in KERNEL_DEVICES:
        return f"plain torch serves {device.type} devices"
    if os.environ.get("NFQ_BACKEND") == "torch":
        return "requested by NFQ_BACKEND=torch"
    return "" if _kernels(device) else "Triton is not installed"


def _kernels(device: torch.device) -> list[tuple[str, Load]]:
    """The kernels to try on a device, in order: their names and what loads them.

    Triton brings a compiler of its own, so that it can serve an NVIDIA device whose NVRTC is missing or broken.
    """
    triton = [("triton", _load_triton)] if find_spec("triton") else []
    return [("cuda", _load_cuda), *triton] if _is_nvidia(device) else triton


def _load_cuda(device: torch.device, dtype: torch.dtype) -> tuple[Decode, str]:
    decoder, words = cuda_decode.load(device, dtype)
    return decoder.dequantize_into, f"one launch per weight, {words}"


def _load_triton(device: torch.device, dtype: torch.dtype) -> tuple[Decode, str]:
    from . import triton_decode

    return triton_decode.dequantize_into, "one launch per weight"


@lru_cache(32)
def _tested(name: str, load: Load, device: torch.device, dtype: torch.dtype) -> tuple[Decode | None, str]:
    """Load a kernel, and compare it with plain torch on small buffers of all formats.

    Returns:
        The kernel and why it is used, or None and why it cannot be used.
    """
    try:
        decode, reason = load(device, dtype)
        wrong = _first_difference(decode, device, dtype)
    except torch.cuda.OutOfMemoryError:
        # Says nothing about the kernel.
        raise
    except (NvrtcError, DriverError) as error:
        return None, str(error)
    except Exception as error:
        log.debug("%s on %s", name, device, exc_info=True)
        line = str(error).strip().partition(chr(10))[0] or type(error).__name__
        return None, f"the {name} kernel fails on this device ({line})"
    return (None, f"the {name} kernel computes wrong weights on this device ({wrong})") if wrong else (decode, reason)


def _first_difference(decode: Decode, device: torch.device, dtype: torch.dtype) -> str:
    """The id of the first format that a kernel decodes otherwise than plain torch; empty if there is none."""
    for fmt in cuda_decode.kernel_formats():
        data = _probe(fmt).to(device)
        expected, actual = (torch.empty(PROBE_WEIGHTS, dtype=dtype, device=device) for _ in range(2))
        torch_decode.dequantize_into(expected, data, fmt)
        decode(actual, data, fmt)
        if not torch.equal(expected.view(torch.uint8), actual.view(torch.uint8)):
            return fmt.id
    return ""


def _probe(fmt: BlockFormat) -> torch.Tensor:
    """A sound packed buffer of PROBE_WEIGHTS weights on the CPU, with common levels where the format has them."""
    sections = fmt.sections(PROBE_WEIGHTS, own_levels=not fmt.has_common_levels)
    # On the CPU, whatever torch's default is.
    with torch.device("cpu"):
        # Every byte, in an order that hardly repeats from block to block.
        values = torch.arange(sections.end) * 167 % 257
        values[sections.coarse : sections.fine] %= fmt.coarse_radix**fmt.coarse_digits
        # The scales' exponent, as a signed byte, and their stride.
        values[-2:] = torch.tensor([256 - 8, 1])
        data = values.to(torch.uint8)
        if sections.coarse:
            data[: 2 * fmt.levels] = torch.linspace(-1, 1, fmt.levels).half().view(torch.uint8)
    return data


def via_fp16(decode: Decode) -> Decode:
    """A decode to any dtype: to fp16, then a cast; in place where the dtype has two bytes.

    In place is safe because torch reads each element before it overwrites it.
    """

    def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
        halves = out.view(torch.float16) if out.dtype.itemsize == 2 else torch.empty_like(out, dtype=torch.float16)
        decode(halves, data, fmt)
        out.copy_(halves)

    return dequantize_into


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
