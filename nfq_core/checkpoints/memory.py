"""Memory of packed and dequantised weights, free memory, the choice between both modes, and usable devices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import NFQError
from ..files.container import NFQFile
from ..packed.backends import device_names
from ..sizes import size_in_words

MODES = ("packed", "resident", "auto")
"""Weights stay packed, are dequantised once at load, or `choose_memory_mode` chooses between the two."""

ROOM = 2
"""How many times the dequantised weights must fit into free memory; the second half is left for activations."""

MEMINFO = Path("/proc/meminfo")

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""Texts by which out-of-memory messages of torch's allocators differ from its other errors."""


def needed_bytes(file: NFQFile, keys: Iterable[str] | None = None) -> tuple[int, int]:
    """Bytes that the tensors of an open file take in memory, kept ones included.

    Args:
        file: the file.
        keys: original names of the tensors; by default all.

    Returns:
        Bytes with all quantised weights dequantised to their recorded dtype, and bytes with all of them packed.
    """
    names = list(file.keys() if keys is None else keys)
    return sum(map(file.dense_bytes, names)), sum(map(file.packed_bytes, names))


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that can be allocated on a device now; None if unknown.

    For CUDA: what the driver reports as free, plus memory that torch has reserved but not allocated. For a CPU: what
    Linux reports as available.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _meminfo().get("MemAvailable") if device.type == "cpu" else None


def _meminfo() -> dict[str, int]:
    """Available memory and free swap in bytes, by their names in Linux; empty on other systems."""
    if not MEMINFO.exists():
        return {}
    fields = (line.partition(":") for line in MEMINFO.read_text(encoding="utf-8").splitlines())
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in fields if name in ("MemAvailable", "SwapFree")}


def refuse_beyond_memory(file: NFQFile, needed: int) -> None:
    """Raise NFQError if a file needs more bytes than memory and swap have: Linux would kill the process.

    Nothing is checked on other systems.
    """
    memory = _meminfo()
    if "MemAvailable" in memory and needed > (available := memory["MemAvailable"] + memory.get("SwapFree", 0)):
        raise NFQError(
            f"{file.path}: there is not enough memory: it needs {size_in_words(needed)}, "
            f"{size_in_words(available)} are available; free some, or use a smaller file"
        )


def check_device(device: torch.device | str, dtype: torch.dtype = torch.uint8) -> None:
    """Raise NFQError if torch cannot use the device here, or the device does not support `dtype`.

    Torch's own error is raised if the device is out of memory.
    """
    try:
        # Some failures only show when the result is read.
        torch.ones(1, dtype=dtype, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        names = device_names()
        kinds = [name.partition(":")[0] for name in names]
        if str(device) not in names + kinds:
            raise NFQError(f"device '{device}' cannot be used here; this machine has {', '.join(names)}") from None
        kind = str(dtype).removeprefix("torch.")
        raise NFQError(f"device '{device}' cannot compute in {kind}; choose another, such as cpu") from None


def choose_memory_mode(mode: str, dense_bytes: int, packed_bytes: int, free: int | None) -> tuple[str, str]:
    """Choose whether weights are "packed" or "resident" in memory.

    Args:
        mode: one of MODES; only "auto" leaves a choice.
        dense_bytes: bytes of the dequantised weights, see `needed_bytes`.
        packed_bytes: bytes of the packed weights.
        free: free memory in bytes; None if unknown.

    Returns:
        The mode, and the reason for it.

    Raises:
        ValueError: `mode` is not one of MODES.
    """
    if mode not in MODES:
        raise ValueError(f"memory must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "auto":
        return mode, "as requested"
    if free is None:
        return "packed", "the free memory is unknown"
    fits = free >= ROOM * dense_bytes
    reason = (
        f"{size_in_words(free)} are free; dequantised weights need {size_in_words(dense_bytes)} and the same again for "
        f"activations, packed weights {size_in_words(packed_bytes)}"
    )
    return ("resident" if fits else "packed"), reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out on any device; torch has no common class for these errors."""
    if isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY):
        return True
    return isinstance(error, MemoryError)


def out_of_memory_message(path: Path, device: torch.device, mode: str, dense_bytes: int, packed_bytes: int) -> str:
    """The message of the error when a file's tensors do not fit on a device."""
    needed, advice = size_in_words(packed_bytes), "free some, or use a smaller file"
    if mode == "resident":
        advice = f'free some, or load with memory="packed", which needs {needed}'
        needed = size_in_words(dense_bytes)
    return f"{path}: there is not enough memory on {device}: {mode} weights need {needed}; {advice}"
