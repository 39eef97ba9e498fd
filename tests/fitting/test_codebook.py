"""Codebooks fitted to a tensor's blocks."""

from __future__ import annotations

import math

import pytest
import torch
from samples import random_weight

from nfq_core.fitting.codebook import EFFORTS, STORED_BITS, Codebook, Effort, fit_codebook
from nfq_core.fitting.search import BlockQuantizer, ScaleGrid, largest_magnitudes
from nfq_core.packed.codec import expected_code_bits
from nfq_core.packed.formats import LEVELS, nf_format

BLOCKS = 768
WHOLE = 4_000_000
"""Weights of the tensor that the blocks are a sample of."""

START, FIT, FIT_TO_SIZE = Effort(BLOCKS, 1, False), Effort(BLOCKS, 8, False), Effort(BLOCKS, 8, True)


def gaussian() -> torch.Tensor:
    return random_weight(BLOCKS, 64)


def uniform() -> torch.Tensor:
    return torch.rand(BLOCKS, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def student() -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, BLOCKS, 64, generator=generator)
    return normal[0] / normal[1:].square().mean(dim=0).sqrt()


def fit(blocks: torch.Tensor, levels: int, effort: Effort) -> Codebook:
    return fit_codebook(blocks, grid_for(blocks, levels), nf_format(levels), effort, WHOLE)


def grid_for(blocks: torch.Tensor, levels: int) -> ScaleGrid:
    return ScaleGrid.for_blocks(largest_magnitudes(blocks), 1 if levels >= 16 else 2)


def error_of(blocks: torch.Tensor, levels: torch.Tensor) -> float:
    """Mean squared error under searched scales, in the units of Codebook.error."""
    largest = largest_magnitudes(blocks)
    quantizer = BlockQuantizer(levels, grid_for(blocks, len(levels)), blocks.device)
    scales = quantizer.scales(quantizer.scale_codes(blocks, largest))
    decoded = levels[quantizer.codes(blocks, scales).long()] * scales[:, None]
    return relative_error(blocks, decoded)


def relative_error(blocks: torch.Tensor, decoded: torch.Tensor) -> float:
    squares = (blocks - decoded).double().square().sum()
    return float(squares / largest_magnitudes(blocks).double().square().sum() / blocks.shape[1])


def code_bits(book: Codebook, levels: int) -> float:
    return expected_code_bits(book.uses.sort(descending=True).values, nf_format(levels), WHOLE)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sample", [gaussian, uniform, student])
@pytest.mark.parametrize("effort", [FIT, FIT_TO_SIZE])
def test_levels_are_ascending_fp16_with_largest_magnitude_1(levels, sample, effort):
    book = fit(sample(), levels, effort)
    assert book.levels.shape == book.prices.shape == book.uses.shape == (levels,)
    assert (book.levels.diff() > 0).all()
    assert torch.equal(book.levels.half().float(), book.levels)
    assert book.levels.abs().amax() == 1
    assert book.uses.sum() == BLOCKS * 64
    if not effort.limit_size:
        assert (book.prices == 0).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sample", [gaussian, uniform, student])
def test_fitting_improves_on_the_start(levels, sample):
    start, fitted = fit(sample(), levels, START), fit(sample(), levels, FIT)
    assert fitted.error < start.error
    assert fitted.error == pytest.approx(error_of(sample(), fitted.levels), rel=1e-5)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sample", [gaussian, student])
def test_the_start_is_better_than_even_levels(levels, sample):
    assert fit(sample(), levels, START).error < error_of(sample(), torch.linspace(-1, 1, levels).half().float())


def nf4_levels() -> torch.Tensor:
    """NF4 from its definition (QLoRA, arXiv 2305.14314): normal quantiles, eight of them above zero and seven below."""
    offset = 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(count: int) -> list[float]:
        probabilities = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]
        return (math.sqrt(2) * torch.erfinv(2 * probabilities - 1)).tolist()

    positive, negative = quantiles(8), quantiles(7)
    levels = torch.tensor([*(-value for value in negative), 0.0, *reversed(positive)])
    return levels / levels.abs().amax()


@pytest.mark.parametrize("sample", [gaussian, uniform, student])
def test_a_fitted_codebook_beats_nf4_with_exact_absmax_scales(sample):
    blocks = sample()
    nf4 = nf4_levels()
    assert len(nf4) == 16
    assert nf4[:2].tolist() == pytest.approx([-1.0, -0.6961928], abs=1e-5)
    scales = largest_magnitudes(blocks)[:, None]
    nearest = (blocks / scales)[..., None].sub(nf4).abs().argmin(dim=-1)
    assert fit(blocks, 16, FIT).error < relative_error(blocks, nf4[nearest] * scales)


@pytest.mark.parametrize("levels", LEVELS)
def test_heavy_tails_and_light_ones_get_codebooks_of_their_own(levels):
    for_gaussian = fit(gaussian(), levels, FIT).levels
    for blocks in (student(), uniform()):
        assert fit(blocks, levels, FIT).error < error_of(blocks, for_gaussian)


@pytest.mark.parametrize("levels", LEVELS)
def test_size_limit_holds_where_codes_are_used_evenly(levels):
    free, held = fit(uniform(), levels, FIT), fit(uniform(), levels, FIT_TO_SIZE)
    assert code_bits(free, levels) > STORED_BITS[levels], "without a limit these codes should be too many bits"
    assert code_bits(held, levels) <= STORED_BITS[levels]
    assert (held.prices > 0).any()
    # Measured: 1.33 times the error at most.
    assert free.error < held.error < 1.5 * free.error


@pytest.mark.parametrize("levels", LEVELS)
def test_size_limit_leaves_gaussian_weights_alone(levels):
    free, held = fit(gaussian(), levels, FIT), fit(gaussian(), levels, FIT_TO_SIZE)
    assert code_bits(free, levels) <= STORED_BITS[levels]
    assert torch.equal(free.levels, held.levels)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("effort", EFFORTS.values())
def test_zero_blocks_still_give_a_valid_codebook(levels, effort):
    book = fit(torch.zeros(BLOCKS, 64), levels, effort)
    assert (book.levels.diff() > 0).all()
    assert book.levels.abs().amax() == 1
    assert book.error == 0
