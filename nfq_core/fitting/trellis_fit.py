"""Fitting a trellis format to one tensor: levels, and the usual scale of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..packed.common_levels import common_levels
from ..packed.layout import BLOCK, BlockFormat
from ..packed.scales import SCALE_STEPS_PER_OCTAVE
from .own_levels import own_levels_pay
from .search import ZERO_BELOW, ScaleGrid, largest_magnitudes
from .trellis import TrellisCoder

GAUSSIAN_RATIOS = {
    "t2w8_b64": 1.9902,
    "t3w8_b64": 2.2175,
    "t4w8_b64": 2.3069,
    "t5w9_b64": 2.3888,
    "t6w9_b64": 2.424,
}
"""The `ratio` (see Trellis) of the common levels, by format id."""

RATIO_STEPS = (-3, 0, 3, 6)
"""Ratios to try, in sixteenths of an octave from the Gaussian one; heavy tails need larger ratios."""

RATIO_BLOCKS = 256
"""Blocks of the sample on which ratios are tried."""

MIN_RELATIVE_SCALE = 0.95
"""Lower bound of a usual scale relative to the block's largest magnitude: keeps outliers in range."""

PRIOR_USES = 16
"""Weight of each starting level, in samples of its value: prevents overfitting where samples are few."""


@dataclass(frozen=True)
class TrellisEffort:
    """How much work fitting and searching may take.

    Args:
        sample_blocks: number of blocks sampled from a tensor.
        rounds: rounds of Lloyd's algorithm.
        scale_steps: scales to try, in sixteenths of an octave from a block's usual scale, each with both signs.
    """

    sample_blocks: int
    rounds: int
    scale_steps: tuple[int, ...]


TRELLIS_EFFORTS = {"fast": TrellisEffort(2048, 3, (0,)), "best": TrellisEffort(4096, 10, (-2, 0, 2))}


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


class TrellisQuantizer:
    """Chooses scale codes and codes for blocks.

    Args:
        trellis: the fitted levels and ratio.
        fmt: a trellis format.
        grid: the scales that may be used.
        device: device of the blocks.
        scale_steps: see TrellisEffort.
    """

    def __init__(
        self, trellis: Trellis, fmt: BlockFormat, grid: ScaleGrid, device: torch.device, scale_steps: tuple[int, ...]
    ) -> None:
        self._ratio = trellis.ratio
        self._grid = grid
        self._coder = TrellisCoder(trellis.levels, fmt, device)
        self._magnitudes = grid.magnitudes.to(device)
        self._steps = tuple(dict.fromkeys(round(step / grid.stride) for step in scale_steps))

    def encode(self, blocks: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code every block with each scale to try, and keep the one with the smallest squared error.

        Args:
            blocks: fp32 of shape (blocks, 64).
            largest: their largest magnitudes, fp32 of shape (blocks,).

        Returns:
            The scale codes, uint8 of shape (blocks,), 0 for a zero block, and the codes, uint8 of shape (blocks, 64).
        """
        usual = usual_scales(blocks, self._ratio)
        octaves = usual.clamp_min(self._magnitudes[0]).log2() - self._grid.exponent
        middle = (octaves * (SCALE_STEPS_PER_OCTAVE / self._grid.stride)).round().to(torch.int32)
        indices = torch.stack([middle + step for step in self._steps]).clamp_(0, len(self._magnitudes) - 1)
        scales = self._magnitudes[indices]
        signed = torch.stack([scales, -scales]).flatten(0, 1)
        scale_codes = torch.stack([indices + 1, indices + 129]).flatten(0, 1).to(torch.uint8)
        # All in one call: for small tensors, call overhead dominates.
        codes, errors = self._coder.encode((blocks / signed[:, :, None]).view(-1, BLOCK))
        best = (errors.view(signed.shape) * signed.square()).argmin(dim=0, keepdim=True)
        best_scales = scale_codes.gather(0, best).squeeze(0)
        best_codes = codes.view(*signed.shape, BLOCK).gather(0, best[:, :, None].expand(-1, -1, BLOCK)).squeeze(0)
        return best_scales.masked_fill_(largest < ZERO_BELOW * self._magnitudes[0], 0), best_codes


def usual_scales(blocks: torch.Tensor, ratio: float) -> torch.Tensor:
    """The usual scale of each block, fp32 of shape (blocks,); see `Trellis.ratio`."""
    largest = largest_magnitudes(blocks).clamp_min(1e-30)
    relative = (blocks / largest[:, None]).square_().square_().mean(dim=1).pow_(0.25)
    return relative.mul_(ratio).clamp_min_(MIN_RELATIVE_SCALE).mul_(largest)


@lru_cache(16)
def gaussian_trellis(fmt: BlockFormat) -> Trellis:
    """The common levels and their ratio, which suit Gaussian blocks."""
    return Trellis(common_levels(fmt.id, torch.device("cpu")).float(), GAUSSIAN_RATIOS[fmt.id])


def fit_trellis(blocks: torch.Tensor, fmt: BlockFormat, effort: TrellisEffort, weights: int | None = None) -> Trellis:
    """Fit the ratio, and levels unless the common ones are as good for their size, to a sample of a tensor.

    Args:
        blocks: the sample, fp32 of shape (blocks, 64), finite.
        fmt: a trellis format.
        effort: how much work this may take.
        weights: number of weights of the whole tensor; None: levels are always fitted.
    """
    start = gaussian_trellis(fmt)
    blocks = blocks[largest_magnitudes(blocks) > 0]
    if not len(blocks):
        return start
    few = blocks[:: -(-len(blocks) // RATIO_BLOCKS)]
    ratios = [start.ratio * 2 ** (step / SCALE_STEPS_PER_OCTAVE) for step in RATIO_STEPS]
    scales = torch.stack([usual_scales(few, ratio) for ratio in ratios])
    errors = TrellisCoder(start.levels, fmt, few.device).encode((few / scales[:, :, None]).view(-1, BLOCK))[1]
    best = (errors.view(scales.shape) * scales.square()).sum(dim=1).argmin().item()
    common = Trellis(start.levels, ratios[best])
    fitted, error = lloyd(blocks, common, fmt, effort.rounds, PRIOR_USES)
    if weights is None or own_levels_pay(error, _coded(blocks, common, fmt)[0], fmt, weights):
        return fitted
    return common


def lloyd(
    blocks: torch.Tensor, start: Trellis, fmt: BlockFormat, rounds: int, prior_uses: float
) -> tuple[Trellis, float]:
    """Alternate between choosing codes and moving each level to the mean of its weights.

    Returns:
        The best round's levels and ratio, and their sum of squared errors.
    """
    trellis, best, least = start, start, math.inf
    for number in range(rounds + 1):
        error, numbers, values, importance = _coded(blocks, trellis, fmt)
        if error < least:
            best, least = trellis, error
        if number == rounds:
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
    codes, errors = TrellisCoder(trellis.levels, fmt, blocks.device).encode(values)
    importance = scales.double().square()
    return float((errors.double() * importance[:, 0]).sum()), level_numbers(codes, fmt), values.double(), importance


def level_numbers(codes: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """The level number of every weight, int32, 1-D, from codes of shape (blocks, 64)."""
    stream = codes.int()
    numbers = stream.clone()
    for back in range(1, -(-fmt.window // fmt.code_bits)):
        numbers |= stream.roll(back, dims=1) << back * fmt.code_bits
    return numbers.bitwise_and_(fmt.levels - 1).view(-1)
