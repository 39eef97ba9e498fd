"""The decode, defined exactly: ``fp16(fp32(level) * fp32(scale))``.

With fp16 scales the product is exact in fp32, so there is one rounding. This module is the reference in torch, for any
device; other back-ends must return the same bits.
"""

import torch

from .formats import BLOCK, SUPERBLOCK, BlockFormat, Scales, scale_table

CHUNK_GROUPS = 1024
"""Groups decoded at once: few enough for the temporaries to stay in cache, enough to hide the cost of calls."""


def head_levels(data: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """The levels in a packed buffer's head in the order of their codes, fp16 of shape (fmt.levels,)."""
    return data[: 2 * fmt.levels].view(torch.float16)


def scale_parameters(data: torch.Tensor, fmt: BlockFormat) -> tuple[int, int]:
    """Exponent and stride in the head of a packed buffer of an NF format, unchecked; see `scale_table`."""
    exponent, stride = data[2 * fmt.levels : 2 * fmt.levels + 2].view(torch.int8).tolist()
    return exponent, stride


def block_scales(data: torch.Tensor, fmt: BlockFormat, weights: int) -> torch.Tensor:
    """The scale of each block of a packed buffer, shape (blocks,): fp16, or fp32 for the article's formats.

    Raises:
        ValueError: the head's scale parameters are out of bounds.
    """
    sections = fmt.sections(weights)
    codes = data[sections.block_scales : sections.end]
    if fmt.scales is Scales.LOGARITHMIC:
        return scale_table(*scale_parameters(data, fmt)).to(data.device).index_select(0, codes.int())
    largest = data[sections.superblock_scales : sections.block_scales].view(torch.float32)
    per_block = largest.repeat_interleave(SUPERBLOCK)[: len(codes)]
    return per_block * codes.float().clamp(min=1e-12) / 255.0


def dequantize_into(out: torch.Tensor, data: torch.Tensor, fmt: BlockFormat) -> None:
    """Decode a whole packed buffer into `out`.

    Args:
        out: contiguous, any floating dtype (the fp16 value is cast), on the device of `data`; its number of elements is
            the number of weights.
        data: the packed buffer, 1-D uint8.
        fmt: its format.
    """
    weights = out.numel()
    flat = out.view(-1)
    sections = fmt.sections(weights)
    scales = block_scales(data, fmt, weights)
    coarse = data[sections.coarse : sections.fine].view(-1, BLOCK)
    fine = data[sections.fine : sections.superblock_scales].view(-1, BLOCK)
    tables = _level_tables(head_levels(data, fmt), fmt)
    chunk = fmt.blocks_per_group * CHUNK_GROUPS
    for first in range(0, len(scales), chunk):
        blocks = min(chunk, len(scales) - first)
        values = _decode_blocks(coarse, fine, scales, tables, fmt, first, blocks)
        start = first * BLOCK
        flat[start : start + blocks * BLOCK].copy_(values.view(-1)[: weights - start])


def _level_tables(levels: torch.Tensor, fmt: BlockFormat) -> list[torch.Tensor]:
    """For each digit of a coarse byte, the level named by index ``byte + 256 * fine``, fp16.

    Bytes and codes that no writer makes name some level too: a damaged buffer decodes to wrong weights, never beyond
    the table.
    """
    index = torch.arange(256 << fmt.fine_bits, device=levels.device)
    byte, fine = index & 255, index >> 8
    tables = []
    for place in range(fmt.coarse_digits):
        digit = byte // fmt.coarse_radix**place % fmt.coarse_radix
        code = (digit << fmt.fine_bits) | fine
        tables.append(levels.index_select(0, code.clamp(max=fmt.levels - 1)))
    return tables


def _decode_blocks(
    coarse: torch.Tensor,
    fine: torch.Tensor,
    scales: torch.Tensor,
    tables: list[torch.Tensor],
    fmt: BlockFormat,
    first: int,
    blocks: int,
) -> torch.Tensor:
    """Decode `blocks` blocks from block `first`, a multiple of `fmt.blocks_per_group`; fp16 of shape (blocks, 64)."""
    digits = fmt.coarse_digits
    groups = -(-blocks // digits)
    index = coarse[first // digits : first // digits + groups].int()[:, None, :]
    if fmt.fine_bits:
        index = index + (_fine_bits(fine, fmt, first, groups * digits).int() << 8)
    padded_scales = scales.new_zeros(groups * digits)
    padded_scales[:blocks] = scales[first : first + blocks]
    padded_scales = padded_scales.view(groups, digits, 1)
    values = torch.empty(groups, digits, BLOCK, dtype=torch.float16, device=coarse.device)
    for place, table in enumerate(tables):
        rows = index[:, place if fmt.fine_bits else 0]
        level = table.index_select(0, rows.reshape(-1)).view(groups, BLOCK)
        torch.mul(level, padded_scales[:, place], out=values[:, place])
    return values.view(-1, BLOCK)


def _fine_bits(fine: torch.Tensor, fmt: BlockFormat, first: int, blocks: int) -> torch.Tensor:
    """The fine digits of `blocks` blocks from block `first`, uint8 of shape (groups, coarse_digits, 64)."""
    per_byte = fmt.fine_digits
    groups = -(-blocks // per_byte)
    rows = fine[first // per_byte : first // per_byte + groups]
    shifts = torch.arange(0, 8, fmt.fine_bits, dtype=torch.uint8, device=fine.device)
    digits = (rows[:, None, :] >> shifts[:, None]) & ((1 << fmt.fine_bits) - 1)
    digits = digits.view(-1, BLOCK)
    if len(digits) < blocks:
        digits = torch.nn.functional.pad(digits, (0, 0, 0, blocks - len(digits)))
    return digits[:blocks].view(-1, fmt.coarse_digits, BLOCK)
