"""Errors in decibels: of one tensor, of layers together, as text."""

from __future__ import annotations

import math

import pytest
import torch
from samples import random_half

from nfq_core.decibels import decibels_in_words, pooled_sqnr_db, ratio_in_words, sqnr_db


@pytest.mark.parametrize(
    ("original", "approximation", "wanted"),
    [
        ([1.0, -1.0], [1.0, -1.0], math.inf),
        # Variance 1, errors 0.1: 20 dB.
        ([1.0, -1.0], [1.1, -0.9], 20.0),
        # The mean is no signal: variance 1 again.
        ([11.0, 9.0], [11.1, 8.9], 20.0),
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([0.0, 0.0], [0.0, 1.0], -math.inf),
        # Beyond fp16 is infinite.
        ([1.0, -1.0], [math.inf, -1.0], -math.inf),
        # A constant has no variance; its mean square is 4, errors 0.2.
        ([2.0, 2.0], [2.2, 1.8], 20.0),
    ],
)
def test_sqnr_by_hand(original, approximation, wanted):
    found = sqnr_db(torch.tensor(original, dtype=torch.float64), torch.tensor(approximation, dtype=torch.float64))
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("weights", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_sqnr_does_not_depend_on_its_chunks(weights, mean):
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(weights, generator=generator, dtype=torch.float64) + mean
    # The noise of the last chunk is far louder than that of the others.
    noise = torch.randn(weights, generator=generator, dtype=torch.float64) * 0.01
    noise[1 << 20 :] *= 30
    wanted = 10 * torch.log10(original.var(correction=0) / noise.square().mean()).item()
    assert sqnr_db(original, original + noise) == pytest.approx(wanted, abs=1e-6)


def test_sqnr_of_a_large_constant_takes_its_mean_square():
    # 0.1 is no binary number: the sums round, and their difference is not 0.
    original = torch.full((3 << 20,), 0.1, dtype=torch.float64)
    assert sqnr_db(original, original * 1.01) == pytest.approx(40, abs=1e-6)


def test_sqnr_takes_any_strides_and_dtypes():
    original = random_half(30, 40).float()
    approximation = (original + 0.01).half()
    wanted = sqnr_db(original.flatten(), approximation.flatten())
    assert sqnr_db(original.T.contiguous().T, approximation.float()) == wanted


def test_the_noise_of_layers_adds_up_by_weights():
    # Noise 0.1 of three quarters and 0.01 of one quarter: 0.0775. The mean of dB would be 12.5.
    assert pooled_sqnr_db([(300, 10.0), (100, 20.0)]) == pytest.approx(-10 * math.log10(0.0775))
    assert pooled_sqnr_db(iter([(5, 21.5)])) == pytest.approx(21.5)
    # Louder than the weights: noise 10 of half.
    assert pooled_sqnr_db([(1, -10.0), (1, 90.0)]) == pytest.approx(-10 * math.log10(5))


@pytest.mark.parametrize("exact", [None, math.inf])
def test_exact_layers_add_weights_and_no_noise(exact):
    # Noise 0.1 of one tenth: 0.01.
    assert pooled_sqnr_db([(9, exact), (1, 10.0)]) == pytest.approx(20)
    assert pooled_sqnr_db([(9, exact), (1, exact)]) is None


def test_no_layers_have_no_noise():
    assert pooled_sqnr_db([]) is None
    assert pooled_sqnr_db([(0, 10.0)]) is None


def test_layers_of_one_variance_have_the_noise_of_their_weights_together():
    original = random_half(64, 64).double()
    original -= original.mean(dim=1, keepdim=True)
    original /= original.std(dim=1, correction=0, keepdim=True)
    approximation = original.clone()
    approximation[:48] += 0.1
    approximation[48:60] -= 0.5
    parts = [(part.numel(), sqnr_db(part, other)) for part, other in zip(original, approximation, strict=True)]
    assert pooled_sqnr_db(parts) == pytest.approx(sqnr_db(original, approximation))


def test_words():
    assert [ratio_in_words(21.456), ratio_in_words(21.456, 1), ratio_in_words(None)] == ["21.46", "21.5", "equal"]
    assert [decibels_in_words(-3.0), decibels_in_words(3.0, 0), decibels_in_words(None)] == [
        "-3.00 dB",
        "3 dB",
        "equal",
    ]
