"""The layout of a packed buffer: how codes select levels, how they are packed, and where each section begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import ClassVar

import torch

from ..errors import CorruptFileError
from .common_levels import common_levels
from .scales import all_scale_tables, check_scale_parameters, scale_table_mask

BLOCK = 64
"""Weights per block: consecutive weights of the row-major flattened tensor, which share one scale."""

HEAD_ALIGNMENT = 32
"""Alignment in bytes of the first plane: a GPU reads memory in sectors of 32 bytes."""

LARGE_TABLE = 256
"""Number of levels from which a format has common levels, see `common_levels`."""

OWN_LEVELS_FROM = 1 << 17
"""Weights from which levels of its own usually pay for a tensor whose format has common levels.

There a table of 256 levels takes 0.03 bits per weight, which is worth 0.2 dB.
"""


@dataclass(frozen=True)
class Sections:
    """Byte offset of each section of a packed buffer; a section ends where the next one begins."""

    head: int
    coarse: int
    fine: int
    scales: int
    end: int

    def spans(self) -> list[tuple[int, int]]:
        """The non-empty sections as (start, end), in order."""
        offsets = [self.head, self.coarse, self.fine, self.scales, self.end]
        return [(start, end) for start, end in pairwise(offsets) if end > start]


@dataclass(frozen=True)
class BlockFormat:
    """One block format. A code is ``coarse * 2**fine_bits + fine``.

    In a scalar format a code is the number of a level. In a trellis format (`window` > 0) a code has `code_bits` bits,
    and a weight's level number is the last `window` bits of the block's code stream, up to and including its own code.
    The stream is circular: the last codes of a block precede its first one.

    A byte of the coarse plane holds `coarse_digits` digits of base `coarse_radix`; a byte of the fine plane holds
    `8 / fine_bits` digits of `fine_bits` bits. Entropy coding can shorten coarse digits; fine bits are almost uniform.
    """

    id: str
    levels: int
    coarse_radix: int
    coarse_digits: int
    fine_bits: int
    window: int = 0

    has_kernel: ClassVar[bool] = True
    """Whether the GPU kernel decodes this format; plain torch decodes all."""

    def __repr__(self) -> str:
        return f"<{self.id}>"

    @property
    def codes(self) -> int:
        """Number of different codes."""
        return self.coarse_radix << self.fine_bits if self.window else self.levels

    @property
    def code_bits(self) -> int:
        """Bits per code (trellis formats only)."""
        return self.codes.bit_length() - 1

    @property
    def states(self) -> int:
        """Number of trellis states: what the previous codes contribute to a level number (trellis formats only)."""
        return self.levels // self.codes

    @property
    def fine_digits(self) -> int:
        """Digits per byte of the fine plane: blocks that share a 64-byte group; 0 without a fine plane."""
        return 8 // self.fine_bits if self.fine_bits else 0

    @cached_property
    def blocks_per_group(self) -> int:
        """Smallest number of blocks that fills whole groups of both planes."""
        blocks = self.coarse_digits
        while self.fine_digits and blocks % self.fine_digits:
            blocks += self.coarse_digits
        return blocks

    def __hash__(self) -> int:
        # Ids are unique, and hashing every field would cost as much as the cached results.
        return hash(self.id)

    @property
    def has_common_levels(self) -> bool:
        """Whether tensors may use common levels instead of their own."""
        return self.levels >= LARGE_TABLE

    def expects_own_levels(self, weights: int) -> bool:
        """Whether a size is planned with levels of its own for a tensor; see `fitting.own_levels` for what it gets."""
        return not self.has_common_levels or weights >= OWN_LEVELS_FROM

    def sections(self, weights: int, own_levels: bool = True) -> Sections:
        """Section offsets, in bytes, of the packed buffer of `weights` weights, with or without levels of its own."""
        assert own_levels or self.has_common_levels
        return _sections(self, weights, own_levels)

    def sections_of(self, data: torch.Tensor, weights: int) -> Sections:
        """Section offsets of an existing packed buffer: its length shows whether it has levels of its own."""
        sections = self.sections(weights)
        if not self.has_common_levels or data.numel() == sections.end:
            return sections
        return self.sections(weights, own_levels=False)

    def packed_bytes(self, weights: int) -> int:
        """Length in bytes of the packed buffer that is planned for `weights` weights."""
        return self.sections(weights, self.expects_own_levels(weights)).end

    def scale_bytes(self, blocks: int) -> int:
        """Bytes of the scales of `blocks` blocks."""
        return blocks + 2

    def levels_in(self, data: torch.Tensor, sections: Sections) -> torch.Tensor:
        """The levels of a packed buffer by level number, fp16 of shape (self.levels,)."""
        if not sections.coarse:
            return common_levels(self.id, data.device)
        return data[: 2 * self.levels].view(torch.float16)

    def scale_parameters(self, data: torch.Tensor) -> torch.Tensor:
        """Exponent and stride in a packed buffer, int8 of shape (2,), unchecked; see `scale_table`."""
        return data[-2:].view(torch.int8)

    def block_scales(self, data: torch.Tensor, weights: int) -> torch.Tensor:
        """The scale of each block of a packed buffer, fp16 or fp32, shape (blocks,).

        Raises:
            ValueError: the scale parameters are out of bounds. Checked on the CPU only, because it would synchronise
                other devices, where the scales are then NaN or others.
        """
        if data.device.type == "cpu":
            check_scale_parameters(*self.scale_parameters(data).tolist())
        numbers = data[self.sections_of(data, weights).scales :].int()
        row = numbers[-2:].bitwise_and_(scale_table_mask(data.device))
        tables = all_scale_tables(data.device).index_select(0, row[:1])[0]
        return tables.index_select(0, row[1:])[0].index_select(0, numbers[:-2])

    def check_scales(self, data: torch.Tensor, weights: int) -> None:
        """CorruptFileError if a scale of a packed buffer is out of bounds."""
        try:
            check_scale_parameters(*self.scale_parameters(data).tolist())
        except ValueError as error:
            raise CorruptFileError(str(error)) from None


@lru_cache(1024)
def _sections(fmt: BlockFormat, weights: int, own_levels: bool) -> Sections:
    """`BlockFormat.sections`, cached: every layer needs it twice per run, and few layers differ in size."""
    blocks = -(-weights // BLOCK)
    coarse = -(-2 * fmt.levels // HEAD_ALIGNMENT) * HEAD_ALIGNMENT if own_levels else 0
    fine = coarse + -(-blocks // fmt.coarse_digits) * BLOCK
    scales = fine + (-(-blocks // fmt.fine_digits) * BLOCK if fmt.fine_bits else 0)
    return Sections(0, coarse, fine, scales, scales + fmt.scale_bytes(blocks))
