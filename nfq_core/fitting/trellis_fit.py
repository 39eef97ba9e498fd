"""Fitting a trellis format to one tensor: its levels, and what scale a block gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..packed.formats import BLOCK, SCALE_STEPS_PER_OCTAVE, TRELLIS_IDS, BlockFormat
from .search import ZERO_BELOW, ScaleGrid, largest_magnitudes
from .trellis import TrellisCoder

STARTING_LEVELS = Path(__file__).with_name("trellis_levels.safetensors")
"""For each trellis format, levels fitted to Gaussian blocks, and the `ratio` (see Trellis) that goes with them."""

RATIO_STEPS = (-3, 0, 3, 6)
"""Sixteenths of an octave by which other ratios are tried than that for Gaussian blocks; heavy tails want more."""

RATIO_BLOCKS = 256
"""Blocks of the sample that ratios are tried on."""

LEAST_REACH = 0.95
"""No usual scale is below this part of its block's largest magnitude: it keeps outliers, and costs others nothing."""

PRIOR_USES = 16
"""A level is as hard to move as if so many weights had its starting value: few samples must not be fitted too well."""


@dataclass(frozen=True)
class TrellisEffort:
    """How much work fitting and searching may take.

    Args:
        sample_blocks: blocks sampled from a tensor.
        rounds: rounds of Lloyd's algorithm.
        scale_steps: sixteenths of an octave from a block's usual scale to those tried for it, each with both signs.
    """

    sample_blocks: int
    rounds: int
    scale_steps: tuple[int, ...]


TRELLIS_EFFORTS = {"fast": TrellisEffort(2048, 3, (0,)), "best": TrellisEffort(4096, 10, (-2, 0, 2))}


@dataclass(frozen=True)
class Trellis:
    """Levels fitted to a tensor.

    Args:
        levels: in the order of their numbers, exact in fp16, fp32 of shape (n,), the largest magnitude being 1.
        ratio: a block's usual scale in terms of the fourth root of its weights' mean fourth power, which lies between
            the root mean square and the largest magnitude, and serves Gaussian and heavy-tailed blocks alike.
    """

    levels: torch.Tensor
    ratio: float


class TrellisQuantizer:
    """Chooses scale codes and codes for blocks.

    Args:
        trellis: what was fitted.
        fmt: its format.
        grid: the scales that may be used.
        device: where the blocks are.
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
        """The scale codes, uint8 of shape (blocks,), 0 for a zero block, and codes, uint8 of shape (blocks, 64).

        Every block is coded with each scale that is tried for it; the least squared error counts.
        """
        usual = usual_scales(blocks, self._ratio)
        octaves = usual.clamp_min(self._magnitudes[0]).log2() - self._grid.exponent
        middle = (octaves * (SCALE_STEPS_PER_OCTAVE / self._grid.stride)).round().to(torch.int32)
        indices = torch.stack([middle + step for step in self._steps]).clamp_(0, len(self._magnitudes) - 1)
        scales = self._magnitudes[indices]
        signed = torch.stack([scales, -scales]).flatten(0, 1)
        names = torch.stack([indices + 1, indices + 129]).flatten(0, 1).to(torch.uint8)
        # All of them at once: small tensors are a matter of calls.
        codes, errors = self._coder.encode((blocks / signed[:, :, None]).view(-1, BLOCK))
        best = (errors.view(signed.shape) * signed.square()).argmin(dim=0, keepdim=True)
        best_scales = names.gather(0, best).squeeze(0)
        best_codes = codes.view(*signed.shape, BLOCK).gather(0, best[:, :, None].expand(-1, -1, BLOCK)).squeeze(0)
        return best_scales.masked_fill_(largest < ZERO_BELOW * self._magnitudes[0], 0), best_codes


def usual_scales(blocks: torch.Tensor, ratio: float) -> torch.Tensor:
    """The scale of each block that is tried first, fp32 of shape (blocks,); see `Trellis.ratio`."""
    largest = largest_magnitudes(blocks).clamp_min(1e-30)
    relative = (blocks / largest[:, None]).square_().square_().mean(dim=1).pow_(0.25)
    return relative.mul_(ratio).clamp_min_(LEAST_REACH).mul_(largest)


@lru_cache(1)
def starting_trellises() -> dict[str, Trellis]:
    """By format id, what Gaussian blocks want."""
    stored = load_file(STARTING_LEVELS)
    return {id: Trellis(stored[id].float(), stored[f"{id}.ratio"].item()) for id in TRELLIS_IDS}


def fit_trellis(blocks: torch.Tensor, fmt: BlockFormat, effort: TrellisEffort) -> Trellis:
    """Fit levels and the ratio to a sample of a tensor.

    Args:
        blocks: the sample, fp32 of shape (blocks, 64), finite.
        fmt: a trellis format.
        effort: how much work this may take.
    """
    start = starting_trellises()[fmt.id]
    blocks = blocks[largest_magnitudes(blocks) > 0]
    if not len(blocks):
        return start
    few = blocks[:: -(-len(blocks) // RATIO_BLOCKS)]
    ratios = [start.ratio * 2 ** (step / SCALE_STEPS_PER_OCTAVE) for step in RATIO_STEPS]
    scales = torch.stack([usual_scales(few, ratio) for ratio in ratios])
    errors = TrellisCoder(start.levels, fmt, few.device).encode((few / scales[:, :, None]).view(-1, BLOCK))[1]
    best = (errors.view(scales.shape) * scales.square()).sum(dim=1).argmin().item()
    return lloyd(blocks, Trellis(start.levels, ratios[best]), fmt, effort.rounds, PRIOR_USES)[0]


def lloyd(
    blocks: torch.Tensor, start: Trellis, fmt: BlockFormat, rounds: int, prior_uses: float
) -> tuple[Trellis, float]:
    """Alternate between choosing codes and moving each level to the mean of its weights; the best round counts.

    Returns:
        The levels, and the sum of their squared errors.
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
    """Code blocks with their usual scales, any scale being allowed.

    Returns:
        The sum of squared errors; the numbers of the weights' levels, flat; the weights divided by their scales, fp64
        of shape (blocks, 64); and what their squared errors count, the scales squared, fp64 of shape (blocks, 1).
    """
    scales = usual_scales(blocks, trellis.ratio)[:, None]
    values = blocks / scales
    codes, errors = TrellisCoder(trellis.levels, fmt, blocks.device).encode(values)
    importance = scales.double().square()
    return float((errors.double() * importance[:, 0]).sum()), level_numbers(codes, fmt), values.double(), importance


def level_numbers(codes: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """The number of every weight's level, int32, flat, from codes of shape (blocks, 64)."""
    stream = codes.int()
    numbers = stream.clone()
    for back in range(1, -(-fmt.window // fmt.code_bits)):
        numbers |= stream.roll(back, dims=1) << back * fmt.code_bits
    return numbers.bitwise_and_(fmt.levels - 1).view(-1)
