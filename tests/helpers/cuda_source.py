"""The CUDA source compiled for a CPU: see `cuda_on_cpu.h`."""

from __future__ import annotations

import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import torch

from nfq_core.packed import cuda_decode
from nfq_core.packed.layout import BlockFormat

HELPERS = Path(__file__).resolve().parent

FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{HELPERS}")
"""The kernels read words from bytes, which CUDA allows and C++ forbids."""

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


@cache
def missing(*flags: str) -> str:
    """Why g++ cannot make programs with these flags; empty if it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    command = ["g++", *flags, "-x", "c++", "-", "-o", "/dev/null"]
    made = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
    return f"g++ cannot link with {' '.join(flags)}" if made.returncode else ""


def need(*flags: str) -> None:
    """Skip the test if g++ cannot make programs with these flags."""
    import pytest

    if reason := missing(*flags):
        pytest.skip(reason)


def compiled(target: Path, dtype: torch.dtype, after: str, *flags: str) -> Path:
    """Compile the kernels of an output dtype, and a header after them, to `target`."""
    text = f'#include "cuda_on_cpu.h"\n{cuda_decode.source(dtype)}\n#include "{after}"\n'
    made = subprocess.run(
        ["g++", *FLAGS, *flags, "-x", "c++", "-", "-o", str(target)], input=text, text=True, capture_output=True
    )
    assert made.returncode == 0, made.stderr[:4000]
    return target


def record(data: torch.Tensor, fmt: BlockFormat, weights: int) -> bytes:
    """A packed buffer as `decode_records.h` reads it."""
    sections = fmt.sections_of(data, weights)
    levels = b"" if sections.coarse else fmt.levels_in(data, sections).numpy().tobytes()
    whole = -(-weights // cuda_decode.COLUMNS) * cuda_decode.COLUMNS
    numbers = (whole, cuda_decode.programs(fmt, weights), len(levels), len(data))
    offsets = (sections.coarse, sections.fine, sections.scales)
    return struct.pack("<16s7Q", fmt.id.encode(), *numbers, *offsets) + levels + data.numpy().tobytes()
