"""Levels and scales of trellis formats, fitted to a tensor."""

from __future__ import annotations

import pytest
import torch
from reference import TRELLIS_IDS, parse_trellis, sqnr_db
from samples import random_weight

from nfq_core import quantize
from nfq_core.fitting.search import ScaleGrid, largest_magnitudes
from nfq_core.fitting.trellis_fit import (
    TRELLIS_EFFORTS,
    OtherScales,
    Trellis,
    TrellisEffort,
    TrellisQuantizer,
    fit_trellis,
    gaussian_trellis,
    lloyd,
    usual_scales,
)
from nfq_core.packed.formats import format_by_id

START = TrellisEffort(1024, 0, (0,))

SCALAR = {3: "nf7_b64", 4: "nf16_b64", 5: "nf32_b64"}
"""Scalar formats of about as many bits as trellis formats, by the bits of their codes."""

FLOORS = (11.3, 17.2, 23.0, 28.9, 34.7)
"""Gaussian weights, dB, at these formats. Measured: 0.1 to 0.2 more, both signs of a scale being tried."""


def heavy_tailed(blocks: int) -> torch.Tensor:
    return random_weight(blocks, 64) / random_weight(blocks, 64, 5, seed=1).square().mean(dim=2).sqrt()


def error_of(weight: torch.Tensor, **settings: str) -> float:
    return (weight - quantize(weight, **settings).dequantize(torch.float32)).double().square().sum().item()


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_starting_levels(format_id):
    trellis = gaussian_trellis(format_by_id(format_id))
    assert trellis.levels.shape == (format_by_id(format_id).levels,)
    assert trellis.levels.abs().amax() == 1
    assert torch.equal(trellis.levels.half().float(), trellis.levels)


def test_usual_scales_by_hand():
    blocks = torch.zeros(3, 64)
    blocks[0], blocks[1, 5], blocks[2, :4] = 0.5, -8.0, 1.0
    # The mean fourth power of four ones is 1/16; one weight alone would get 2 * 8 / 64**0.25 = 5.7.
    assert usual_scales(blocks, 2.0).tolist() == pytest.approx([1.0, 0.95 * 8, 1.0])


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_fitting_improves_on_the_start_where_tails_are_heavy(format_id):
    blocks, fmt = heavy_tailed(600), format_by_id(format_id)
    start = fit_trellis(blocks, fmt, START)
    fitted = fit_trellis(blocks, fmt, TRELLIS_EFFORTS["fast"])
    errors = [lloyd(blocks, trellis, fmt, 0, 0)[1] for trellis in (start, fitted)]
    assert errors[1] < errors[0]
    assert fitted.levels.abs().amax() == 1
    assert torch.equal(fitted.levels.half().float(), fitted.levels)


def test_a_few_blocks_hardly_move_the_levels():
    start = gaussian_trellis(format_by_id("t4w8_b64"))
    fitted = fit_trellis(random_weight(1, 64), format_by_id("t4w8_b64"), TRELLIS_EFFORTS["best"])
    assert (fitted.levels - start.levels).abs().amax() < 0.1


def test_nothing_but_zeros_leaves_the_start():
    fmt = format_by_id("t4w8_b64")
    assert fit_trellis(torch.zeros(5, 64), fmt, TRELLIS_EFFORTS["fast"]) is gaussian_trellis(format_by_id("t4w8_b64"))


def test_both_signs_are_used_and_the_better_one_is_taken():
    blocks, fmt = random_weight(200, 64), format_by_id("t4w8_b64")
    grid = ScaleGrid.for_blocks(largest_magnitudes(blocks))
    quantizer = TrellisQuantizer(gaussian_trellis(fmt), fmt, grid, blocks.device, OtherScales())
    scale_codes = quantizer.encode(blocks, largest_magnitudes(blocks))[0]
    # 200 coin tosses stray by 7 σ = 0.25.
    assert 0.25 < (scale_codes >= 128).float().mean() < 0.75


def test_levels_of_one_sign_get_scales_of_the_right_one():
    fmt = format_by_id("t4w8_b64")
    blocks = random_weight(20, 64).abs_()
    blocks[::2] *= -1
    trellis = Trellis(gaussian_trellis(fmt).levels.abs(), 2.3)
    grid = ScaleGrid.for_blocks(largest_magnitudes(blocks))
    quantizer = TrellisQuantizer(trellis, fmt, grid, blocks.device, OtherScales())
    scale_codes = quantizer.encode(blocks, largest_magnitudes(blocks))[0]
    assert (scale_codes >= 128).tolist() == [True, False] * 10


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_best_is_better_than_fast(format_id):
    weight = heavy_tailed(256)
    assert error_of(weight, format=format_id, effort="best") < error_of(weight, format=format_id)


@pytest.mark.parametrize(("format_id", "floor"), list(zip(TRELLIS_IDS, FLOORS, strict=True)))
def test_gaussian_weights(format_id, floor):
    weight = random_weight(256, 512) * 0.02
    found = sqnr_db(weight.numpy(), quantize(weight, format=format_id).dequantize(torch.float32).numpy())
    assert found > floor
    bits = parse_trellis(format_id)[0]
    if bits in SCALAR:
        scalar = quantize(weight, format=SCALAR[bits]).dequantize(torch.float32)
        # Measured: 1.1 to 2.9 dB.
        assert found > sqnr_db(weight.numpy(), scalar.numpy()) + 0.9
