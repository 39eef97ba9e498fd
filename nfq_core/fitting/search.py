"""Choosing a scale and codes for every block, given the levels.

Candidates are all scales within an octave of a block's largest magnitude, with both signs, because a signed codebook
may be asymmetric (cf. BOF4-S, arXiv 2505.06653). All candidates, up to 64, are rated at once: weights are rounded to a
fine grid, and a table holds the error of each grid cell under each candidate. Rating a block is then a sum of 64 table
rows, which torch's embedding_bag computes in a few nanoseconds per weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from ..packed.layout import BLOCK
from ..packed.scales import (
    FP16_MAX_EXPONENT,
    FP16_MIN_EXPONENT,
    SCALE_MAGNITUDES,
    SCALE_MANTISSAS,
    SCALE_STEPS_PER_OCTAVE,
    SCALE_STRIDES,
    cached_tensor,
    scale_table,
)

SEARCH_BINS = 512
"""Grid cells for rating candidate scales, over the range of a block."""

ASSIGN_BINS = 4096
"""Grid cells for mapping weights to codes, over ±ASSIGN_RANGE; narrower than 1/60 of the smallest level spacing."""

ASSIGN_RANGE = 1.125
"""Multiple of the scale beyond which weights always get the outermost level."""

OCTAVES_ABOVE = 15 / 16
"""Search range above a block's largest magnitude in octaves; below it, the range is one step longer."""

MAX_UNSPANNED_BLOCKS = 1e-3
"""Largest share of blocks below a grid's smallest scale with which a finer grid is still chosen ..."""

MAX_UNSPANNED_ENERGY = 1e-5
"""... and the largest share of the energy in those blocks, by their largest magnitudes."""

FP16_ZERO = 2.0**-25
"""Largest number that rounds to zero in fp16; blocks up to this magnitude need no scale."""

MAX_LIFT = 8
"""Largest exponent of the power of two that multiplies weights: a smallest scale of 2**-22 covers all of fp16.

Levels are divided by the same power. Their last bit, 2**-24, is then still 1/65,536 of the largest level.
"""

ZERO_BELOW = 1 / 8
"""A block becomes zero if its largest magnitude is below this multiple of the smallest scale: few levels are nearer."""


@dataclass(frozen=True)
class ScaleGrid:
    """The scales that one tensor may use.

    Args:
        exponent: see `scale_table`.
        stride: see `scale_table`.
        table: result of `scale_table`, fp16 of shape (256,).
        magnitudes: the allowed positive scales, ascending, fp32 of shape (up to 127,).
    """

    exponent: int
    stride: int
    table: torch.Tensor
    magnitudes: torch.Tensor

    @classmethod
    def for_blocks(cls, largest: torch.Tensor, finest_stride: int = 1, ceiling: float = math.inf) -> ScaleGrid:
        """The finest grid that spans the blocks, except a few with almost no energy.

        Args:
            largest: largest magnitude of each block, fp32 of shape (blocks,), finite.
            finest_stride: smallest of SCALE_STRIDES to consider.
            ceiling: largest allowed scale.
        """
        used = largest[largest > 0].double()
        top = torch.frexp(used.amax() * 2**OCTAVES_ABOVE).exponent.item() if used.numel() else 0
        for stride in SCALE_STRIDES[SCALE_STRIDES.index(finest_stride) :]:
            octaves = (SCALE_MAGNITUDES - 1) * stride // SCALE_STEPS_PER_OCTAVE
            exponent = min(max(top - 1 - octaves, FP16_MIN_EXPONENT), FP16_MAX_EXPONENT - octaves)
            # No grid reaches below the normal fp16 numbers.
            if _spans(exponent, used) or exponent == FP16_MIN_EXPONENT:
                break
        table = scale_table(exponent, stride)
        magnitudes = table[1 : SCALE_MAGNITUDES + 1].float()
        return cls(exponent, stride, table, magnitudes[magnitudes <= ceiling])


def _spans(exponent: int, largest: torch.Tensor) -> bool:
    """Whether all non-zero blocks are at least 2**exponent, except a few with almost no energy."""
    below = largest[largest < 2.0**exponent].double()
    few = len(below) <= MAX_UNSPANNED_BLOCKS * len(largest)
    return bool(few and below.square().sum() <= MAX_UNSPANNED_ENERGY * largest.double().square().sum())


def grid_and_factor(largest: torch.Tensor, finest_stride: int = 1) -> tuple[ScaleGrid, float]:
    """Choose a scale grid and a power of two that multiplies the weight; its levels must be divided by that factor.

    Scales are normal fp16 numbers from 2**-14 up, but weights may be smaller or larger. The factor is 1 if a grid spans
    the blocks as they are.

    Args:
        largest: largest magnitude of each block, fp32 of shape (blocks,), within fp16's range.
        finest_stride: see `ScaleGrid.for_blocks`.
    """
    largest = largest.masked_fill(largest <= FP16_ZERO, 0)
    grid = ScaleGrid.for_blocks(largest, finest_stride)
    if largest.amax() > grid.magnitudes[-1]:
        # Weights above the largest scale: halve them and double the levels; the ceiling keeps products within fp16.
        return ScaleGrid.for_blocks(largest / 2, finest_stride, torch.finfo(torch.float16).max / 2), 0.5
    used = largest[largest > 0]
    lift = 0
    while grid.exponent == FP16_MIN_EXPONENT and lift < MAX_LIFT and not _spans(grid.exponent - lift, used):
        lift += 1
        grid = ScaleGrid.for_blocks(largest * 2.0**lift, finest_stride)
    return grid, 2.0**lift


def largest_magnitudes(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, fp32 of shape (blocks,); NaN and Inf carry through.

    Args:
        blocks: fp32, or a dtype of 16 bits, of shape (blocks, 64).
    """
    if blocks.element_size() == 2:
        # Floats without their sign sort like their bits; int16 moves fewer bytes than fp32.
        return blocks.view(torch.int16).bitwise_and(0x7FFF).amax(dim=1).view(blocks.dtype).float()
    return blocks.abs().amax(dim=1)


@cached_tensor
def _steps_of_mantissa(device: torch.device) -> torch.Tensor:
    """For every mantissa of ten bits, the index of an octave's largest scale that is not above it; int32, (1024,)."""
    mantissas = torch.tensor(SCALE_MANTISSAS, device="cpu")
    steps = torch.bucketize(torch.arange(1024, device="cpu"), mantissas, right=True) - 1
    return steps.int().to(device)


def _centres(bins: int, limit: float) -> torch.Tensor:
    """Centres of `bins` grid cells over ±limit, fp32 of shape (bins,) on the CPU."""
    return (torch.arange(bins, dtype=torch.float32, device="cpu") + 0.5) * (2 * limit / bins) - limit


def store_index_in_low_bits(errors: torch.Tensor, indices: torch.Tensor, mask: int) -> torch.Tensor:
    """Overwrite the low bits of each error with its index, in place, so that `amin` also yields the index.

    Non-negative floats sort like their bits read as integers. This is several times faster than `argmin`.

    Args:
        errors: fp32, none negative.
        indices: int32, broadcastable to `errors`.
        mask: the bits that an index may occupy.

    Returns:
        int32 of the shape of `errors`, sharing its memory.
    """
    return errors.view(torch.int32).bitwise_and_(~mask).bitwise_or_(indices)


@dataclass(frozen=True)
class NearestLevel:
    """The nearest level of a value by its cell in a grid of ASSIGN_BINS cells over ±ASSIGN_RANGE scales.

    Args:
        codes: code of the level by cell, uint8 of shape (ASSIGN_BINS,).
        levels: the level by cell, fp32, same shape.
    """

    codes: torch.Tensor
    levels: torch.Tensor

    @classmethod
    def of(
        cls,
        levels: torch.Tensor,
        boundaries: torch.Tensor,
        device: torch.device,
        code_of_level: torch.Tensor | None = None,
    ) -> NearestLevel:
        """From levels and the boundaries between neighbours, in units of the scale, on the CPU."""
        indices = torch.bucketize(_centres(ASSIGN_BINS, ASSIGN_RANGE), boundaries)
        codes = indices.to(torch.uint8) if code_of_level is None else code_of_level[indices]
        return cls(codes.to(device), levels[indices].to(device))

    @staticmethod
    def cells_per_unit(scales: torch.Tensor) -> torch.Tensor:
        """By what `cells` multiplies values with these scales; 0 where the scale is 0."""
        return torch.where(scales == 0, 0.0, ASSIGN_BINS / (2 * ASSIGN_RANGE) / scales)

    @staticmethod
    def cells(values: torch.Tensor, per_unit: torch.Tensor) -> torch.Tensor:
        """The cells of values, int32."""
        return (values * per_unit).add_(ASSIGN_BINS / 2).clamp_(0, ASSIGN_BINS - 1).to(torch.int32)


class BlockQuantizer:
    """Chooses scale codes and codes for blocks, given levels and a scale grid, on one device.

    Methods do not synchronise with devices other than the CPU.

    Args:
        levels: ascending, fp32 of shape (n,) on the CPU, with largest magnitude 1.
        grid: the scales that may be used.
        device: device of the blocks.
        prices: added to the squared error of a weight that uses the level, in units of the block's largest magnitude
            squared; fp32 of shape (n,), none negative; default: all 0.
        code_of_level: the code of each level, uint8 of shape (n,); by default its index.
    """

    def __init__(
        self,
        levels: torch.Tensor,
        grid: ScaleGrid,
        device: torch.device,
        prices: torch.Tensor | None = None,
        code_of_level: torch.Tensor | None = None,
    ) -> None:
        self.levels = levels
        self.grid = grid
        self.prices = torch.zeros_like(levels) if prices is None else prices
        steps = SCALE_STEPS_PER_OCTAVE // grid.stride
        self._offsets = torch.arange(-steps, steps, device="cpu")
        self._range = 2.0 ** (grid.stride / SCALE_STEPS_PER_OCTAVE) * 1.002
        self._magnitudes = grid.magnitudes.to(device)
        self._table = grid.table.float().to(device)
        self._errors = self._candidate_errors().to(device)
        # The scale code of a candidate is `_base` (index of the largest magnitude not above the block's) plus this.
        self._code_steps = torch.cat([self._offsets + 1, self._offsets + 129]).int().to(device)
        self._candidate_ids = torch.arange(len(self._code_steps), dtype=torch.int32, device=device)
        self._id_mask = (1 << (len(self._candidate_ids) - 1).bit_length()) - 1
        self._off_grid = self._off_grid_errors().to(device)
        self.nearest = NearestLevel.of(levels, self.boundaries, device, code_of_level)

    @property
    def boundaries(self) -> torch.Tensor:
        """Decision boundaries between neighbouring levels, prices included; ascending, fp32 of shape (n - 1,)."""
        gaps = (self.levels[1:] - self.levels[:-1]).clamp_min(1e-6)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return (middles + (self.prices[1:] - self.prices[:-1]) / (2 * gaps)).cummax(0).values

    def _candidate_errors(self) -> torch.Tensor:
        """Squared error plus price at each grid cell under each candidate scale, fp32 (SEARCH_BINS, candidates)."""
        centres = _centres(SEARCH_BINS, self._range)
        ratios = 2.0 ** (self._offsets.double() * self.grid.stride / SCALE_STEPS_PER_OCTAVE)
        scaled = (centres.double()[:, None] / ratios).float()
        codes = torch.bucketize(scaled, self.boundaries)
        errors = (scaled - self.levels[codes]).square() * ratios.square().float() + self.prices[codes]
        # The grid is symmetric: a weight has the same error under a negative scale as its negative under the positive.
        return torch.cat([errors, errors.flip(0)], dim=1)

    def _off_grid_errors(self) -> torch.Tensor:
        """Infinity where a candidate's scale is not in the grid, else 0; fp32 of shape (magnitudes, candidates)."""
        count = len(self.grid.magnitudes)
        index = torch.arange(count, device="cpu")[:, None] + self._offsets.repeat(2)
        errors = torch.zeros(index.shape, dtype=torch.float32, device="cpu")
        return errors.masked_fill_((index < 0) | (index >= count), math.inf)

    def _base(self, largest: torch.Tensor) -> torch.Tensor:
        """Index of the grid's largest magnitude not above each block's own, else 0; int32 of shape (blocks,).

        Scales are fp16, so exponent and first ten mantissa bits of an fp32 number suffice for the comparison.
        """
        bits = largest.view(torch.int32)
        steps = _steps_of_mantissa(bits.device).index_select(0, (bits >> 13) & 1023)
        steps.add_((bits >> 23).sub_(127 + self.grid.exponent), alpha=SCALE_STEPS_PER_OCTAVE)
        return steps.div_(self.grid.stride, rounding_mode="floor").clamp_(0, len(self._magnitudes) - 1)

    def scale_codes(
        self, blocks: torch.Tensor, largest: torch.Tensor, importance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The scale code with the smallest squared error, prices included, for each block.

        Args:
            blocks: fp32 of shape (blocks, 64).
            largest: their largest magnitudes, fp32 of shape (blocks,).
            importance: factor of each weight's squared error, fp32 of shape (blocks, 64), none negative; default: 1.

        Returns:
            uint8 of shape (blocks,): 0 for a zero block, else 1 … 127 with bit 7 for a negative scale.
        """
        base = self._base(largest)
        to_cells = SEARCH_BINS / (2 * self._range) / self._magnitudes.index_select(0, base)
        cells = (blocks * to_cells[:, None]).add_(SEARCH_BINS / 2).clamp_(0, SEARCH_BINS - 1).to(torch.int32)
        errors = embedding_bag(cells, self._errors, mode="sum", per_sample_weights=importance)
        if blocks.device.type != "cpu" or self._off_grid.index_select(0, torch.stack(base.aminmax())).any():
            errors.add_(self._off_grid.index_select(0, base))
        errors = store_index_in_low_bits(errors, self._candidate_ids, self._id_mask)
        best = errors.amin(dim=1).bitwise_and_(self._id_mask)
        codes = self._code_steps.index_select(0, best).add_(base).to(torch.uint8)
        return codes.masked_fill_(largest < ZERO_BELOW * self.grid.magnitudes[0], 0)

    def scales(self, scale_codes: torch.Tensor) -> torch.Tensor:
        """The scales of scale codes, fp32 of shape (blocks,)."""
        return self._table.index_select(0, scale_codes.int())

    def codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The code of the nearest level, prices included, for every weight; uint8 of shape (blocks, 64)."""
        cells = NearestLevel.cells(blocks, NearestLevel.cells_per_unit(scales)[:, None])
        return self.nearest.codes.index_select(0, cells.view(-1)).view(-1, BLOCK)
