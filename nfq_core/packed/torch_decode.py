"""The exact decode, ``fp16(fp32(level) * fp32(scale))``, in plain torch on any device.

With fp16 scales the product is exact in fp32, so only one rounding occurs. Other back-ends must return the same bits.

A chunk is decoded in three steps: unpack the codes, four at a time in int32 words; look up the levels of two
neighbouring weights at once in a table of pairs; multiply by the block scales.
"""

from __future__ import annotations

import torch

from .layout import BLOCK, BlockFormat
from .scales import cached_tensor

THREAD_WEIGHTS = 1 << 19
"""Weights per chunk and CPU thread: enough to hide call overhead, few enough for the caches."""

CHUNK_WEIGHTS = 1 << 22
"""Most weights per chunk, on any device."""

TEMPORARY_BYTES = 10
"""Most bytes of temporaries per weight of a chunk."""


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """Decode a packed buffer into `out`, with at most CHUNK_WEIGHTS · TEMPORARY_BYTES bytes of temporaries.

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
    coarse = _words(data[sections.coarse : sections.fine])
    fine = _words(data[sections.fine : sections.scales])
    pairs = fmt.levels_in(data, sections).index_select(0, _level_pairs(fmt, data.device)).view(torch.int32)
    group = fmt.blocks_per_group
    wanted = THREAD_WEIGHTS * torch.get_num_threads() if data.device.type == "cpu" else CHUNK_WEIGHTS
    chunk = max(1, min(wanted, CHUNK_WEIGHTS) // BLOCK // group) * group
    buffers = _Buffers(min(chunk, -(-len(scales) // group) * group), fmt, data.device)
    for first in range(0, len(scales), chunk):
        blocks = min(chunk, len(scales) - first)
        values = buffers.decode(coarse, fine, pairs, first, blocks)
        start = first * BLOCK
        part = flat[start : start + blocks * BLOCK]
        if out.dtype == torch.float16 and len(part) == blocks * BLOCK:
            torch.mul(values, scales[first : first + blocks], out=part.view(blocks, BLOCK))
        else:
            scaled = torch.mul(values, scales[first : first + blocks], out=values)
            part.copy_(scaled.view(-1)[: len(part)])


def _words(plane: torch.Tensor) -> torch.Tensor:
    """A plane's groups as rows of sixteen int32 words."""
    return plane.view(torch.int32).view(-1, BLOCK // 4)


@cached_tensor
def _level_pairs(fmt: BlockFormat, device: torch.device) -> torch.Tensor:
    """For every index that `_Buffers` forms from two neighbouring weights, both level numbers: int32, 1-D.

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
    """Power of two above the largest coarse digit that `_Buffers` can unpack from any byte."""
    return 1 << (fmt.coarse_radix - 1).bit_length()


@cached_tensor
def _shifts(step: int, count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, step * count, step, dtype=torch.int32, device="cpu").unsqueeze(1).to(device)


class _Buffers:
    """Temporaries of one call, reused for every chunk."""

    def __init__(self, blocks: int, fmt: BlockFormat, device: torch.device) -> None:
        self._format = fmt
        words = BLOCK // 4
        self._codes = torch.empty(blocks, words, dtype=torch.int32, device=device)
        second = blocks if fmt.fine_bits or fmt.window else 0
        self._fine = torch.empty(second, words, dtype=torch.int32, device=device)
        self._index = torch.empty(blocks * BLOCK // 2, dtype=torch.int32, device=device)
        self._pairs = torch.empty(blocks * BLOCK // 2, dtype=torch.int32, device=device)

    def decode(
        self, coarse: torch.Tensor, fine: torch.Tensor, pairs: torch.Tensor, first: int, blocks: int
    ) -> torch.Tensor:
        """Levels of `blocks` blocks from block `first`, which begins a group; fp16 of shape (blocks, 64)."""
        fmt = self._format
        _split(coarse, fmt.coarse_radix, fmt.coarse_digits, first, blocks, self._codes)
        if fmt.fine_bits:
            _split(fine, 1 << fmt.fine_bits, fmt.fine_digits, first, blocks, self._fine)
        index = self._index[: blocks * BLOCK // 2]
        index.copy_(self._stream_pairs(blocks) if fmt.window else self._code_pairs(blocks))
        if fmt.codes == 256:
            # The index needs all 16 bits, and sign extension made its upper half negative.
            index.bitwise_and_(0xFFFF)
        values = torch.index_select(pairs, 0, index, out=self._pairs[: blocks * BLOCK // 2])
        return values.view(torch.float16).view(blocks, BLOCK)

    def _code_pairs(self, blocks: int) -> torch.Tensor:
        """The index of every two neighbouring weights, for scalar formats: their two code bytes, int16, 1-D.

        A code byte is ``coarse + span * fine``: one operation, where shifting would take two.
        """
        codes = self._codes[:blocks]
        if self._format.fine_bits:
            codes.add_(self._fine[:blocks], alpha=_coarse_span(self._format))
        return codes.view(torch.int16).view(-1)

    def _stream_pairs(self, blocks: int) -> torch.Tensor:
        """The same for trellis formats: the stream's last ``window + code_bits`` bits, int16, 1-D."""
        fmt = self._format
        codes, spare = (buffer[:blocks].view(torch.int16).view(-1) for buffer in (self._codes, self._fine))
        if fmt.fine_bits:
            torch.add(spare, codes, alpha=1 << fmt.fine_bits, out=codes)
        # An int16 holds the codes of two neighbouring weights, the first in its low byte.
        two = 2 * fmt.code_bits
        own = torch.bitwise_right_shift(codes, 8, out=spare).add_(codes, alpha=1 << fmt.code_bits)
        own.bitwise_and_((1 << two) - 1)
        before = -(-(fmt.window - fmt.code_bits) // two)
        pairs = codes
        # Ignores block borders, which is faster than row by row; the first columns of each block are corrected below.
        torch.add(own[1:], own[:-1], alpha=1 << two, out=pairs[1:])
        for back in range(2, before + 1):
            pairs[back:].add_(own[:-back], alpha=1 << two * back)
        own, rows = own.view(blocks, -1), pairs.view(blocks, -1)
        for column in range(before):
            rows[:, column] = own[:, column]
            for back in range(1, before + 1):
                rows[:, column].add_(own[:, column - back], alpha=1 << two * back)
        return pairs.bitwise_and_((1 << fmt.window + fmt.code_bits) - 1)


def _split(plane: torch.Tensor, radix: int, digits: int, first: int, blocks: int, out: torch.Tensor) -> None:
    """Unpack a plane's digits, four bytes at a time in int32 words, into one row of `out` per block.

    Args:
        plane: int32 of shape (groups, 16).
        radix: 6, or a power of two.
        digits: digits per byte.
        first: first block, which begins a group.
        blocks: number of blocks.
        out: int32 of shape (blocks rounded up to whole groups, or more, 16).
    """
    groups = -(-blocks // digits)
    words = plane[first // digits : first // digits + groups].unsqueeze(1)
    rows = out[: groups * digits].view(groups, digits, -1)
    if digits == 1:
        rows.copy_(words)
        return
    if radix != 6:
        bits = radix.bit_length() - 1
        torch.bitwise_right_shift(words, _shifts(bits, digits, plane.device), out=rows)
        rows.bitwise_and_((radix - 1) * 0x01010101)
        return
    # Even and odd bytes apart, so that each has sixteen bits for the multiplication.
    rest = torch.bitwise_right_shift(words, _shifts(8, 2, plane.device)).bitwise_and_(0x00FF00FF)
    for place in range(digits):
        digit, rest = rest, rest
        if place < digits - 1:
            # Division by 6, rounded down: exact below 256.
            rest = (digit * 171).bitwise_right_shift_(10).bitwise_and_(0x003F003F)
            digit = digit.sub_(rest, alpha=6)
        torch.add(digit[:, 0], digit[:, 1], alpha=256, out=rows[:, place])
