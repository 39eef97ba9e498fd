"""The CUDA source, compiled for a CPU, gives the bits of plain torch: every format, output dtype and kind of size.

Under sanitizers too: nothing is read or written outside a packed buffer, the table of levels and the output.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_source import SANITIZERS, compiled, need, record
from golden.make import NAMES, OWN, paths
from reference import COMMON_IDS
from samples import random_buffer

import nfq_core
from nfq_core.packed import cuda_decode, torch_decode
from nfq_core.packed.cuda_decode import OUTPUTS, blocks_per_unit, kernel_formats
from nfq_core.packed.formats import FORMATS, format_by_id
from nfq_core.packed.layout import BlockFormat

KERNELS = [fmt.id for fmt in kernel_formats()]

Case = tuple[torch.Tensor, BlockFormat, int]


def sizes(fmt: BlockFormat) -> list[int]:
    """Sizes around the borders of a thread's columns, a block, a group, a unit and a program."""
    unit = 64 * blocks_per_unit(fmt)
    program = unit * cuda_decode.THREADS * cuda_decode.COLUMNS // 64
    blocks = (fmt.coarse_digits, fmt.fine_digits or 1, 5)
    borders = {8, 64, unit, program, 2 * program, *(64 * count for count in blocks)}
    return sorted({1, 1000, *(border + change for border in borders for change in (-1, 0, 1, 17))})


def cases() -> list[Case]:
    """Random buffers with own and common levels, damaged ones, and the golden files."""
    found = []
    for format_id in KERNELS:
        fmt = format_by_id(format_id)
        for own_levels in (True, False) if format_id in COMMON_IDS else (True,):
            for weights in sizes(fmt):
                found.append((random_buffer(format_id, weights, seed=weights, own_levels=own_levels), fmt, weights))
        # Bytes that no writer makes; the scale parameters stay sound, because plain torch checks them.
        data = random_buffer(format_id, 5000)
        planes = data[fmt.sections(5000).coarse : -2]
        planes.copy_(torch.randint(256, planes.shape, generator=torch.Generator().manual_seed(1)))
        found.append((data, fmt, 5000))
    for name in NAMES:
        if name.removesuffix(OWN) in KERNELS:
            tensor = nfq_core.load(paths(name)[0])["weight"]
            found.append((tensor.data, tensor.format, tensor.numel()))
    return found


CASES = cases()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The program of an output dtype, compiled with these flags."""
    folder = tmp_path_factory.mktemp("decode")

    @cache
    def make(dtype: torch.dtype, *flags: str) -> Path:
        need(*flags)
        return compiled(folder / f"{OUTPUTS[dtype]}{len(flags)}", dtype, "decode_records.h", *flags)

    return make


@pytest.mark.parametrize("dtype", OUTPUTS, ids=OUTPUTS.get)
@pytest.mark.parametrize("flags", [(), SANITIZERS], ids=["plain", "sanitized"])
def test_the_kernels_equal_plain_torch_bit_for_bit(program, tmp_path: Path, dtype: torch.dtype, flags) -> None:
    (tmp_path / "input").write_bytes(b"".join(record(*case) for case in CASES))
    done = subprocess.run(
        [program(dtype, *flags), tmp_path / "input", tmp_path / "output"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.from_numpy(np.fromfile(tmp_path / "output", dtype=np.uint8))
    start = 0
    for data, fmt, weights in CASES:
        expected = torch.empty(weights, dtype=dtype)
        torch_decode.dequantize_into(expected, data, fmt)
        end = start + weights * dtype.itemsize
        assert torch.equal(found[start:end], expected.view(torch.uint8)), (fmt.id, weights)
        start = end + -weights % cuda_decode.COLUMNS * dtype.itemsize
    assert start == len(found)


def test_every_format_is_compared() -> None:
    assert {fmt.id for _, fmt, _ in CASES} == {fmt.id for fmt in FORMATS.values() if fmt.has_kernel}
    assert sum(1 for data, fmt, weights in CASES if not fmt.sections_of(data, weights).coarse) > len(COMMON_IDS)


def test_the_sanitizer_notices_a_read_past_the_end(program, tmp_path: Path) -> None:
    """A buffer one byte too short: the test above can fail."""
    fmt = format_by_id("t3w8_b64")
    data = random_buffer(fmt.id, 1000)
    short = record(data, fmt, 1000)[:-1].replace(len(data).to_bytes(8, "little"), (len(data) - 1).to_bytes(8, "little"))
    (tmp_path / "input").write_bytes(short)
    made = program(torch.float16, *SANITIZERS)
    done = subprocess.run([made, tmp_path / "input", tmp_path / "output"], capture_output=True, text=True)
    assert done.returncode and "heap-buffer-overflow" in done.stderr


def test_the_source_needs_no_header() -> None:
    assert "#include" not in re.sub(r"//.*", "", cuda_decode.source(torch.float16))
