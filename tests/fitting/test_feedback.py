"""Rounding with error feedback: by hand, against another derivation, and what holds for any inputs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from samples import SINGULAR, correlated, output_error, random_weight, second_moment

from nfq_core import quantize
from nfq_core.fitting import feedback as module
from nfq_core.fitting import feedback_numba
from nfq_core.fitting.feedback import SecondMoment, feedback_gains, low_rank, round_columns
from nfq_core.fitting.search import NearestLevel
from nfq_core.packed.formats import LEVELS

CPU = torch.device("cpu")
LEVELS_5 = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
MIDDLES = (LEVELS_5[1:] + LEVELS_5[:-1]) / 2
NEAREST = NearestLevel.of(LEVELS_5, MIDDLES, CPU)


def block_scales(weight: torch.Tensor, signed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A random scale for each block of 64 weights, and the same for each weight."""
    blocks = -(-weight.numel() // 64)
    scales = (random_weight(blocks, seed=4) * 0.2).exp()
    if signed:
        scales *= torch.where(torch.arange(blocks) % 3 == 0, -1.0, 1.0)
    return scales, scales.repeat_interleave(64)[: weight.numel()].view(weight.shape)


@pytest.mark.parametrize("shape", [(64,), (64, 32), (64, 64, 1)])
def test_a_hessian_of_another_shape_is_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"the Hessian must have shape \(columns, columns\), got"):
        quantize(random_weight(64, 64), hessian=torch.ones(shape))


def test_two_columns_by_hand(monkeypatch, backend):
    monkeypatch.setattr(module, "DAMPING", 0.0)
    # The first column, with the stronger input, loses 0.6 - 1 = -0.4. The second one makes up for it by
    # H10 / H11 = 2 / 2 times as much: 0.7 - 0.4 = 0.3. In the second row 0.4 is gained: -0.7 + 0.4 = -0.3.
    hessian = torch.tensor([[4.0, 2.0], [2.0, 2.0]])
    weight = torch.tensor([[0.6, 0.7], [-0.6, -0.7]])
    levels, boundaries = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-0.5, 0.5])
    nearest = NearestLevel.of(levels, boundaries, CPU)
    codes = round_columns(weight, torch.ones(1), nearest, SecondMoment.of(hessian))
    assert codes.tolist() == [[2, 1], [0, 1]]
    # With the second input the stronger, it is rounded first: 0.7 - 1 = -0.3 over there is 0.6 - 0.3 = 0.3 here.
    codes = round_columns(weight, torch.ones(1), nearest, SecondMoment.of(hessian.flip(0, 1)))
    assert codes.tolist() == [[1, 2], [1, 0]]


def test_no_damping_is_sought_where_none_can_help():
    with pytest.raises(ValueError, match="must be finite"):
        feedback_gains(torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]]))


def test_gains_by_hand():
    # Once the second column makes up for an error of 1 in the first, 4 - 2² / 2 = 2 is left of its square's 4.
    gains, importance = feedback_gains(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
    assert torch.allclose(gains, torch.tensor([[0.0, -1.0], [0.0, 0.0]]))
    assert torch.allclose(importance, torch.tensor([2.0, 2.0]))


def test_a_singular_moment_is_dampened():
    gains, importance = feedback_gains(torch.ones(5, 5))
    assert torch.isfinite(gains).all() and (importance > 0).all()


def reference(weight: np.ndarray, scales: np.ndarray, levels: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The same by definition: after each column, the rest is moved to where the output error is least."""
    weight = weight.astype(np.float64)
    hessian = hessian.astype(np.float64) + module.DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    left = list(np.argsort(-np.diag(hessian), kind="stable"))
    codes = np.zeros(weight.shape, dtype=np.uint8)
    while left:
        column = left.pop(0)
        distance = np.abs(weight[:, column, None] - levels * scales[:, column, None])
        codes[:, column] = distance.argmin(axis=1)
        error = weight[:, column] - levels[codes[:, column]] * scales[:, column]
        if left:
            moved = np.linalg.solve(hessian[np.ix_(left, left)], hessian[left, column])
            weight[:, left] += np.outer(error, moved)
    return codes


@pytest.mark.parametrize("columns", [7, 150])
def test_equals_the_definition(columns, backend):
    weight = random_weight(12, columns, seed=3) * 0.4
    by_block, scales = block_scales(weight)
    hessian = second_moment(correlated(300, columns))
    found = round_columns(weight, by_block, NEAREST, SecondMoment.of(hessian))
    # Cells are coarser than the boundaries between levels: a choice may differ, which changes those behind it.
    expected = reference(*(t.numpy() for t in (weight, scales, LEVELS_5, hessian)))
    assert (found.numpy() != expected).mean() < 0.01


@pytest.mark.parametrize("columns", [150, 200])
def test_a_low_rank_moment_equals_the_definition(columns, backend):
    """Through several batches."""
    weight = random_weight(12, columns, seed=3) * 0.4
    by_block, scales = block_scales(weight)
    factor = random_weight(columns, 5, seed=5)
    factor /= factor.norm(dim=1, keepdim=True) * 1.1
    diagonal = random_weight(columns, seed=6).exp()
    hessian = (factor @ factor.T).fill_diagonal_(1) * diagonal.sqrt() * diagonal.sqrt()[:, None]
    found = round_columns(weight, by_block, NEAREST, SecondMoment(diagonal, factor))
    expected = reference(*(t.numpy() for t in (weight, scales, LEVELS_5, hessian)))
    assert (found.numpy() != expected).mean() < 0.01


def test_a_diagonal_hessian_changes_nothing(backend):
    weight = random_weight(20, 200)
    by_block, scales = block_scales(weight)
    moment = SecondMoment.of(torch.diag(random_weight(200, seed=2).exp()))
    nearest = torch.bucketize(weight / scales, MIDDLES)
    assert (round_columns(weight, by_block, NEAREST, moment) != nearest).float().mean() < 1e-3


def test_the_weight_is_not_changed(backend):
    weight = random_weight(8, 40)
    before = weight.clone()
    moment = SecondMoment.of(second_moment(correlated(100, 40)))
    round_columns(weight, torch.ones(5), NEAREST, moment)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("levels", LEVELS)
# Blocks of 64 lie across rows, within them, and in a convolution's taps.
@pytest.mark.parametrize("shape", [(40, 50), (33, 128), (24, 5, 3, 3), (9, 130)])
def test_outputs_are_nearer_than_without(shape, levels):
    weight = random_weight(*shape, seed=7) * 0.03
    columns = weight[0].numel()
    inputs = correlated(500, columns, seed=levels)
    fed = quantize(weight, levels, hessian=second_moment(inputs)).dequantize()
    plain = quantize(weight, levels).dequantize()
    assert output_error(inputs, weight, fed) < output_error(inputs, weight, plain)


def test_held_out_outputs_are_nearer_too():
    weight = random_weight(64, 96, seed=7) * 0.03
    inputs = correlated(1200, 96)
    fed = quantize(weight, 16, hessian=second_moment(inputs[:800])).dequantize()
    plain = quantize(weight, 16).dequantize()
    assert output_error(inputs[800:], weight, fed) < 0.5 * output_error(inputs[800:], weight, plain)


def test_the_result_is_the_same_each_time():
    weight, hessian = random_weight(40, 100).half(), second_moment(correlated(200, 100))
    assert torch.equal(quantize(weight, hessian=hessian).data, quantize(weight, hessian=hessian).data)


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6, 1e30])
def test_the_unit_of_the_inputs_does_not_matter(unit):
    weight, hessian = random_weight(16, 60), second_moment(correlated(200, 60))
    hessian /= hessian.amax()
    codes = [
        round_columns(weight, torch.ones(15), NEAREST, SecondMoment.of(hessian * factor)) for factor in (1.0, unit)
    ]
    # Rounding may turn a tie.
    assert (codes[0] != codes[1]).float().mean() < 0.05


@pytest.mark.parametrize("hessian", SINGULAR.values(), ids=SINGULAR)
def test_unfit_hessians_are_dampened(hessian):
    weight = random_weight(10, 70)
    decoded = quantize(weight, 16, hessian=hessian).dequantize(torch.float32)
    assert torch.isfinite(decoded).all()
    assert (decoded - weight).square().mean() < weight.square().mean()


def test_zero_blocks_stay_zero(backend):
    weight = random_weight(4, 128)
    weight[1] = 0
    decoded = quantize(weight, 16, hessian=second_moment(correlated(300, 128))).dequantize()
    assert (decoded[1] == 0).all()


def whole(moment: SecondMoment) -> torch.Tensor:
    """The damped matrix, its largest diagonal entry being 1 before."""
    factors = moment.factors(CPU)
    return torch.diag(factors.own) + factors.shared @ factors.shared.T


def test_a_second_moment_gives_its_matrix_back():
    hessian = second_moment(correlated(300, 40))
    damped = hessian + module.DAMPING * hessian.diagonal().mean() * torch.eye(40)
    assert torch.allclose(whole(SecondMoment.of(hessian)), damped / hessian.diagonal().amax(), rtol=1e-4, atol=1e-6)


def test_a_hessian_of_low_rank_survives_its_sketch():
    factor = random_weight(200, 6)
    hessian = factor @ factor.T
    probe = random_weight(200, 16, seed=1)
    diagonal = hessian.diagonal()
    moment = SecondMoment(diagonal, low_rank(hessian @ probe, probe, diagonal, 8))
    assert moment.correlation.shape == (200, 8)
    # Factors are rounded to fp16: 2**-11 each.
    root = (diagonal / diagonal.amax()).sqrt()
    difference = (whole(moment) - hessian / diagonal.amax()).fill_diagonal_(0)
    assert (difference.abs() <= 4e-3 * root * root[:, None]).all()


UNFIT = {
    "one channel too many": ({"importance": torch.ones(11)}, "importance must have shape"),
    "NaN": ({"importance": torch.full((10,), float("nan"))}, "finite and not negative"),
    "negative": ({"importance": -torch.ones(10)}, "finite and not negative"),
    "a column too many": ({"hessian": torch.eye(11)}, "must have 10 columns, got 11"),
    "a negative diagonal": ({"hessian": -torch.eye(10)}, "finite and not negative"),
    "Inf beside the diagonal": ({"hessian": torch.eye(10) + torch.inf * torch.eye(10).roll(1, 0)}, "must be finite"),
}


@pytest.mark.parametrize(("arguments", "message"), UNFIT.values(), ids=UNFIT)
def test_statistics_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(random_weight(200, 10), **arguments)


def test_a_vector_has_no_input_channels():
    with pytest.raises(ValueError, match="two or more dimensions"):
        quantize(random_weight(2000), importance=torch.ones(2000))


@pytest.mark.parametrize("shape", [(40, 50), (24, 10, 3, 3)])
@pytest.mark.parametrize("levels", [16, 7])
def test_importance_lowers_the_error_where_it_counts(shape, levels):
    weight = random_weight(*shape, seed=5)
    importance = (random_weight(shape[1], seed=6) * 2).exp()

    def error(**arguments: torch.Tensor) -> float:
        difference = (quantize(weight, levels, **arguments).dequantize(torch.float32) - weight).square()
        return float((difference.transpose(1, -1) * importance).sum())

    assert error(importance=importance) < 0.9 * error()


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_equal_importance_changes_nothing(effort):
    weight = random_weight(40, 50)
    plain = quantize(weight, effort=effort)
    assert torch.equal(quantize(weight, effort=effort, importance=torch.full((50,), 3.0)).data, plain.data)


def test_trellis_formats_use_no_importance_alone():
    weight, importance = random_weight(40, 50), random_weight(50, seed=1).exp()
    plain = quantize(weight, format="t2w8_b64")
    assert torch.equal(quantize(weight, format="t2w8_b64", importance=importance).data, plain.data)


@pytest.mark.parametrize("statistic", ["importance", "hessian"])
def test_chunks_meet_without_a_seam(statistic, monkeypatch):
    hessian = second_moment(correlated(200, 50))
    weight, statistics = random_weight(99, 50), {"hessian": hessian, "importance": hessian.diagonal()}
    arguments = {statistic: statistics[statistic]}
    whole = quantize(weight, **arguments)
    monkeypatch.setattr(sys.modules["nfq_core.fitting.quantizer"], "CHUNK_BLOCKS", whole.format.blocks_per_group)
    assert torch.equal(quantize(weight, **arguments).data, whole.data)


def test_compiled_and_plain_rounding_agree():
    pytest.importorskip("numba")
    weight, inputs = random_weight(150, 200) * 0.1, correlated(400, 200)
    gains = feedback_gains(second_moment(inputs)[:64, :64])[0].neg()
    sizes = block_scales(weight)[1].T.contiguous()[:64]
    targets = weight.T.contiguous()[:64]
    compiled, plain = (
        function(targets.clone(), sizes, NEAREST, gains)
        for function in (feedback_numba.round_batch, module.round_batch)
    )
    assert (compiled[0] != plain[0]).float().mean() < 2e-3
    same = compiled[0] == plain[0]
    assert torch.equal(compiled[1][same], plain[1][same])
