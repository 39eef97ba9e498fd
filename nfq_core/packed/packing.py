"""Packing of codes into the coarse and fine planes of a packed buffer, and back.

A plane with d digits per byte has one group of 64 bytes for every d consecutive blocks. Byte j of group g holds the
digits of weight j of the blocks g·d … g·d + d − 1, the first block in the least significant digit. Blocks past the end
have digit 0.
"""

import torch

from .layout import BLOCK, BlockFormat


def pack_codes(codes: torch.Tensor, fmt: BlockFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack codes, uint8 of shape (blocks, 64) and below `fmt.codes`, into the two planes.

    Returns:
        The coarse and the fine plane, 1-D uint8; the fine plane is empty if the format has none.
    """
    if not fmt.fine_bits:
        return _pack_plane(codes, fmt.coarse_radix, fmt.coarse_digits), codes.new_empty(0)
    coarse = _pack_plane(codes >> fmt.fine_bits, fmt.coarse_radix, fmt.coarse_digits)
    fine = _pack_plane(codes & ((1 << fmt.fine_bits) - 1), 1 << fmt.fine_bits, fmt.fine_digits)
    return coarse, fine


def unpack_codes(coarse: torch.Tensor, fine: torch.Tensor, blocks: int, fmt: BlockFormat) -> torch.Tensor:
    """Codes of the first `blocks` blocks of two planes, uint8 of shape (blocks, 64); inverse of `pack_codes`."""
    codes = _unpack_plane(coarse, fmt.coarse_radix, fmt.coarse_digits)[:blocks]
    if fmt.fine_bits:
        codes = (codes << fmt.fine_bits) | _unpack_plane(fine, 1 << fmt.fine_bits, fmt.fine_digits)[:blocks]
    return codes


def _pack_plane(digits: torch.Tensor, radix: int, per_byte: int) -> torch.Tensor:
    missing = -digits.shape[0] % per_byte
    if missing:
        digits = torch.cat([digits, digits.new_zeros(missing, BLOCK)])
    groups = digits.view(-1, per_byte, BLOCK)
    plane = groups[:, per_byte - 1].clone()
    for place in reversed(range(per_byte - 1)):
        plane.mul_(radix).add_(groups[:, place])
    return plane.view(-1)


def _unpack_plane(plane: torch.Tensor, radix: int, per_byte: int) -> torch.Tensor:
    if per_byte == 1:
        return plane.view(-1, BLOCK)
    rest = plane.view(-1, 1, BLOCK)
    digits = []
    for _ in range(per_byte):
        digits.append(rest % radix)
        rest = rest // radix
    return torch.cat(digits, dim=1).view(-1, BLOCK)
