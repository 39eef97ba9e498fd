"""Blocks far below their tensor's largest magnitude: kept apart from zeros, or the tensor is kept as it is."""

from __future__ import annotations

import logging

import pytest
import torch
from samples import random_weight

from nfq_core import CannotQuantizeError, quantize, quantize_state_dict
from nfq_core.fitting.search import FP16_ZERO, MAX_LIFT, grid_and_factor

FORMATS = ["nf32_b64", "nf16_b64", "nf7_b64", "nf256_b64", "t2w8_b64", "t4w8_b64"]
ROWS = 64


def spread(kind: str) -> torch.Tensor:
    """Blocks of one row each; `half of them` and `decades` lie around or below the smallest normal fp16 number."""
    even = torch.arange(ROWS) % 2 == 0
    sizes = {
        "decades": torch.logspace(-5, 0, ROWS) * 0.05,
        "half of them": torch.where(even, 0.05, 0.05 * 1e-5),
        "half of them, from 1": torch.where(even, 1.0, 1e-5),
        "half of them, from 1,000": torch.where(even, 1000.0, 0.01),
        "pruned": torch.where(even, 0.05, 0.0),
        "beyond fp16": torch.where(even, 0.05, 1e-20),
    }[kind]
    return random_weight(ROWS, 64) * sizes[:, None]


def relative_errors(weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The power of each block's error in terms of its own, of those that are not zero in fp16."""
    wanted = weight.abs().amax(dim=1) > FP16_ZERO
    error = (found - weight).double().square().sum(dim=1) / weight.double().square().sum(dim=1).clamp_min(1e-300)
    return error[wanted]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["decades", "half of them", "half of them, from 1", "half of them, from 1,000"])
def test_small_blocks_are_as_good_as_large_ones(format: str, kind: str) -> None:
    """But for the rounding to fp16: its numbers are 2**-24 apart, so that a weight errs by a 12th of that squared."""
    weight = spread(kind)
    plain = quantize(random_weight(ROWS, 64), format=format).dequantize(torch.float32)
    usual = relative_errors(random_weight(ROWS, 64), plain).max()
    rounding = 2.0**-48 / 12 / weight.double().square().mean(dim=1).min()
    packed = quantize(weight, format=format)
    packed.validate()
    errors = relative_errors(weight, packed.dequantize(torch.float32))
    # The grid is at most three times as coarse as the finest: half a step of 3/16 octaves more, in a block's scale.
    assert errors.max() <= 2 * usual + 2 * rounding


@pytest.mark.parametrize("format", ["nf16_b64", "t3w8_b64"])
@pytest.mark.parametrize("kind", ["pruned", "beyond fp16"])
def test_zeros_in_fp16_are_zeros_and_nothing_is_said(caplog, format: str, kind: str) -> None:
    weight = spread(kind)
    with caplog.at_level(logging.WARNING, logger="nfq"):
        packed = quantize_state_dict({"a.weight": weight}, format=format)["a.weight"]
    assert not caplog.records
    zero = weight.abs().amax(dim=1) <= FP16_ZERO
    assert zero.sum() == ROWS // 2
    assert torch.equal(packed.dequantize(torch.float32)[zero], torch.zeros(ROWS // 2, 64))
    # They cost the others nothing: the finest grid, and weights as they are.
    grid, factor = grid_and_factor(weight.abs().amax(dim=1))
    assert (grid.stride, factor) == (1, 1.0)


@pytest.mark.parametrize("format", ["nf16_b64", "t3w8_b64"])
def test_a_tensor_that_no_grid_spans_is_kept_with_a_warning(caplog, format: str) -> None:
    weight = random_weight(400, 64)
    weight[:100] *= 1e-5
    weight[100:] *= 8000
    with pytest.raises(CannotQuantizeError, match=r"25\.0% of its blocks that hold weights would decode to zeros"):
        quantize(weight, format=format)
    with caplog.at_level(logging.WARNING, logger="nfq"):
        kept = quantize_state_dict({"a.weight": weight}, format=format)["a.weight"]
    assert kept is weight
    (record,) = caplog.records
    assert "'a.weight' is kept as it is: 25.0% of its blocks" in record.getMessage()


def test_one_in_a_hundred_may_be_lost() -> None:
    for lost, refused in ((4, False), (5, True)):
        weight = random_weight(400, 64) * 8000
        weight[:lost] *= 1e-9
        if refused:
            with pytest.raises(CannotQuantizeError, match=r"1\.2% of its blocks"):
                quantize(weight)
        else:
            assert not quantize(weight).dequantize()[:lost].any()


def test_weights_are_lifted_no_further_than_fp16_reaches() -> None:
    for smallest, wanted in ((2.0**-14, 0), (2.0**-16, 2), (2.0**-24, MAX_LIFT)):
        grid, factor = grid_and_factor(torch.tensor([2.0**-9, smallest]))
        assert factor == 2.0**wanted
        assert grid.magnitudes[0] / factor <= max(smallest, 2.0**-22)
        assert grid.magnitudes[-1] / factor >= 2.0**-9
