"""Codes of a trellis format, against the best of all codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import TRELLIS_IDS, numbers_of_levels, parse_trellis
from samples import random_weight

from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.fitting.trellis_fit import gaussian_trellis, level_numbers
from nfq_core.fitting.trellis_numba import CompiledCoder
from nfq_core.packed.formats import format_by_id
from nfq_core.packed.layout import BlockFormat

CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "numba"])
def coder(request) -> Callable[[str], TrellisCoder]:
    """Makes the coder of a format."""
    if request.param == "torch":
        return lambda format_id: TrellisCoder(levels_of(format_id), format_by_id(format_id), CPU)
    pytest.importorskip("numba")
    return lambda format_id: CompiledCoder(levels_of(format_id), format_by_id(format_id))


def levels_of(format_id: str) -> torch.Tensor:
    """Levels for Gaussian values of variance 1, about."""
    return gaussian_trellis(format_by_id(format_id)).levels * 3


def least_errors(values: np.ndarray, levels: np.ndarray, bits: int, first: np.ndarray) -> np.ndarray:
    """The least error of all codes that end in each state, (…, states), for values (…, steps) after errors `first`."""
    states, codes = len(levels) >> bits, 1 << bits
    errors = first
    for step in range(values.shape[-1]):
        by_last = np.repeat(errors, codes, axis=-1) + (values[..., step, None] - levels) ** 2
        errors = by_last.reshape(*by_last.shape[:-1], codes, states).min(axis=-2)
    return errors


def best_circular(values: np.ndarray, levels: np.ndarray, bits: int) -> np.ndarray:
    """The least error of all codes of circular blocks, shape (blocks,): from every state back to it."""
    states = len(levels) >> bits
    found = []
    for state in range(states):
        first = np.full((len(values), states), np.inf)
        first[:, state] = 0
        found.append(least_errors(values, levels, bits, first)[:, state])
    return np.min(found, axis=0)


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_errors_are_those_of_the_codes(coder, format_id):
    values = random_weight(50, 64)
    codes, errors = coder(format_id).encode(values)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    bits, window = parse_trellis(format_id)
    assert codes.amax() < 2**bits
    numbers = numbers_of_levels(codes.numpy().astype(np.int64), bits, window)
    expected = (values - levels_of(format_id)[torch.from_numpy(numbers)]).square().sum(dim=1)
    assert torch.allclose(errors, expected, rtol=1e-4)
    assert torch.equal(level_numbers(codes, format_by_id(format_id)), torch.from_numpy(numbers).view(-1).int())


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_codes_are_nearly_the_best_of_all(coder, format_id):
    bits, window = parse_trellis(format_id)
    # All starts are tried: many states make that slow.
    values = random_weight(40 if window < 10 else 10, 64)
    errors = coder(format_id).encode(values)[1].double().numpy()
    best = best_circular(values.double().numpy(), levels_of(format_id).double().numpy(), bits)
    # 64 additions in fp32.
    assert (errors >= best * (1 - 1e-5)).all()
    # The state at the start is the best one for the weights around it. Measured: 0.2 to 1.4 %.
    assert errors.sum() <= best.sum() * 1.02


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_circular_blocks_cost_little_beside_one_long_stream(coder, format_id):
    values, (bits, window) = random_weight(256, 64), parse_trellis(format_id)
    errors = coder(format_id).encode(values)[1].double().sum().item()
    levels = levels_of(format_id).double().numpy()
    long = least_errors(values.double().numpy().reshape(-1), levels, bits, np.zeros(len(levels) >> bits)).min()
    # Measured with narrow windows: 0.06 dB at 2 bits, 0.03 at most at the others; with wide ones 0.05 more.
    assert errors <= long * 10 ** ((0.08 if bits == 2 else 0.05) / 10 + (0.006 if window == 10 else 0))


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_values_that_some_codes_stand_for_get_no_error(coder, format_id):
    bits, window = parse_trellis(format_id)
    codes = np.random.default_rng(0).integers(0, 2**bits, (30, 64))
    values = levels_of(format_id)[torch.from_numpy(numbers_of_levels(codes, bits, window))]
    assert coder(format_id).encode(values)[1].amax() == 0


@pytest.mark.parametrize(("chunk", "batch"), [(1, 1), (7, 7), (7, 21), (10, 64), (64, 64)])
def test_chunks_and_batches_do_not_matter(chunk, batch):
    values, fmt = random_weight(64, 64), format_by_id("t3w8_b64")
    whole, parts = (TrellisCoder(levels_of(fmt.id), fmt, CPU) for _ in range(2))
    parts._chunk, parts._batch = chunk, batch
    for found, expected in zip(parts.encode(values), whole.encode(values), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
@pytest.mark.parametrize("blocks", [1, 2, 127, 128, 129, 300])
def test_compiled_search_finds_what_the_plain_one_finds(format_id, blocks):
    pytest.importorskip("numba")
    values, fmt = random_weight(blocks, 64), format_by_id(format_id)
    plain, compiled = TrellisCoder(levels_of(format_id), fmt, CPU), CompiledCoder(levels_of(format_id), fmt)
    # 128 additions in fp32, with and without fused multiplication.
    assert torch.allclose(compiled.state_errors(values), plain.state_errors(values), rtol=1e-5)
    (codes, errors), (expected_codes, expected_errors) = compiled.encode(values), plain.encode(values)
    assert errors.sum().item() == pytest.approx(expected_errors.sum().item(), rel=1e-4)
    # Almost equal paths of a block may change places.
    assert (codes != expected_codes).any(dim=1).sum() <= 1 + 0.01 * blocks


def test_state_errors_by_hand():
    """Two bits, window of two: every code is a level of its own, and the only state is passed by every path."""
    fmt = BlockFormat("", 4, 4, 4, 0, 2)
    levels = torch.tensor([-1.0, -0.25, 0.25, 1.0])
    values = torch.tensor([[0.5] * 32 + [-1.25] * 32])
    coder = TrellisCoder(levels, fmt, CPU)
    assert coder.state_errors(values).tolist() == [[64 * 0.0625]]
    codes, errors = coder.encode(values)
    assert codes.tolist() == [[2] * 32 + [0] * 32] and errors.tolist() == [4.0]


def test_blocks_whose_path_goes_astray_come_back(coder):
    """Two bits of 64 states: some blocks' best path from the first pass ends elsewhere than it starts."""
    made = coder("t2w8_b64")
    values = random_weight(500, 64)
    first = made.state_errors(values)
    _, _, starts, ends = made._search(values, first, None)
    assert 0 < (starts != ends).sum() < 150
    codes, errors = made.encode(values, first)
    numbers = numbers_of_levels(codes.numpy().astype(np.int64), 2, 8)
    expected = (values - levels_of("t2w8_b64")[torch.from_numpy(numbers)]).square().sum(dim=1)
    assert torch.allclose(errors, expected, rtol=1e-4)
