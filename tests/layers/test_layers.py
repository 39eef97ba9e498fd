"""Packed layers do what stock layers with the dequantised weights do, and live in a model as those do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from samples import random_weight
from torch import nn

from nfq_core import NFQError, NFTensor, quantize
from nfq_core.layers import PackedConv2d, PackedLinear, assign_state, dense_layers, pack_layers, packed_layers
from nfq_core.layers.low_rank import LowRank

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "grouped": {"kernel_size": (3, 1), "groups": 4, "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(48, 24, bias=False), nn.Linear(24, 16))
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Flatten(1), nn.Linear(12 * 16, 48), inner).to(dtype)


NAMES = ["0.weight", "2.weight", "3.0.weight", "3.1.weight"]


def packed_model(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, dict[str, NFTensor]]:
    model = small_model(dtype)
    tensors = {name: quantize(model.get_parameter(name), 16 if name > "1" else 32) for name in NAMES}
    pack_layers(model, tensors)
    return model, tensors


def change_of(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> LowRank:
    up, down = random_weight(rows, rank, seed=seed), random_weight(rank, columns, seed=seed + 1)
    return LowRank((up * 0.1).to(dtype), (down * 0.1).to(dtype))


PICTURE = random_weight(2, 8, 4, 4, seed=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("levels", [32, 7])
def test_linear(dtype: torch.dtype, bias: bool, levels: int) -> None:
    stock = nn.Linear(70, 30, bias=bias, dtype=dtype)
    tensor = quantize(stock.weight, levels)
    packed = PackedLinear(stock, tensor)
    x = random_weight(2, 3, 70).to(dtype)
    assert torch.equal(packed(x), nn.functional.linear(x, tensor.dequantize(dtype), stock.bias))


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(settings: dict, bias: bool) -> None:
    stock = nn.Conv2d(8, 12, bias=bias, **settings)
    tensor = quantize(stock.weight, 24)
    packed = PackedConv2d(stock, tensor)
    x = random_weight(2, 8, 9, 7)
    stock.weight = nn.Parameter(tensor.dequantize(torch.float32))
    assert torch.equal(packed(x), stock(x))
    assert torch.equal(packed.dense(torch.float32)(x), stock(x))


def test_a_model_and_back() -> None:
    model, tensors = packed_model()
    dense = small_model()
    dense.load_state_dict({name: tensors[name].dequantize(torch.float32) for name in NAMES}, strict=False)
    assert list(packed_layers(model)) == [name.removesuffix(".weight") for name in NAMES]
    assert torch.equal(model(PICTURE), dense(PICTURE))
    dense_layers(model, torch.float32)
    assert not packed_layers(model) and {type(layer) for layer in model} == {type(layer) for layer in dense}
    assert torch.equal(model(PICTURE), dense(PICTURE))
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 64), (16, 8, 3, 3)])
def test_low_rank_changes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rank = 6
    stock = nn.Linear(64, 40) if len(shape) == 2 else nn.Conv2d(8, 16, 3)
    stock = stock.to(dtype)
    tensor = quantize(stock.weight)
    layer = (PackedLinear if len(shape) == 2 else PackedConv2d)(stock, tensor)
    change = change_of(shape[0], tensor.numel() // shape[0], rank, dtype)
    layer.low_rank = change
    weight, up, down = (part.double() for part in (tensor.dequantize(dtype).flatten(1), change.up, change.down))
    # A sum of rank products and the weight, each operation rounded: at most rank + 1 half units of the magnitudes' sum.
    limit = (rank + 1) * torch.finfo(dtype).eps / 2 * (weight.abs() + up.abs() @ down.abs()) * 1.01
    found = layer.dense_weight(dtype)
    assert found.shape == shape and ((found.flatten(1).double() - (weight + up @ down)).abs() <= limit).all()
    x = random_weight(3, *((64,) if len(shape) == 2 else (8, 5, 5))).to(dtype)
    with_change = layer(x)
    assert torch.equal(with_change, layer.dense(dtype)(x))
    layer.low_rank = None
    assert layer.low_rank is None and torch.equal(layer.dense_weight(dtype), tensor.dequantize(dtype))
    assert not torch.equal(layer(x), with_change)


def test_a_change_that_does_not_fit() -> None:
    layer = packed_model()[0][2]
    with pytest.raises(
        NFQError, match=r"change of 48 × 64 does not fit a weight of shape \(48, 192\), which is 48 × 192"
    ):
        layer.low_rank = change_of(48, 64, 2)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.half)])
def test_casts_leave_packed_weights_alone(cast) -> None:
    model, tensors = packed_model()
    model[2].low_rank = change_of(48, 192, 2)
    cast(model)
    for name, tensor in tensors.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert layer.weight.dtype == torch.uint8 and torch.equal(layer.packed.data, tensor.data)
        assert layer.bias is None or layer.bias.dtype == torch.float16
    assert model[2].low_rank.up.dtype == model[2].low_rank.down.dtype == torch.float16
    assert model(PICTURE.half()).dtype == torch.float16


def test_moving_takes_everything_along() -> None:
    model, _ = packed_model()
    model[2].low_rank = change_of(48, 192, 2)
    model.to("meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(PICTURE.to("meta")).shape == (2, 16)


def test_copies_are_independent() -> None:
    model, _ = packed_model()
    model[2].low_rank = change_of(48, 192, 2)
    before = model(PICTURE)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(PICTURE), before)
    twin[2].low_rank = None
    twin[0].weight.data.zero_()
    assert torch.equal(model(PICTURE), before)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    model, tensors = packed_model()
    model[2].low_rank = change_of(48, 192, 2)
    saved = model.state_dict()
    assert saved.keys() == small_model().state_dict().keys(), "changes are in no state dict"
    other = small_model()
    pack_layers(
        other, {name: NFTensor(torch.zeros_like(t.data), t.format, t.shape, t.dtype) for name, t in tensors.items()}
    )
    other.load_state_dict(saved, assign=assign)
    model[2].low_rank = None
    assert torch.equal(other(PICTURE), model(PICTURE))


def test_a_model_without_memory_is_packed() -> None:
    _, tensors = packed_model()
    with torch.device("meta"):
        model = small_model()
    assign_state(model, small_model().state_dict() | tensors)
    assert torch.equal(model(PICTURE), packed_model()[0](PICTURE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.bias": None}, r"'0\.bias': the model wants \(\d+,\), the state has nothing"),
        ({"more": torch.zeros(2)}, r"'more': the model wants nothing, the state has \(2,\)"),
        ({"0.bias": torch.zeros(3)}, r"'0\.bias': the model wants \(\d+,\), the state has \(3,\)"),
    ],
)
def test_a_state_that_is_not_the_models(changes: dict, message: str) -> None:
    model, before = small_model(), small_model()(PICTURE)
    state = small_model().state_dict() | packed_model()[1] | changes
    with pytest.raises(NFQError, match=message):
        assign_state(model, {name: tensor for name, tensor in state.items() if tensor is not None})
    assert torch.equal(model(PICTURE), before) and not packed_layers(model)


def test_gradients_reach_the_input() -> None:
    layer = packed_model()[0][2]
    x = random_weight(3, 192).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight(torch.float32).sum(dim=0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("changed", [False, True])
def test_a_compiled_model_is_one_graph(changed: bool) -> None:
    model, _ = packed_model()
    if changed:
        model[0].low_rank, model[2].low_rank = change_of(12, 72, 2), change_of(48, 192, 2)
    with torch.no_grad():
        wanted = model(PICTURE)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(PICTURE), wanted)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("9.weight", (24, 48), "the model has no layer for the packed weight '9.weight'"),
        ("3.0.bias", (24, 48), "the model has no layer for the packed weight '3.0.bias'"),
        ("1.weight", (24, 48), "'1.weight' needs a Linear, Conv2d or Embedding layer, the model has Flatten"),
        ("2.weight", (24, 48), r"'2.weight' needs a Linear, Conv2d or Embedding layer, the model has PackedLinear"),
        ("3.0.weight", (48, 24), r"'3.0.weight' has shape \(48, 24\), the model's layer wants \(24, 48\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(name: str, shape: tuple[int, ...], message: str) -> None:
    model = small_model()
    pack_layers(model, {"2.weight": quantize(model[2].weight)})
    fitting = quantize(model[0].weight)
    with pytest.raises(NFQError, match=message):
        pack_layers(model, {"0.weight": fitting, name: quantize(random_weight(*shape))})
    assert list(packed_layers(model)) == ["2"]


def test_a_layer_tells_its_format() -> None:
    assert "in_features=48, out_features=24, bias=False, format=nf16_b64" in repr(packed_model()[0])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["", "2", "3", "3.1"])
def test_packed_weights_are_not_copied_into_stock_layers(part: str, assign: bool) -> None:
    packed, stock = packed_model()[0].get_submodule(part), small_model().get_submodule(part)
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(NFQError, match=r"the packed weight '.*weight' cannot be copied into"):
            stock.load_state_dict(packed.state_dict(), strict=strict, assign=assign)
    name = next(name for name in before if name.endswith("weight"))
    assert torch.equal(stock.state_dict()[name], before[name])


def test_a_state_dict_is_saved_without_classes_of_ours(tmp_path: Path) -> None:
    model, _ = packed_model()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model[2].weight.data.zero_()
    model.load_state_dict(state)
    assert torch.equal(model(PICTURE), packed_model()[0](PICTURE))


def test_a_layer_has_no_dequantize_for_adapters() -> None:
    with pytest.raises(NFQError, match=r"what calls PackedLinear\.dequantize\(\), such as DoRA, needs dense weights"):
        packed_model()[0][2].dequantize()
