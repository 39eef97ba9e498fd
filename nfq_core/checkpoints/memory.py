"""Packed or dequantised weights in memory: how large both are, how much is free, which to choose; usable devices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import NFQError
from ..files.container import NFQFile
from ..packed.backends import device_names

MODES = ("packed", "resident", "auto")
"""Weights stay packed, are dequantised once when they are loaded, or whichever of both `choose` finds."""

ROOM = 2
"""How many times the dense weights must fit into free memory: as much again is left for activations."""

MEMINFO = Path("/proc/meminfo")

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""How the messages of torch's allocators begin to differ from those of all other errors of theirs."""


def needed_bytes(file: NFQFile, keys: Iterable[str] | None = None) -> tuple[int, int]:
    """Bytes that tensors of an open file take when they are loaded, kept ones included.

    Args:
        file: the file.
        keys: original names of the tensors; by default all.

    Returns:
        The bytes with every quantised weight dequantised in its recorded dtype, and with every one packed.
    """
    names = list(file.keys() if keys is None else keys)
    return sum(map(file.dense_bytes, names)), sum(map(file.packed_bytes, names))


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that could be allocated on a device now; None where nobody tells.

    For CUDA what the driver calls free and what torch holds without using it; for a CPU what Linux calls available.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _meminfo().get("MemAvailable") if device.type == "cpu" else None


def _meminfo() -> dict[str, int]:
    """Bytes that are available and free for swapping, by the names that Linux gives them; nothing elsewhere."""
    if not MEMINFO.exists():
        return {}
    fields = (line.partition(":") for line in MEMINFO.read_text(encoding="utf-8").splitlines())
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in fields if name in ("MemAvailable", "SwapFree")}


def refuse_beyond_memory(file: NFQFile, needed: int) -> None:
    """NFQError where a file needs more bytes than this machine can give, swap included: Linux would end the process.

    Nothing is checked where nobody tells how much that is.
    """
    told = _meminfo()
    if "MemAvailable" in told and needed > (there := told["MemAvailable"] + told.get("SwapFree", 0)):
        raise NFQError(
            f"{file.path}: there is not enough memory: it needs {needed:,} bytes, {there:,} can be had; free some, or "
            "take a file of fewer or smaller weights"
        )


def check_device(device: torch.device | str, dtype: torch.dtype = torch.uint8) -> None:
    """NFQError where torch has no such device here, or that knows no `dtype`."""
    try:
        # What a device cannot run may only show when it is waited for.
        torch.ones(1, dtype=dtype, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, ImportError):
        names = device_names()
        kinds = [name.partition(":")[0] for name in names]
        if str(device) not in names + kinds:
            raise NFQError(f"device '{device}' cannot be used here; this machine has {', '.join(names)}") from None
        kind = str(dtype).removeprefix("torch.")
        raise NFQError(f"device '{device}' cannot compute in {kind}; choose another, such as cpu") from None


def choose(mode: str, dense_bytes: int, packed_bytes: int, free: int | None) -> tuple[str, str]:
    """Whether weights are held "packed" or "resident", and why.

    Args:
        mode: one of MODES; the first two are followed as they are.
        dense_bytes: what the weights take dequantised, see `needed_bytes`.
        packed_bytes: what they take packed.
        free: free memory in bytes; None: not known.

    Raises:
        ValueError: `mode` is none of MODES.
    """
    if mode not in MODES:
        raise ValueError(f"memory must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "auto":
        return mode, "as asked for"
    if free is None:
        return "packed", "how much memory is free is not known"
    fits = free >= ROOM * dense_bytes
    reason = (
        f"{free / 1e9:.2f} GB are free, dequantised weights need {dense_bytes / 1e9:.2f} GB and as much again beside "
        f"them, packed ones {packed_bytes / 1e9:.2f} GB"
    )
    return ("resident" if fits else "packed"), reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's, of any device; torch has no one class for them."""
    told = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
    return told or isinstance(error, MemoryError)
