"""Fitting the levels of one tensor: Lloyd's algorithm on a sample of its blocks, with searched scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..packed.codec import FRAME_BYTES, expected_code_bits
from ..packed.layout import BLOCK, BlockFormat
from .own_levels import own_levels_pay
from .search import BlockQuantizer, ScaleGrid, largest_magnitudes

STORED_BITS = {32: 4.93, 24: 4.50, 16: 3.915, 12: 3.49, 7: 2.78}
"""Limit of bits per code on disk, by number of levels: what the codes of Gaussian weights take.

Weights with lighter tails use all levels almost equally often, which no entropy coder can shorten. 256 levels have no
limit: they are for layers whose size matters least.
"""

RATE_ROUNDS = 10
"""Rounds of Lloyd's algorithm per price."""

PRICE_STEPS = 5
"""Bisection steps for the price per bit."""

MIN_ERROR = 1e-12
"""Lower bound of `Codebook.error`; anything smaller is rounding noise."""


@dataclass(frozen=True)
class Effort:
    """How much work fitting may take.

    Args:
        sample_blocks: number of blocks sampled from a tensor.
        rounds: rounds of Lloyd's algorithm.
        limit_size: whether codes must stay within STORED_BITS, by entropy-constrained fitting.
    """

    sample_blocks: int
    rounds: int
    limit_size: bool


EFFORTS = {"fast": Effort(2048, 8, False), "best": Effort(16384, 40, True)}


def effort_by_name(name: str) -> Effort:
    """Look up one of EFFORTS; ValueError for any other name."""
    if name not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {name!r}")
    return EFFORTS[name]


@dataclass(frozen=True)
class Codebook:
    """Levels fitted to a tensor.

    Args:
        levels: ascending, fp32 of shape (n,), exact in fp16, with largest magnitude 1.
        prices: see BlockQuantizer, fp32 of shape (n,).
        uses: uses of each level in the sample, int64 of shape (n,).
        error: mean squared error in the sample, relative to the squares of the blocks' largest magnitudes.
    """

    levels: torch.Tensor
    prices: torch.Tensor
    uses: torch.Tensor
    error: float


def fit_codebook(
    blocks: torch.Tensor,
    grid: ScaleGrid,
    fmt: BlockFormat,
    effort: Effort,
    weights: int,
    importance: torch.Tensor | None = None,
    common: torch.Tensor | None = None,
) -> Codebook:
    """Fit levels to a sample of a tensor, unless the common ones are as good for their size.

    Args:
        blocks: the sample, fp32 of shape (blocks, 64), finite.
        grid: the scales that may be used.
        fmt: a scalar format, which gives the number of levels.
        effort: how much work this may take.
        weights: number of weights of the whole tensor.
        importance: factor of each weight's squared error, fp32 of shape (blocks, 64), about 1 on average; None: all 1.
        common: the common levels, ascending, fp32 of shape (n,), if the tensor may use them.
    """
    largest = largest_magnitudes(blocks)
    used = largest > 0
    blocks, largest = blocks[used], largest[used]
    importance = None if importance is None else importance[used]
    levels = _starting_levels(blocks, fmt.levels)
    if not len(blocks):
        return _unused(levels if common is None else common)
    book = _lloyd(blocks, largest, grid, levels, 0.0, effort.rounds, importance)
    if common is not None:
        common_error = _lloyd(blocks, largest, grid, common, 0.0, 1, importance).error
        return book if own_levels_pay(book.error, common_error, fmt, weights) else _unused(common)
    if not effort.limit_size or fmt.levels not in STORED_BITS:
        return book

    # As if frames were full: the entropy coder's table, which dominates small tensors, costs the same for any levels.
    counted_weights = max(weights, FRAME_BYTES * fmt.coarse_digits)

    def fits(candidate: Codebook) -> bool:
        uses = candidate.uses.sort(descending=True).values
        return expected_code_bits(uses, fmt, counted_weights) <= STORED_BITS[fmt.levels]

    return book if fits(book) else _cheapest(blocks, largest, grid, book, fits, importance)


def _unused(levels: torch.Tensor) -> Codebook:
    """Levels in their own order, without prices."""
    return Codebook(levels, torch.zeros_like(levels), torch.ones_like(levels, dtype=torch.int64), 0.0)


def _cheapest(
    blocks: torch.Tensor,
    largest: torch.Tensor,
    grid: ScaleGrid,
    book: Codebook,
    fits: Callable[[Codebook], bool],
    importance: torch.Tensor | None,
) -> Codebook:
    """The codebook with the lowest price per bit that fits: entropy-constrained quantisation (Chou et al., 1989)."""
    low, high = 0.0, 0.25 * book.error
    while True:
        best = _lloyd(blocks, largest, grid, book.levels, high, RATE_ROUNDS, importance)
        if fits(best) or high > 8 * book.error:
            break
        low, high = high, 2 * high
    for _ in range(PRICE_STEPS):
        price = (low + high) / 2
        candidate = _lloyd(blocks, largest, grid, book.levels, price, RATE_ROUNDS, importance)
        if fits(candidate):
            best, high = candidate, price
        else:
            low = price
    return best


def _lloyd(
    blocks: torch.Tensor,
    largest: torch.Tensor,
    grid: ScaleGrid,
    levels: torch.Tensor,
    price: float,
    rounds: int,
    importance: torch.Tensor | None,
) -> Codebook:
    """Alternate between choosing scales and codes, and moving each level to the mean of its weights.

    `price` is the cost of one bit, in the unit of `Codebook.error`. Without a price, the best round is returned. With a
    price, the last: the objective then changes between rounds, with the frequencies of the levels.
    """
    count = len(levels)
    prices = torch.zeros_like(levels)
    weighted = blocks if importance is None else blocks * importance
    energy = float((weighted.double() * blocks).sum())
    unit = float(largest.double().square().sum()) * BLOCK
    best: Codebook | None = None
    for _ in range(rounds):
        quantizer = BlockQuantizer(levels, grid, blocks.device, prices)
        scales = quantizer.scales(quantizer.scale_codes(blocks, largest, importance))
        codes = quantizer.codes(blocks, scales).view(-1)
        # The error of a level over its weights x is Σ (x - level · s)² = Σ x² - 2 · level · Σ x·s + level² · Σ s², each
        # term multiplied by the weight's importance.
        uses = torch.bincount(codes, minlength=count).cpu()
        products = (weighted * scales[:, None]).view(-1).double()
        squares = scales.square()[:, None].expand_as(blocks)
        squares = (squares if importance is None else squares * importance).reshape(-1).double()
        sums = torch.bincount(codes, products, minlength=count).cpu()
        totals = torch.bincount(codes, squares, minlength=count).cpu()
        exact = levels.double()
        error = energy - 2 * (exact @ sums) + exact.square() @ totals
        book = Codebook(levels, prices, uses, max(float(error) / unit, MIN_ERROR))
        if best is None or price or book.error < best.error:
            has_converged = best is not None and not price and book.error > best.error * 0.9998
            best = book
            if has_converged:
                break
        levels = _normalised(torch.where(totals > 0, sums / totals, exact))
        prices = -price * ((book.uses.float() + 1.0) / (book.uses.sum() + count)).log2()
    return best


def _normalised(levels: torch.Tensor) -> torch.Tensor:
    """Levels scaled to largest magnitude 1, rounded to fp16, ascending."""
    levels = levels / levels.abs().amax().clamp_min(1e-30)
    return levels.half().float().sort().values


def _starting_levels(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Initial levels: their density is the cube root of the weights' density (Panter and Dite), from a histogram."""
    if not len(blocks):
        return torch.linspace(-1, 1, count, dtype=torch.float32, device="cpu").half().float()
    extremes = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    histogram = torch.histc((blocks / extremes).cpu(), bins=512, min=-1, max=1)
    smooth = torch.nn.functional.avg_pool1d(histogram.view(1, 1, -1), 9, 1, 4).view(-1)
    density = smooth.double().add_(1e-3).pow_(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count * density[-1]
    levels = torch.searchsorted(density, wanted).float() / 256 - 1.0
    return _normalised(levels)
