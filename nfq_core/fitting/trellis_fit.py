"""Fitting a trellis format to one tensor: levels, and the usual scale of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..packed.common_levels import common_levels
from ..packed.layout import BlockFormat
from ..packed.scales import SCALE_STEPS_PER_OCTAVE
from .backends import trellis_coder, tries_other_scales
from .own_levels import own_levels_pay
from .search import ZERO_BELOW, ScaleGrid, largest_magnitudes

USUAL_RATIOS = {
    "t2w8_b64": 1.9902,
    "t3w8_b64": 2.2175,
    "t4w8_b64": 2.3069,
    "t5w9_b64": 2.6050,
    "t6w9_b64": 2.7604,
}
"""The `ratio` (see Trellis) of the common levels, by format id.

Best for Gaussian weights with 2 to 4 bits; with 5 and 6 bits an eighth of an octave and three sixteenths above, because
weights beyond the largest level then cost most of the error.
"""

MIN_RELATIVE_SCALE = 0.95
"""Lower bound of a usual scale relative to the block's largest magnitude: keeps outliers in range."""

MIN_PROGRESS = 0.001
"""Lloyd's algorithm stops after a round that lowers the error by a smaller share; Gaussian tensors need few rounds."""

PRIOR_USES = 16
"""Weight of each starting level, in samples of its value: prevents overfitting where samples are few."""


@dataclass(frozen=True)
class TrellisEffort:
    """How much work fitting and searching may take.

    Args:
        sample_blocks: number of blocks sampled from a tensor.
        rounds: most rounds of Lloyd's algorithm.
        other_scales: whether to try other scales than the usual one, where `tries_other_scales` allows it.
    """

    sample_blocks: int
    rounds: int
    other_scales: bool


TRELLIS_EFFORTS = {"fast": TrellisEffort(2048, 3, False), "best": TrellisEffort(2048, 10, True)}


@dataclass(frozen=True)
class OtherScales:
    """Which scales besides the usual one to try for each block.

    Args:
        steps: from the usual scale, in sixteenths of an octave; none: FINE_STEPS are not tried either.
        both_signs: whether each is tried with both signs, or with the usual scale's better one.
    """

    steps: tuple[int, ...] = ()
    both_signs: bool = False

    @property
    def count(self) -> int:
        """Signed scales tried for each block, the usual one included."""
        return 2 + len(self.steps) * (1 + self.both_signs) + (len(FINE_STEPS) if self.steps else 0)


FINE_STEPS = (-1, 1)
"""Tried last: from the best scale so far."""

FEW_SCALES = OtherScales((-2, 2))
"""Trying these with both signs would gain 0.02 to 0.07 dB in a fifth more time."""

MANY_SCALES = OtherScales((-3, -2, -1, 1, 2, 3), both_signs=True)
"""For a tensor that is too small for levels of its own, and takes no time."""


def other_scales(effort: str, fmt: BlockFormat, weights: int, device: torch.device) -> OtherScales:
    """What `TrellisQuantizer` tries for a tensor of so many weights."""
    if not TRELLIS_EFFORTS[effort].other_scales or not tries_other_scales(device):
        return OtherScales()
    return FEW_SCALES if fmt.expects_own_levels(weights) else MANY_SCALES


@dataclass(frozen=True)
class Trellis:
    """Levels fitted to a tensor.

    Args:
        levels: by level number, fp32 of shape (n,), exact in fp16, with largest magnitude 1.
        ratio: a block's usual scale divided by the fourth root of its weights' mean fourth power. That root is between
            the root mean square and the largest magnitude, and suits Gaussian and heavy-tailed blocks.
    """

    levels: torch.Tensor
    ratio: float


@dataclass(frozen=True)
class _Choice:
    """A scale for each block.

    Args:
        index: of the grid's magnitude, int32 of shape (blocks,).
        sign: of the scale, 1 or -1, fp32 of shape (blocks,).
        errors: estimates of the squared errors, fp32 of shape (blocks,).
        state_errors: see `TrellisCoder.state_errors`.
    """

    index: torch.Tensor
    sign: torch.Tensor
    errors: torch.Tensor
    state_errors: torch.Tensor

    def replaced_where(self, better: torch.Tensor, other: _Choice) -> _Choice:
        """The other choice where `better`, bool of shape (blocks,), is true."""
        return _Choice(
            torch.where(better, other.index, self.index),
            torch.where(better, other.sign, self.sign),
            torch.where(better, other.errors, self.errors),
            torch.where(better.unsqueeze(1), other.state_errors, self.state_errors),
        )


class TrellisQuantizer:
    """Chooses scale codes and codes for blocks.

    Args:
        trellis: the fitted levels and ratio.
        fmt: a trellis format.
        grid: the scales that may be used.
        device: device of the blocks.
        others: other scales to try.
    """

    def __init__(
        self, trellis: Trellis, fmt: BlockFormat, grid: ScaleGrid, device: torch.device, others: OtherScales
    ) -> None:
        self._ratio = trellis.ratio
        self._grid = grid
        self._coder = trellis_coder(trellis.levels, fmt, device)
        self._magnitudes = grid.magnitudes.to(device)
        self._others = others

    def encode(self, blocks: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose each block's sign with its usual scale, then its scale, then its codes.

        Signs and scales are compared by `TrellisCoder.state_errors`, the first half of a search.

        Args:
            blocks: fp32 of shape (blocks, 64).
            largest: their largest magnitudes, fp32 of shape (blocks,).

        Returns:
            The scale codes, uint8 of shape (blocks,), 0 for a zero block, and the codes, uint8 of shape (blocks, 64).
        """
        usual = usual_scales(blocks, self._ratio)
        octaves = usual.clamp_min(self._magnitudes[0]).log2() - self._grid.exponent
        index = (octaves * (SCALE_STEPS_PER_OCTAVE / self._grid.stride)).round().to(torch.int32)
        both = torch.ones_like(usual), -torch.ones_like(usual)
        best = self._better(blocks, index, both)
        if self._others.steps:
            signs = both if self._others.both_signs else (best.sign,)
            for step in self._grid_steps(self._others.steps):
                best = self._better(blocks, index + step, signs, best)
            index = best.index
            for step in self._grid_steps(FINE_STEPS):
                best = self._better(blocks, index + step, (best.sign,), best)
        scales = self._magnitudes.index_select(0, best.index) * best.sign
        codes = self._coder.encode(blocks / scales.unsqueeze(1), best.state_errors)[0]
        scale_codes = (best.index + torch.where(best.sign < 0, 129, 1)).to(torch.uint8)
        return scale_codes.masked_fill_(largest < ZERO_BELOW * self._magnitudes[0], 0), codes

    def _grid_steps(self, steps: tuple[int, ...]) -> list[int]:
        """Sixteenths of an octave in steps of the grid, without those that are no step."""
        return [step // self._grid.stride for step in steps if not step % self._grid.stride]

    def _better(
        self, blocks: torch.Tensor, index: torch.Tensor, signs: tuple[torch.Tensor, ...], best: _Choice | None = None
    ) -> _Choice:
        """The better one, for each block, of `best` and the grid's magnitude `index` with each of some signs."""
        index = index.clamp(0, len(self._magnitudes) - 1)
        magnitudes = self._magnitudes.index_select(0, index)
        for sign in signs:
            state_errors = self._coder.state_errors(blocks / (magnitudes * sign).unsqueeze(1))
            errors = state_errors.amin(dim=1) * magnitudes.square()
            choice = _Choice(index, sign, errors, state_errors)
            best = choice if best is None else best.replaced_where(errors < best.errors, choice)
        assert best is not None
        return best


def usual_scales(blocks: torch.Tensor, ratio: float) -> torch.Tensor:
    """The usual scale of each block, fp32 of shape (blocks,); see `Trellis.ratio`."""
    largest = largest_magnitudes(blocks).clamp_min(1e-30)
    relative = (blocks / largest[:, None]).square_().square_().mean(dim=1).pow_(0.25)
    return relative.mul_(ratio).clamp_min_(MIN_RELATIVE_SCALE).mul_(largest)


@lru_cache(16)
def gaussian_trellis(fmt: BlockFormat) -> Trellis:
    """The common levels and their ratio, which suit Gaussian blocks."""
    return Trellis(common_levels(fmt.id, torch.device("cpu")).float(), USUAL_RATIOS[fmt.id])


def fit_trellis(blocks: torch.Tensor, fmt: BlockFormat, effort: TrellisEffort, weights: int | None = None) -> Trellis:
    """Fit levels to a sample of a tensor, unless the common ones are as good for their size.

    Args:
        blocks: the sample, fp32 of shape (blocks, 64), finite.
        fmt: a trellis format.
        effort: how much work this may take.
        weights: number of weights of the whole tensor; None: levels are always fitted.
    """
    common = gaussian_trellis(fmt)
    blocks = blocks[largest_magnitudes(blocks) > 0]
    if not len(blocks):
        return common
    fitted, error = lloyd(blocks, common, fmt, effort.rounds, PRIOR_USES, MIN_PROGRESS)
    if weights is None or own_levels_pay(error, _coded(blocks, common, fmt)[0], fmt, weights):
        return fitted
    return common


def lloyd(
    blocks: torch.Tensor,
    start: Trellis,
    fmt: BlockFormat,
    rounds: int,
    prior_uses: float,
    min_progress: float = -math.inf,
) -> tuple[Trellis, float]:
    """Alternate between choosing codes and moving each level to the mean of its weights.

    Args:
        blocks: fp32 of shape (blocks, 64).
        start: levels and ratio of the first round.
        fmt: a trellis format.
        rounds: most rounds.
        prior_uses: see PRIOR_USES.
        min_progress: see MIN_PROGRESS; by default all rounds are done.

    Returns:
        The best round's levels and ratio, and their sum of squared errors.
    """
    trellis, best, least = start, start, math.inf
    for number in range(rounds + 1):
        error, numbers, values, importance = _coded(blocks, trellis, fmt)
        enough = number == rounds or error > (1 - min_progress) * least
        if error < least:
            best, least = trellis, error
        if enough:
            break
        sums = torch.bincount(numbers, (values * importance).view(-1), minlength=fmt.levels).cpu()
        totals = torch.bincount(numbers, importance.expand_as(values).reshape(-1), minlength=fmt.levels).cpu()
        prior = max(prior_uses * importance.mean().item(), 1e-30)
        levels = (sums + prior * trellis.levels) / (totals + prior)
        largest = levels.abs().amax().item()
        trellis = Trellis((levels / largest).half().float(), trellis.ratio * largest)
    return best, least


def _coded(
    blocks: torch.Tensor, trellis: Trellis, fmt: BlockFormat
) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code blocks with their usual scales, unrounded.

    Returns:
        The sum of squared errors; the level number of every weight, 1-D; the weights divided by their scales, fp64 of
        shape (blocks, 64); the factors of their squared errors (the scales squared), fp64 of shape (blocks, 1).
    """
    scales = usual_scales(blocks, trellis.ratio)[:, None]
    values = blocks / scales
    codes, errors = trellis_coder(trellis.levels, fmt, blocks.device).encode(values)
    importance = scales.double().square()
    return float((errors.double() * importance[:, 0]).sum()), level_numbers(codes, fmt), values.double(), importance


def level_numbers(codes: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """The level number of every weight, int32, 1-D, from codes of shape (blocks, 64)."""
    stream = codes.int()
    numbers = stream.clone()
    for back in range(1, -(-fmt.window // fmt.code_bits)):
        numbers |= stream.roll(back, dims=1) << back * fmt.code_bits
    return numbers.bitwise_and_(fmt.levels - 1).view(-1)
