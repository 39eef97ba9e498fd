"""The exact decode, ``fp16(fp32(level) * fp32(scale))``, in plain torch on any device.

With fp16 scales the product is exact in fp32, so only one rounding occurs. Other back-ends must return the same bits.

A chunk is decoded in three steps: unpack the codes, four at a time in int32 words; look up the levels of two
neighbouring weights at once in a table of pairs; multiply by the block scales. A CPU decodes chunks that fit its caches
into memory that it reuses. Every operation costs other devices a launch, so they decode a whole layer at once.

The table of pairs is gathered from the buffer's levels at every call, one launch for at most 65,536 pairs. Kept from
call to call it could become wrong unnoticed: torch does not see every change of a buffer's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from .common_levels import common_levels
from .layout import BLOCK, BlockFormat
from .scales import cached_tensor

THREAD_WEIGHTS = 1 << 19
"""Weights per chunk and CPU thread: enough to hide call overhead, few enough for the caches."""

CPU_CHUNK_WEIGHTS = 1 << 22
"""Most weights per chunk on a CPU, each with at most ten bytes of temporaries."""

DEVICE_CHUNK_WEIGHTS = 1 << 25
"""Most weights per chunk on other devices; the largest layer of SDXL has 29,491,200."""

CHUNKED_DEVICES = ("cpu",)
"""Device types that decode chunks into reused memory."""

MAX_TEMPORARY_BYTES = 5 * DEVICE_CHUNK_WEIGHTS
"""Most bytes of temporaries of a call on other devices, for weights of at most four chunks."""


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """Decode a packed buffer into `out`, without synchronising devices other than a CPU.

    Args:
        out: contiguous, one element per weight, one of `tensor.QUANTIZABLE_DTYPES` (the fp16 value is cast), on the
            device of `data`.
        data: the packed buffer, 1-D uint8.
        fmt: its format.
    """
    weights = out.numel()
    flat = out.view(-1)
    sections = fmt.sections_of(data, weights)
    scales = fmt.block_scales(data, weights).unsqueeze(1)
    planes = _words(data[sections.coarse : sections.fine]), _words(data[sections.fine : sections.scales])
    pairs = _pairs_of(fmt.levels_in(data, sections), fmt) if sections.coarse else _common_pairs(fmt, data.device)
    in_chunks = data.device.type in CHUNKED_DEVICES
    group = fmt.blocks_per_group
    wanted = min(THREAD_WEIGHTS * torch.get_num_threads(), CPU_CHUNK_WEIGHTS) if in_chunks else DEVICE_CHUNK_WEIGHTS
    chunk = max(1, wanted // BLOCK // group) * group
    buffers = _Buffers.reused(min(chunk, -(-len(scales) // group) * group), fmt) if in_chunks else _Buffers()
    for first in range(0, len(scales), chunk):
        blocks = min(chunk, len(scales) - first)
        part = flat[first * BLOCK : (first + blocks) * BLOCK]
        _decode_chunk(part, planes, pairs, scales[first : first + blocks], fmt, first, buffers)


def _words(plane: torch.Tensor) -> torch.Tensor:
    """A plane's groups as rows of sixteen int32 words."""
    return plane.view(torch.int32).view(-1, BLOCK // 4)


def _pairs_of(levels: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """For every number that `_pair_numbers` forms, two neighbouring weights' levels in one int32, 1-D."""
    return levels.index_select(0, _level_pairs(fmt, levels.device)).view(torch.int32)


@cached_tensor
def _common_pairs(fmt: BlockFormat, device: torch.device) -> torch.Tensor:
    """`_pairs_of` the common levels of a format."""
    return _pairs_of(common_levels(fmt.id, torch.device("cpu")), fmt).to(device)


@cached_tensor
def _level_pairs(fmt: BlockFormat, device: torch.device) -> torch.Tensor:
    """For every number that `_pair_numbers` forms from two neighbouring weights, both level numbers: int32, 1-D.

    Invalid bytes select some level too: a damaged buffer decodes to wrong weights, but reads nothing out of bounds.
    """
    if fmt.window:
        index = torch.arange(fmt.levels << fmt.code_bits, dtype=torch.int32, device="cpu")
        return torch.stack([index >> fmt.code_bits, index & (fmt.levels - 1)], dim=1).view(-1).to(device)
    span = _coarse_span(fmt)
    largest = (span << fmt.fine_bits) - 1
    index = torch.arange((largest << 8) + largest + 1, dtype=torch.int32, device="cpu")
    byte = torch.stack([index & 255, index >> 8], dim=1)
    code = (byte % span << fmt.fine_bits) | (byte // span)
    return code.clamp_(max=fmt.levels - 1).view(-1).to(device)


def _coarse_span(fmt: BlockFormat) -> int:
    """Power of two above the largest coarse digit that `_split` can unpack from any byte."""
    return 1 << (fmt.coarse_radix - 1).bit_length()


@cached_tensor
def _shifts(step: int, count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, step * count, step, dtype=torch.int32, device="cpu").unsqueeze(1).to(device)


def _decode_chunk(
    out: torch.Tensor,
    planes: tuple[torch.Tensor, torch.Tensor],
    pairs: torch.Tensor,
    scales: torch.Tensor,
    fmt: BlockFormat,
    first: int,
    buffers: _Buffers,
) -> None:
    """Decode the blocks from block `first` on into `out`, 1-D; `scales` has shape (blocks, 1)."""
    blocks = len(scales)
    index = _pair_numbers(planes, fmt, first, blocks, buffers)
    values = torch.index_select(pairs, 0, index, out=_part(buffers.values, len(index)))
    values = values.view(torch.float16).view(blocks, BLOCK)
    if out.dtype == torch.float16 and len(out) == blocks * BLOCK:
        torch.mul(values, scales, out=out.view(blocks, BLOCK))
    else:
        out.copy_(values.mul_(scales).view(-1)[: len(out)])


@dataclass(frozen=True)
class _Buffers:
    """Memory for the temporaries of every chunk of a call, 1-D; None: each operation allocates its result."""

    codes: torch.Tensor | None = None
    fine: torch.Tensor | None = None
    index: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @classmethod
    def reused(cls, blocks: int, fmt: BlockFormat) -> _Buffers:
        """Memory on the CPU for chunks of at most `blocks` blocks."""
        words = blocks * BLOCK // 4
        sizes = {"codes": words, "fine": words if fmt.fine_bits or fmt.window else 0}
        sizes |= {"index": 2 * words, "values": 2 * words}
        return cls(**{name: torch.empty(size, dtype=torch.int32, device="cpu") for name, size in sizes.items()})


def _part(buffer: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """The first elements of a buffer in a shape; None if there is no buffer."""
    return None if buffer is None else buffer[: prod(shape)].view(shape)


def _pair_numbers(
    planes: tuple[torch.Tensor, torch.Tensor], fmt: BlockFormat, first: int, blocks: int, buffers: _Buffers
) -> torch.Tensor:
    """The number in the table of pairs of every two neighbouring weights: int32 of shape (blocks * 32,).

    Args:
        planes: `_words` of the coarse and the fine plane.
        fmt: their format.
        first: first block, which begins a group.
        blocks: number of blocks.
        buffers: memory for the result and all else.
    """
    fine = None
    codes = _split(planes[0], fmt.coarse_radix, fmt.coarse_digits, first, blocks, buffers.codes)
    if fmt.fine_bits:
        fine = _split(planes[1], 1 << fmt.fine_bits, fmt.fine_digits, first, blocks, buffers.fine)
    # An int16 holds the codes of two neighbouring weights, the first in its low byte.
    if fmt.window:
        if fine is not None:
            torch.add(fine, codes, alpha=1 << fmt.fine_bits, out=codes)
        spare = fine if fine is not None else _part(buffers.fine, *codes.shape)
        spare = torch.empty_like(codes) if spare is None else spare
        numbers = _stream_pairs(codes.view(torch.int16), spare.view(torch.int16), fmt)
    else:
        if fine is not None:
            # A code byte is ``coarse + span * fine``: one operation, where shifting would take two.
            codes.add_(fine, alpha=_coarse_span(fmt))
        numbers = codes.view(torch.int16)
    numbers, index = numbers.view(-1), _part(buffers.index, blocks * BLOCK // 2)
    index = numbers.int() if index is None else index.copy_(numbers)
    # Where the number needs all 16 bits, sign extension made its upper half negative.
    return index.bitwise_and_(0xFFFF) if fmt.codes == 256 else index


def _stream_pairs(codes: torch.Tensor, spare: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """`_pair_numbers` for trellis formats: the stream's last ``window + code_bits`` bits.

    Args:
        codes: int16 of shape (blocks, 32), overwritten with the result.
        spare: as `codes`, overwritten.
        fmt: their format.
    """
    two = 2 * fmt.code_bits
    own = torch.bitwise_right_shift(codes, 8, out=spare).add_(codes, alpha=1 << fmt.code_bits)
    own.bitwise_and_((1 << two) - 1)
    before = -(-(fmt.window - fmt.code_bits) // two)
    pairs, stream = codes.view(-1), own.view(-1)
    # Ignores block borders, which is faster than row by row; the first columns of each block are corrected below.
    torch.add(stream[1:], stream[:-1], alpha=1 << two, out=pairs[1:])
    for back in range(2, before + 1):
        pairs[back:].add_(stream[:-back], alpha=1 << two * back)
    for column in range(before):
        torch.add(own[:, column], own[:, column - 1], alpha=1 << two, out=codes[:, column])
        for back in range(2, before + 1):
            codes[:, column].add_(own[:, column - back], alpha=1 << two * back)
    return codes.bitwise_and_((1 << fmt.window + fmt.code_bits) - 1)


def _split(
    plane: torch.Tensor, radix: int, digits: int, first: int, blocks: int, out: torch.Tensor | None
) -> torch.Tensor:
    """Unpack a plane's digits into bytes: int32 words of shape (blocks, 16), a view of `plane` if `digits` is 1.

    Args:
        plane: int32 of shape (groups, 16).
        radix: 6, or a power of two.
        digits: digits per byte.
        first: first block, which begins a group.
        blocks: number of blocks.
        out: memory for the result, int32, 1-D, for `blocks` rounded up to whole groups, or more; None: a new tensor.
    """
    groups = -(-blocks // digits)
    words = plane[first // digits : first // digits + groups]
    if digits == 1:
        return words
    out = _part(out, groups, digits, BLOCK // 4)
    if radix != 6:
        bits = radix.bit_length() - 1
        rows = torch.bitwise_right_shift(words.unsqueeze(1), _shifts(bits, digits, plane.device), out=out)
        rows.bitwise_and_((radix - 1) * 0x01010101)
    elif out is None:
        # Three operations, where arithmetic takes thirteen.
        table, index = _digits_base_6(plane.device), words.view(-1).view(torch.uint8).int()
        by_place = table.index_select(1, index).view(digits, groups, BLOCK)
        rows = by_place.transpose(0, 1).contiguous().view(torch.int32)
    else:
        rows = _split_base_6(words.unsqueeze(1), out)
    return rows.view(-1, BLOCK // 4)[:blocks]


@cached_tensor
def _digits_base_6(device: torch.device) -> torch.Tensor:
    """The three digits of every byte, the least significant first: int8 of shape (3, 256).

    The last one exceeds 5 in invalid bytes, as in `_split_base_6`.
    """
    byte = torch.arange(256, dtype=torch.int32, device="cpu")
    return torch.stack([byte % 6, byte // 6 % 6, byte // 36]).to(torch.int8).to(device)


def _split_base_6(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`_split` in arithmetic alone, which is faster on a CPU.

    Args:
        words: int32 of shape (groups, 1, 16).
        out: int32 of shape (groups, 3, 16), returned.
    """
    # Even and odd bytes apart, so that each has sixteen bits for the multiplication.
    rest = torch.bitwise_right_shift(words, _shifts(8, 2, words.device)).bitwise_and_(0x00FF00FF)
    places = out.shape[1]
    for place in range(places):
        digit, rest = rest, rest
        if place < places - 1:
            # Division by 6, rounded down: exact below 256.
            rest = (digit * 171).bitwise_right_shift_(10).bitwise_and_(0x003F003F)
            digit = digit.sub_(rest, alpha=6)
        torch.add(digit[:, 0], digit[:, 1], alpha=256, out=out[:, place])
    return out
