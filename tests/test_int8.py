"""Products in int8 are those of an independent reference, and are left alone where they cannot be computed."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from samples import random_weight
from torch import nn
from torch._subclasses import FakeTensorMode

from nfq_core import NFQError, int8, quantize
from nfq_core.layers import PackedLinear, int8_layers, pack_layers
from nfq_core.low_rank import LowRank


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
    rows, scales = int8.round_rows(matrix)
    assert rows.tolist() == [[127, -1, 1, 0], [0, 0, 0, 0], [-127, 64, 32, 0]]
    assert rows.dtype == torch.int8 and torch.equal(scales, torch.tensor([127.0, 0.0, 0.5]) / 127)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_within_half_a_step(dtype: torch.dtype) -> None:
    matrix = (random_weight(40, 72) * torch.logspace(-3, 3, 40).unsqueeze(1)).to(dtype)
    before = matrix.clone()
    rows, scales = int8.round_rows(matrix)
    assert torch.equal(matrix, before)
    # Three roundings of fp32 come on top of half a step, each at most 127 steps · 2**-24.
    assert ((rows * scales[:, None] - matrix).abs() <= scales[:, None] * (0.5 + 4 * 127 * 2**-24)).all()
    assert (rows.abs().amax(dim=1) == 127).all()


def test_tiny_rows_are_zero() -> None:
    rows, scales = int8.round_rows(torch.full((2, 8), 1e-37))
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
    # A quotient beside the middle of two steps may be rounded to the other one in fp32; here there is none such.
    assert (np.abs(found.view(-1, 48).numpy() - wanted) <= limit).all()
    assert not torch.equal(found, in_floating_point(layer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_many_tokens_are_multiplied_in_parts(dtype: torch.dtype, monkeypatch) -> None:
    layer = packed_linear(48, 64, dtype)
    x = random_weight(2, 3, 50, 64, seed=8).to(dtype)
    wanted = layer(x)
    monkeypatch.setattr(int8, "CHUNK_NUMBERS", 0)
    monkeypatch.setattr(int8, "MIN_CHUNK_TOKENS", 64)
    products = []
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: products.append(len(left)) or real(left, right))
    found = layer(x)
    assert products == [64, 64, 64, 64, 44] and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_error_is_that_of_two_roundings(dtype: torch.dtype) -> None:
    layer = packed_linear(64, 512, dtype)
    x = random_weight(128, 512, seed=3).to(dtype)
    exact = x.double() @ layer.packed.dequantize(torch.float64).T + layer.bias
    # Half a step of either factor, times the other, each uniform and independent: the sum's standard deviation.
    steps = [t.double().abs().amax(dim=1) / 127 for t in (x, layer.packed.dequantize())]
    squares = [t.double().square().sum(dim=1) for t in (x, layer.packed.dequantize())]
    variance = (torch.outer(steps[0] ** 2, squares[1]) + torch.outer(squares[0], steps[1] ** 2)) / 12
    rounding = exact.abs() * torch.finfo(dtype).eps
    found = (layer(x) - exact).abs()
    assert (found <= 6 * variance.sqrt() + rounding).all()
    assert found.square().mean() >= 0.8 * variance.mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_low_rank_changes_are_not_rounded(dtype: torch.dtype) -> None:
    layer = packed_linear(32, 64, dtype)
    x = random_weight(20, 64, seed=4).to(dtype)
    without = layer(x)
    up, down = random_weight(32, 3, seed=5).to(dtype), random_weight(3, 64, seed=6).to(dtype)
    layer.low_rank = LowRank(up, down)
    change = (layer(x) - without).double()
    wanted = x.double() @ down.double().T @ up.double().T
    # At most some half units of the largest magnitude that is summed up.
    assert (change - wanted).abs().amax() <= 4 * torch.finfo(dtype).eps * (wanted.abs().amax() + without.abs().amax())
    layer.low_rank = None
    assert torch.equal(layer(x), without)


def test_a_change_of_another_dtype_is_refused() -> None:
    layer = packed_linear(32, 64)
    layer.low_rank = LowRank(torch.zeros(32, 1).half(), torch.zeros(1, 64).half())
    with pytest.raises(NFQError, match=r"change is torch\.float16 on cpu, the layer computes in torch\.float32"):
        layer(random_weight(20, 64))


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "reason"),
    [
        (32, 64, 16, "17 tokens are needed"),
        (32, 60, 20, "the sides of 32 × 60 must be multiples of 8"),
        (36, 64, 20, "the sides of 36 × 64 must be multiples of 8"),
    ],
)
def test_other_shapes_are_multiplied_as_before(rows: int, columns: int, tokens: int, reason: str) -> None:
    layer = packed_linear(rows, columns)
    x = random_weight(tokens, columns, seed=7)
    assert reason in int8.unfit(x, rows)
    assert torch.equal(layer(x), in_floating_point(layer, x))


def test_sums_that_int32_cannot_hold_are_not_made() -> None:
    x = torch.zeros(1).expand(17, 8 * 20_000)
    assert "columns at most 133,144" in int8.unfit(x, 8)
    assert not int8.unfit(x[:, :133_144], 8)
    assert 127 * 127 * 133_144 < 2**31 <= 127 * 127 * 133_145


def test_gradients_are_not_lost() -> None:
    layer = packed_linear(32, 64)
    x = random_weight(20, 64).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight(torch.float32).sum(dim=0).expand(20, -1), atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    layer = packed_linear(32, 64)
    x = random_weight(20, 64)
    wanted = layer(x)
    x[3, 5] = value
    found = layer(x)
    assert not torch.isfinite(found[3]).any()
    found[3] = wanted[3]
    assert torch.equal(found, wanted)


def test_a_device_that_cannot_is_named_and_left_alone(monkeypatch, caplog) -> None:
    layer = packed_linear(32, 64)
    x = random_weight(20, 64)

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    int8.obstacle.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "nfq"):
            assert torch.equal(layer(x), in_floating_point(layer, x))
            layer(x)
        reason = "torch fails here (RuntimeError: no kernel image is available)"
        assert caplog.messages == [f"nothing is multiplied in int8 on cpu: {reason}"]
        model = nn.Sequential(layer)
        int8_layers(model, enabled=False)
        with pytest.raises(NFQError, match="layer '0' cannot multiply in int8 on cpu: torch fails here"):
            int8_layers(model)
        assert not layer.int8
    finally:
        int8.obstacle.cache_clear()


def test_a_device_that_multiplies_wrongly_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: torch.zeros(len(left), right.shape[1], dtype=torch.int32))
    assert int8._fails(torch.device("cpu")) == "torch computes other products here"


def test_a_device_is_tried_with_real_numbers() -> None:
    with FakeTensorMode():
        assert int8._fails(torch.device("cpu")) == ""


def test_only_cpus_and_cuda_devices_are_asked() -> None:
    assert "cpu and cuda devices alone" in int8.obstacle(torch.device("mps"))
    int8.obstacle.cache_clear()


def test_a_model_is_switched_copied_and_switched_back() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(2), nn.Linear(64, 32)).requires_grad_(False)
    names = ["0.weight", "2.weight"]
    pack_layers(model, {name: quantize(model.get_parameter(name)) for name in names})
    picture = random_weight(2, 16, 8, 8)
    with torch.no_grad():
        before = model(picture)
        int8_layers(model)
        switched = model(picture)
        assert not torch.equal(switched, before)
        assert "int8" in repr(model[2]) and "int8" not in repr(model[0])
        assert torch.equal(copy.deepcopy(model)(picture), switched)
        assert model.state_dict()["2.weight"].dtype == torch.uint8
        int8_layers(model, enabled=False)
        assert torch.equal(model(picture), before)


def test_a_model_without_packed_linear_layers_is_refused() -> None:
    with pytest.raises(NFQError, match="no packed Linear layer; pack_layers makes them"):
        int8_layers(nn.Sequential(nn.Linear(8, 8)))


def test_a_model_without_memory_is_switched_too() -> None:
    layer = packed_linear(32, 64)
    moved = nn.Sequential(layer).to("meta")
    int8_layers(moved)
    assert moved(random_weight(20, 64).to("meta")).shape == (20, 32)


@pytest.mark.parametrize("changed", [False, True])
def test_a_compiled_layer_is_one_graph(changed: bool) -> None:
    layer = packed_linear(32, 64)
    if changed:
        layer.low_rank = LowRank(random_weight(32, 2), random_weight(2, 64))
    x = random_weight(20, 64)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)
