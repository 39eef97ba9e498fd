"""Rows of a packed matrix: decode chosen ones, such as the token embeddings of a prompt; split and join fused weights.

To decode rows, their blocks are gathered into a small packed buffer of the same format, which any back-end decodes. The
result therefore has the same bits as these rows of the whole decoded matrix. Blocks that share bytes of a plane are
gathered together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

from ..errors import NFQError
from .layout import BLOCK
from .packing import pack_codes, unpack_codes
from .tensor import NFTensor


def dequantize_rows(matrix: NFTensor, rows: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Decode some rows of a packed matrix.

    The whole matrix is decoded if its rows are not whole blocks, if its format is one of the article's, or if gathering
    would decode as many blocks.

    Args:
        matrix: shape (rows, columns).
        rows: indices of rows, int32 or int64, 1-D, on the device of `matrix`; they may repeat.
        dtype: see `NFTensor.dequantize`.

    Returns:
        The rows, shape (len(rows), columns).

    Raises:
        IndexError: an index is negative or too large. A CUDA device stops with its own error, as for any index.
    """
    count, columns = matrix.shape
    per_row, fmt = columns // BLOCK, matrix.format
    if columns % BLOCK or not fmt.has_kernel:
        return matrix.dequantize(dtype).index_select(0, rows)
    group = fmt.blocks_per_group
    # A row begins at most `group - gcd` blocks after the first block of a group.
    span = -(-(group - gcd(group, per_row) + per_row) // group)
    if len(rows) * span * group >= count * per_row:
        return matrix.dequantize(dtype).index_select(0, rows)
    sections, blocks = matrix.sections, count * per_row
    scales = matrix.data[sections.scales : sections.scales + blocks]
    # An index out of bounds fails here; the indices below are clamped, because the last row's groups may pass the end.
    scales.view(count, per_row)[:, 0].index_select(0, rows)
    first = rows.long() * per_row
    groups = first.div(group, rounding_mode="floor")

    def gathered(plane: torch.Tensor, width: int, in_group: int) -> torch.Tensor:
        """The bytes of `span` groups from each row's first one, of a plane with `in_group` rows of bytes per group."""
        lines = plane.view(-1, width)
        index = groups[:, None] * in_group + torch.arange(span * in_group, device=rows.device)
        return lines.index_select(0, index.clamp_(max=len(lines) - 1).view(-1)).view(-1)

    parts = [
        matrix.data[: sections.coarse],
        gathered(matrix.data[sections.coarse : sections.fine], BLOCK, group // fmt.coarse_digits),
        gathered(scales, 1, group),
        matrix.data[-2:],
    ]
    if fmt.fine_bits:
        parts.insert(2, gathered(matrix.data[sections.fine : sections.scales], BLOCK, group // fmt.fine_digits))
    small = NFTensor(torch.cat(parts), fmt, (len(rows), span * group, BLOCK), matrix.dtype).dequantize(dtype)
    if span * group > per_row:
        index = (first - groups * group)[:, None] + torch.arange(per_row, device=rows.device)
        small = small[torch.arange(len(rows), device=rows.device)[:, None], index]
    return small.view(len(rows), columns)


def split_rows(tensor: NFTensor, parts: int) -> list[NFTensor]:
    """Split a packed weight into parts of equally many rows, such as a fused projection of queries, keys and values.

    Codes, scales and levels are copied, so each part decodes to the bits of its rows in the whole weight.

    Args:
        tensor: shape (rows, …), on any device.
        parts: number of parts.

    Returns:
        The parts in order, each of shape (rows / parts, …) with a buffer of its own.

    Raises:
        NFQError: the parts are not whole rows and whole blocks, or the format is one of the article's.
    """
    rows, fmt = tensor.shape[0], tensor.format
    blocks, rest = divmod(tensor.numel(), parts * BLOCK)
    if rows % parts or rest or not fmt.has_kernel:
        raise NFQError(
            f"a packed {fmt.id} weight of shape {tuple(tensor.shape)} cannot be split into {parts} parts of whole rows "
            "and blocks; dequantise it first"
        )
    codes, scales = (values.split(blocks) for values in _codes_and_scales(tensor))
    return [_like(tensor, rows // parts, *own) for own in zip(codes, scales, strict=True)]


def join_rows(parts: Sequence[NFTensor]) -> NFTensor | None:
    """Undo `split_rows`: one packed weight with the rows of several, code by code.

    Args:
        parts: weights of the same format and number of columns, in order, on one device.

    Returns:
        None if they were not split from one weight: their levels or the parameters of their scales differ, so no packed
        weight has their values.
    """
    first = parts[0]
    fmt, shape = first.format, first.shape[1:]
    if not fmt.has_kernel or any(
        part.format != fmt
        or part.shape[1:] != shape
        or part.numel() % BLOCK
        or not torch.equal(part.data[: part.sections.coarse], first.data[: first.sections.coarse])
        or not torch.equal(part.data[-2:], first.data[-2:])
        for part in parts
    ):
        return None
    codes, scales = map(torch.cat, zip(*map(_codes_and_scales, parts), strict=True))
    return _like(first, sum(part.shape[0] for part in parts), codes, scales)


def _codes_and_scales(tensor: NFTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a weight of whole blocks, shape (blocks, BLOCK), and its blocks' coded scales, shape (blocks,)."""
    data, sections = tensor.data, tensor.sections
    planes = data[sections.coarse : sections.fine], data[sections.fine : sections.scales]
    return unpack_codes(*planes, tensor.numel() // BLOCK, tensor.format), data[sections.scales : -2]


def _like(tensor: NFTensor, rows: int, codes: torch.Tensor, scales: torch.Tensor) -> NFTensor:
    """A weight of other rows, with a weight's levels and parameters of scales; arguments as of `_codes_and_scales`."""
    head, tail = tensor.data[: tensor.sections.coarse], tensor.data[-2:]
    buffer = torch.cat([head, *pack_codes(codes, tensor.format), scales, tail])
    return NFTensor(buffer, tensor.format, (rows, *tensor.shape[1:]), tensor.dtype)
