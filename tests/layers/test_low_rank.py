"""Low-rank changes: several of them in one pass are the sum of each of them."""

import pytest
import torch
from samples import random_weight

from nfq_core.layers.low_rank import LowRank


def factors(rows, columns, rank, seed, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, rank, generator=generator) * scale,
        torch.randn(rank, *columns, generator=generator) * scale,
    )


def test_by_hand():
    change = LowRank.sum(
        [(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), 0.5)], device="cpu", dtype=torch.float32
    )
    weight = torch.ones(2, 2)
    assert change.add_to(weight) is weight
    assert weight.tolist() == [[2.5, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize("columns", [(48,), (12, 3, 3)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_is_the_sum_of_all(columns, count):
    parts = [(*factors(32, columns, 4 + number, number), 0.3 * (number - 1)) for number in range(count)]
    weight = random_weight(32, *columns, seed=9)
    wanted = weight.double()
    for up, down, coefficient in parts:
        wanted = wanted + coefficient * (up.double() @ down.double().flatten(1)).view(wanted.shape)
    found = LowRank.sum(parts, device="cpu", dtype=torch.float32).add_to(weight.clone())
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)


def test_convolution_factors_of_four_dimensions():
    up, down = factors(8, (4, 3, 3), 2, 0)
    flat = LowRank.sum([(up, down, 1.0)], device="cpu", dtype=torch.float32)
    deep = LowRank.sum([(up[:, :, None, None], down, 1.0)], device="cpu", dtype=torch.float32)
    assert torch.equal(flat.up, deep.up) and torch.equal(flat.down, deep.down)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_numbers_keep_their_digits(dtype):
    """A factor of 1e-7, below what fp16 resolves, beside one of 10: balanced, none loses precision."""
    up, down = factors(64, (64,), 8, 3, 1.0)
    up, down = up * 1e-7, down * 10
    change = LowRank.sum([(up, down, 1.0)], device="cpu", dtype=dtype)
    wanted = up.double() @ down.double()
    found = change.up.double() @ change.down.double()
    # Each factor is rounded by at most half a unit: eps / 2 relative, in both; rank 8 sums of them.
    limit = 2 * torch.finfo(dtype).eps * (up.abs().double() @ down.abs().double()).amax()
    assert (found - wanted).abs().amax() <= limit


@pytest.mark.parametrize("which", [0, 1])
def test_an_empty_change_changes_nothing(which):
    parts = list(factors(16, (16,), 2, 1))
    parts[which] = torch.zeros_like(parts[which])
    weight = torch.randn(16, 16).half()
    change = LowRank.sum([(*parts, 1.0)], device="cpu", dtype=torch.float16)
    assert torch.equal(change.add_to(weight.clone()), weight)
