"""Products in int8 are those of an independent reference, and are left alone where they cannot be computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import random_weight
from torch import nn

from benchmarks.speed.int8_layers import int8_layers, round_rows
from nfq_core import quantize
from nfq_core.layers import PackedLinear, pack_layers


def reference_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in 255 steps and their scales, in float64."""
    largest = np.abs(matrix).max(axis=1)
    steps = np.rint(matrix * np.divide(127, largest, out=np.zeros_like(largest), where=largest > 0)[:, None])
    return steps, largest / 127


def reference_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    tokens, token_scales = reference_rows(x)
    rows, row_scales = reference_rows(weight)
    return np.einsum("tc,rc->tr", tokens, rows) * np.outer(token_scales, row_scales) + bias


def packed_linear(rows: int, columns: int, dtype: torch.dtype = torch.float32, levels: int = 16) -> PackedLinear:
    model = nn.Sequential(nn.Linear(columns, rows, dtype=dtype)).requires_grad_(False)
    pack_layers(model, {"0.weight": quantize(random_weight(rows, columns, seed=1), levels)})
    int8_layers(model)
    return model[0]


def in_floating_point(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, layer.dense_weight(x.dtype), layer.bias)


def test_rows_by_hand() -> None:
    matrix = torch.tensor([[127.0, -1.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.5, 0.25, 0.126, 1e-9]])
    rows, scales = round_rows(matrix)
    assert rows.tolist() == [[127, -1, 1, 0], [0, 0, 0, 0], [-127, 64, 32, 0]]
    assert rows.dtype == torch.int8 and torch.equal(scales, torch.tensor([127.0, 0.0, 0.5]) / 127)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_within_half_a_step(dtype: torch.dtype) -> None:
    matrix = (random_weight(40, 72) * torch.logspace(-3, 3, 40).unsqueeze(1)).to(dtype)
    before = matrix.clone()
    rows, scales = round_rows(matrix)
    assert torch.equal(matrix, before)
    # Three roundings of fp32 come on top of half a step, each at most 127 steps · 2**-24.
    assert ((rows * scales[:, None] - matrix).abs() <= scales[:, None] * (0.5 + 4 * 127 * 2**-24)).all()
    assert (rows.abs().amax(dim=1) == 127).all()


def test_tiny_rows_are_zero() -> None:
    rows, scales = round_rows(torch.full((2, 8), 1e-37))
    assert not rows.any() and torch.isfinite(scales).all()


@pytest.mark.parametrize("levels", [32, 7])
@pytest.mark.parametrize("shape", [(17, 64), (2, 24, 64)])
def test_a_layer_multiplies_as_the_reference(shape: tuple[int, ...], levels: int) -> None:
    layer = packed_linear(48, 64, levels=levels)
    x = random_weight(*shape, seed=2)
    found = layer(x)
    weight = layer.packed.dequantize(torch.float32)
    wanted = reference_linear(*(t.double().numpy() for t in (x.view(-1, 64), weight, layer.bias)))
    assert found.shape == (*shape[:-1], 48) and found.dtype == x.dtype
    # fp32 rounds the sum, its products with two scales and the bias: five half units of the magnitudes' sum.
    limit = 5 * 2**-24 * (np.abs(wanted - layer.bias.numpy()) + np.abs(layer.bias.numpy())) + 1e-7
    # fp32 may round a quotient near the middle of two steps to the other one; these inputs have no such quotient.
    assert (np.abs(found.view(-1, 48).numpy() - wanted) <= limit).all()
    assert not torch.equal(found, in_floating_point(layer, x))
