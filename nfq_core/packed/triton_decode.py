"""The decode as one Triton kernel launch per weight, with the same bits as `torch_decode`.

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before the import, the kernel runs on a CPU, slowly.
"""

# No `from __future__ import annotations`: Triton 3.0's interpreter recognises constants by their annotations.
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .layout import BLOCK, BlockFormat
from .scales import scale_mantissas

BLOCKS_PER_PROGRAM = 32
"""Approximate number of blocks per program, rounded to a power of two of coarse groups."""

WARPS = 4


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """`torch_decode.dequantize_into` in one launch, without synchronising.

    Scale parameters are not checked here; `NFTensor.validate` checks them when a file is read.
    """
    weights = out.numel()
    sections = fmt.sections_of(data, weights)
    groups = (sections.fine - sections.coarse) // BLOCK
    programs = -(-groups // groups_per_program(fmt))
    with _current(data.device):
        _decode[(programs,)](
            data,
            fmt.levels_in(data, sections),
            scale_mantissas(data.device),
            out.view(-1),
            weights,
            groups,
            sections.coarse,
            sections.fine,
            sections.scales,
            **constants(fmt),
            num_warps=WARPS,
        )


def groups_per_program(fmt: BlockFormat) -> int:
    """Groups of the coarse plane per program, a power of two."""
    return BLOCKS_PER_PROGRAM // (2 if fmt.coarse_digits < 4 else 4)


@lru_cache(32)
def constants(fmt: BlockFormat) -> dict[str, int | float | bool]:
    """Compile-time constants of the kernel; cached, do not modify."""
    return {
        "LEVELS": fmt.levels,
        "RADIX": fmt.coarse_radix,
        "DIGITS": fmt.coarse_digits,
        "FINE_BITS": fmt.fine_bits,
        "WINDOW": fmt.window,
        "BLOCK": BLOCK,
        "GROUPS": groups_per_program(fmt),
    }


def _current(device: torch.device) -> AbstractContextManager:
    """Context that makes the data's device current, because Triton launches on the current device."""
    if device.type == "cpu" or device.index == (devices := getattr(torch, device.type)).current_device():
        return nullcontext()
    return devices.device(device)


@triton.jit
def _decode(
    data,
    levels,
    mantissas,
    out,
    weights,
    groups,
    coarse,
    fine,
    scales,
    LEVELS: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    FINE_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    rest = tl.load(data + coarse + group * BLOCK + column, mask=group < groups, other=0).to(tl.int32)
    parameters = data + scales + (weights + BLOCK - 1) // BLOCK
    exponent = tl.load(parameters).to(tl.int8, bitcast=True).to(tl.int32)
    stride = tl.load(parameters + 1).to(tl.int32)
    for place in tl.static_range(DIGITS):
        block = group * DIGITS + place
        inside = block * BLOCK < weights
        if WINDOW > 0:
            number = _stream(data, coarse, fine, group, block, place, column, inside, RADIX, FINE_BITS, WINDOW, BLOCK)
        elif RADIX == 6:
            # Exact below 256.
            sixth = (rest * 171) >> 10
            number = rest - 6 * sixth
            rest = sixth
        else:
            number = rest & (RADIX - 1)
            rest = rest // RADIX
        if FINE_BITS > 0 and WINDOW == 0:
            number = _with_fine(data, fine, number, block, column, inside, FINE_BITS, BLOCK)
        level = tl.load(levels + tl.minimum(number, LEVELS - 1)).to(tl.float32)
        scale_code = tl.load(data + scales + block, mask=inside, other=0)
        magnitude = (scale_code & 127).to(tl.int32)
        step = (magnitude - 1) * stride
        fraction = tl.load(mantissas + (step & 15))
        bits = ((exponent + 15 + (step >> 4)) << 10) + fraction
        bits = tl.where(magnitude == 0, 0, bits | ((scale_code & 128).to(tl.int32) << 8))
        scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        value = (level * scale).to(tl.float16)
        position = block * BLOCK + column
        tl.store(out + position, value.to(out.dtype.element_ty), mask=position < weights)


@triton.jit
def _with_fine(data, fine, coarse_digit, block, column, inside, FINE_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes from coarse digits and the fine plane."""
    per_byte: tl.constexpr = 8 // FINE_BITS
    byte = tl.load(data + fine + block // per_byte * BLOCK + column, mask=inside, other=0).to(tl.int32)
    return (coarse_digit << FINE_BITS) | ((byte >> (block % per_byte * FINE_BITS)) & ((1 << FINE_BITS) - 1))


@triton.jit
def _stream(
    data,
    coarse,
    fine,
    group,
    block,
    place,
    column,
    inside,
    RADIX: tl.constexpr,
    FINE_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Level numbers: the last WINDOW bits of each block's stream up to each weight. RADIX is 4 or 16."""
    digit_bits: tl.constexpr = 2 if RADIX == 4 else 4
    code_bits: tl.constexpr = digit_bits + FINE_BITS
    number = tl.zeros_like(group + column)
    for back in tl.static_range((WINDOW + code_bits - 1) // code_bits):
        earlier = (column - back) & (BLOCK - 1)
        byte = tl.load(data + coarse + group * BLOCK + earlier, mask=inside, other=0).to(tl.int32)
        code = (byte >> (place * digit_bits)) & (RADIX - 1)
        if FINE_BITS > 0:
            code = _with_fine(data, fine, code, block, earlier, inside, FINE_BITS, BLOCK)
        number |= code << (back * code_bits)
    return number & ((1 << WINDOW) - 1)
