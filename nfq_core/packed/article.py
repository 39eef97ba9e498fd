"""The article's formats: weights that its code has quantised, which decode to the same bits as there.

Each block has a byte that divides the fp32 maximum of its superblock. Only plain torch decodes these formats, on every
device: they serve the import of existing files alone.
"""

from __future__ import annotations

import torch

from ..errors import CorruptFileError
from .layout import BLOCK, BlockFormat
from .scales import cached_tensor

SUPERBLOCK = 256
"""Blocks per superblock."""

MIN_SCALE = 1e-12
"""Lower bound of a block's scale byte, so that 0 does not divide by zero."""

SCALE_STEPS = 255.0
"""A block's scale is stored in units of 1/255 of its superblock's maximum."""


class ArticleFormat(BlockFormat):
    """A scalar format with the article's scales: an fp32 maximum for each superblock, then a byte for each block."""

    has_kernel = False
    __hash__ = BlockFormat.__hash__

    def scale_bytes(self, blocks: int) -> int:
        """Bytes of the scales of `blocks` blocks."""
        return 4 * -(-blocks // SUPERBLOCK) + blocks

    def block_scales(self, data: torch.Tensor, weights: int) -> torch.Tensor:
        """The scale of each block of a packed buffer, fp32 of shape (blocks,)."""
        return scale_of(*self.split_scales(data, weights))

    def check_scales(self, data: torch.Tensor, weights: int) -> None:
        """CorruptFileError if a superblock's maximum is not finite."""
        if not torch.isfinite(self.split_scales(data, weights)[0]).all():
            raise CorruptFileError("its superblock scales are not finite")

    def split_scales(self, data: torch.Tensor, weights: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a packed buffer: superblock maxima, fp32, and block scales, uint8 of shape (blocks,)."""
        scales = data[self.sections(weights).scales :]
        blocks = -(-weights // BLOCK)
        return scales[:-blocks].view(torch.float32), scales[-blocks:]


def scale_of(maxima: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The scale of each block, fp32 of shape (blocks,).

    Args:
        maxima: superblock maxima, fp32.
        codes: block scales, uint8 of shape (blocks,).
    """
    per_block = maxima.unsqueeze(1).expand(-1, SUPERBLOCK).contiguous().view(-1)[: len(codes)]
    return per_block * codes.float().clamp(min=MIN_SCALE) / _steps(maxima.device)


@cached_tensor
def _steps(device: torch.device) -> torch.Tensor:
    """SCALE_STEPS as fp32 of shape (); some devices would divide by a number as multiplication by its reciprocal."""
    return torch.full((), SCALE_STEPS, dtype=torch.float32, device="cpu").to(device)
