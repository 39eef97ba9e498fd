"""Trellis codes with error feedback: histories by definition, what searching again gains, and any shape of weight."""

from __future__ import annotations

import sys

import pytest
import torch
from samples import SINGULAR, correlated, output_error, random_weight, second_moment

from nfq_core import quantize
from nfq_core.fitting import feedback
from nfq_core.fitting import trellis_feedback as module
from nfq_core.fitting.feedback import SecondMoment
from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.fitting.trellis_feedback import FeedbackCoder
from nfq_core.fitting.trellis_fit import gaussian_trellis, level_numbers
from nfq_core.packed.formats import FORMATS, TRELLIS_IDS

CPU = torch.device("cpu")
NO_GAINS = torch.zeros(64, 64)


def coder(format: str) -> FeedbackCoder:
    return FeedbackCoder(gaussian_trellis(FORMATS[format]).levels, FORMATS[format], CPU)


def some_gains(seed: int = 0) -> torch.Tensor:
    return (0.1 * random_weight(64, 64, seed=seed)).triu(1)


@pytest.mark.parametrize("format", TRELLIS_IDS)
def test_errors_are_those_of_the_codes_by_definition(format: str, backend: str) -> None:
    """What each survivor carried along must be the errors on its own way: any mistake in a history shows here."""
    values, gains = 0.3 * random_weight(33, 64), some_gains()
    codes, errors = coder(format).encode(values, random_weight(64, seed=1).exp(), gains)
    numbers = level_numbers(codes, FORMATS[format]).view(codes.shape)
    reached = gaussian_trellis(FORMATS[format]).levels[numbers.long()]
    wanted = torch.zeros_like(values)
    for step in range(64):
        wanted[:, step] = values[:, step] - wanted[:, :step] @ gains[:step, step] - reached[:, step]
    assert torch.allclose(errors, wanted, atol=1e-5)


@pytest.mark.parametrize("format", TRELLIS_IDS)
def test_without_feedback_it_is_the_plain_search(format: str, backend: str) -> None:
    values = 0.3 * random_weight(50, 64)
    errors = coder(format).encode(values, torch.ones(64), NO_GAINS)[1].square().sum(dim=1)
    plain = TrellisCoder(gaussian_trellis(FORMATS[format]).levels, FORMATS[format], CPU).encode(values)[1]
    # Costs lose up to five bits of their mantissas, so that a few choices between almost equal ways differ. The state
    # at the start is chosen from fewer weights around it.
    assert torch.allclose(errors.sum(), plain.sum(), rtol=1.2e-2)


def test_weights_say_where_errors_count(backend: str) -> None:
    values, weights = 0.3 * random_weight(50, 64), torch.ones(64)
    weights[10:20] = 30
    equal, weighted = (coder("t3w8_b64").encode(values, w, NO_GAINS)[1].square() for w in (torch.ones(64), weights))
    assert weighted[:, 10:20].sum() < 0.8 * equal[:, 10:20].sum()


def test_feedback_is_looked_ahead_to(backend: str) -> None:
    """Given targets one after the other, the plain search would not know what its errors cost later."""
    values, gains = 0.3 * random_weight(80, 64), some_gains(3) * 3
    errors = coder("t2w8_b64").encode(values, torch.ones(64), gains)[1]
    late = values.clone()
    plain = TrellisCoder(gaussian_trellis(FORMATS["t2w8_b64"]).levels, FORMATS["t2w8_b64"], CPU)
    numbers = level_numbers(plain.encode(late)[0], FORMATS["t2w8_b64"]).view(late.shape)
    reached, blind = gaussian_trellis(FORMATS["t2w8_b64"]).levels[numbers.long()], torch.zeros_like(values)
    for step in range(64):
        blind[:, step] = values[:, step] - blind[:, :step] @ gains[:step, step] - reached[:, step]
    assert errors.square().sum() < 0.5 * blind.square().sum()


@pytest.mark.parametrize("format", TRELLIS_IDS)
def test_compiled_and_plain_search_agree(format: str, monkeypatch) -> None:
    pytest.importorskip("numba")
    values, importance, gains = 0.3 * random_weight(100, 64), random_weight(64, seed=1).exp(), some_gains()
    found = []
    for backend in ("", "torch"):
        monkeypatch.setenv("NFQ_BACKEND", backend)
        found.append(coder(format).encode(values, importance, gains))
    (codes, errors), (plain_codes, plain_errors) = found
    assert (codes != plain_codes).float().mean() < 0.02
    cost, plain_cost = (float((part.square() * importance).sum()) for part in (errors, plain_errors))
    assert cost == pytest.approx(plain_cost, rel=2e-3)


SHAPES = {
    "blocks within rows": (33, 128),
    "two rows in a block": (40, 32),
    "blocks across rows": (10, 48),
    "a convolution": (24, 8, 3, 3),
    "a last block that is short": (9, 40),
    "columns of several blocks": (8, 192),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_are_nearer_than_without(shape: tuple[int, ...]) -> None:
    weight = random_weight(*shape, seed=7) * 0.03
    inputs = correlated(500, weight[0].numel(), seed=len(shape))
    fed = quantize(weight, format="t3w8_b64", hessian=second_moment(inputs)).dequantize()
    plain = quantize(weight, format="t3w8_b64").dequantize()
    assert output_error(inputs, weight, fed) < 0.8 * output_error(inputs, weight, plain)


@pytest.mark.parametrize(("shape", "share"), [((33, 64), 0.97), ((8, 48), 1.0)])
def test_searching_again_never_loses(shape: tuple[int, int], share: float, monkeypatch) -> None:
    weight, inputs = random_weight(*shape, seed=7), correlated(500, shape[1])
    hessian, errors = second_moment(inputs), []
    # What is lowered is the error under the moment that feedback uses.
    damped = hessian + feedback.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    for turns in ((), (16,), (16, 48)):
        monkeypatch.setitem(module.TURNS, "fast", turns)
        decoded = quantize(weight, format="t3w8_b64", hessian=hessian).dequantize(torch.float32)
        difference = (decoded - weight).double()
        errors.append(float(((difference @ damped.double()) * difference).sum()))
    assert errors[1] < share * errors[0] and errors[2] <= errors[1]


def test_a_moment_of_low_rank() -> None:
    weight, inputs = random_weight(16, 128), correlated(400, 128)
    whole = SecondMoment.of(second_moment(inputs))
    values, vectors = torch.linalg.eigh(whole.correlation)
    factor = vectors[:, -64:] * values[-64:].clamp_min(0).sqrt()
    moment = SecondMoment(whole.diagonal, factor / factor.norm(dim=1, keepdim=True).clamp_min(1))
    fed = quantize(weight, format="t3w8_b64", hessian=moment).dequantize()
    plain = quantize(weight, format="t3w8_b64").dequantize()
    assert output_error(inputs, weight, fed) < 0.7 * output_error(inputs, weight, plain)


@pytest.mark.parametrize("name", ["no input at all", "all inputs alike", "not positive semi-definite", "wide range"])
def test_unfit_hessians_are_dampened(name: str) -> None:
    # Of 64 columns, for speed: those of 70 would make a line of 35 blocks.
    weight, hessian = random_weight(10, 64), SINGULAR[name][:64, :64]
    decoded = quantize(weight, format="t4w8_b64", hessian=hessian).dequantize(torch.float32)
    assert torch.isfinite(decoded).all()
    assert (decoded - weight).square().mean() < weight.square().mean()


def test_zero_blocks_stay_zero() -> None:
    weight = random_weight(4, 128)
    weight[1] = 0
    moment = second_moment(correlated(300, 128))
    assert (quantize(weight, format="t4w8_b64", hessian=moment).dequantize()[1] == 0).all()


def test_the_result_is_the_same_each_time_and_the_weight_untouched() -> None:
    weight, hessian = random_weight(40, 64), second_moment(correlated(200, 64))
    before = weight.clone()
    first, second = (quantize(weight, format="t3w8_b64", hessian=hessian).data for _ in range(2))
    assert torch.equal(first, second) and torch.equal(weight, before)


def test_chunks_meet_without_a_seam(monkeypatch) -> None:
    weight, hessian = random_weight(99, 64), second_moment(correlated(200, 64))
    whole = quantize(weight, format="t3w8_b64", hessian=hessian)
    monkeypatch.setattr(sys.modules["nfq_core.fitting.quantizer"], "CHUNK_BLOCKS", whole.format.blocks_per_group)
    assert torch.equal(quantize(weight, format="t3w8_b64", hessian=hessian).data, whole.data)
