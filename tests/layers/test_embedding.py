"""A packed Embedding layer does what the stock layer with the dequantised weight does."""

from __future__ import annotations

import copy

import pytest
import torch
from samples import random_weight
from torch import nn

from nfq_core import NFQError, quantize
from nfq_core.layers import LowRank, PackedEmbedding, dense_layers, pack_layers, packed_layers

WORDS, WIDTH = 200, 192
IDS = torch.tensor([[0, 5, WORDS - 1], [5, 5, 7]])


def stock_layer(dtype: torch.dtype = torch.float32, **options: object) -> nn.Embedding:
    layer = nn.Embedding(WORDS, WIDTH, dtype=dtype, **options)
    layer.weight.data = random_weight(WORDS, WIDTH).to(dtype)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format_id", ["nf256_b64", "nf32_b64", "nf24_b64", "t5w9_b64"])
def test_the_stock_layer_with_the_dequantised_weight(format_id: str, dtype: torch.dtype) -> None:
    stock = stock_layer(dtype, padding_idx=0)
    tensor = quantize(stock.weight, format=format_id)
    packed = PackedEmbedding(stock, tensor)
    wanted = nn.functional.embedding(IDS, tensor.dequantize(dtype))
    for ids in (IDS, IDS.int(), IDS[0], IDS[0, 0], IDS[:0]):
        found = packed(ids)
        assert found.dtype == dtype and torch.equal(found, nn.functional.embedding(ids, tensor.dequantize(dtype)))
    assert torch.equal(packed.dense(dtype)(IDS), wanted)
    assert packed.padding_idx == packed.dense(dtype).padding_idx == 0
    assert f"{WORDS}, {WIDTH}" in repr(packed) and format_id in repr(packed)


def test_a_width_that_is_no_multiple_of_a_block() -> None:
    stock = nn.Embedding(WORDS, 100)
    tensor = quantize(stock.weight, format="nf256_b64")
    assert torch.equal(PackedEmbedding(stock, tensor)(IDS), tensor.dequantize(torch.float32)[IDS])


def test_casts_change_the_output_and_not_the_packed_weight() -> None:
    stock = stock_layer()
    tensor = quantize(stock.weight, format="nf256_b64")
    model = nn.Sequential(PackedEmbedding(stock, tensor))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.to(dtype)
        assert torch.equal(model(IDS), tensor.dequantize(dtype)[IDS])
    assert torch.equal(model[0].buffer, tensor.data)
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


@pytest.mark.parametrize("bad", [WORDS, -1])
def test_ids_out_of_bounds(bad: int) -> None:
    stock = stock_layer()
    packed = PackedEmbedding(stock, quantize(stock.weight, format="nf256_b64"))
    for layer in (stock, packed):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([0, bad]))


def test_ids_must_be_integers() -> None:
    stock = stock_layer()
    packed = PackedEmbedding(stock, quantize(stock.weight, format="nf256_b64"))
    for layer in (stock, packed):
        with pytest.raises((RuntimeError, IndexError)):
            layer(torch.tensor([0.0]))


def test_low_rank_changes_are_added_to_the_rows() -> None:
    stock = stock_layer()
    tensor = quantize(stock.weight, format="nf256_b64")
    packed = PackedEmbedding(stock, tensor)
    packed.low_rank = LowRank(random_weight(WORDS, 4, seed=1), random_weight(4, WIDTH, seed=2))
    whole = packed.dense_weight(torch.float32)
    assert not torch.equal(whole, tensor.dequantize(torch.float32))
    torch.testing.assert_close(packed(IDS), whole[IDS])
    torch.testing.assert_close(packed.dense(torch.float32)(IDS), whole[IDS])


def test_a_layer_that_changes_its_weight_is_refused() -> None:
    stock = stock_layer(max_norm=1.0)
    with pytest.raises(NFQError, match="max_norm changes its weight"):
        PackedEmbedding(stock, quantize(stock.weight, format="nf256_b64"))


def test_a_model_is_packed_and_unpacked() -> None:
    model = nn.Sequential(stock_layer(), nn.Linear(WIDTH, 8))
    tensors = {
        "0.weight": quantize(model[0].weight, format="nf256_b64"),
        "1.weight": quantize(model[1].weight, format="nf32_b64"),
    }
    pack_layers(model, tensors)
    assert list(packed_layers(model)) == ["0", "1"] and isinstance(model[0], PackedEmbedding)
    before = model(IDS)
    dense_layers(model, torch.float32)
    assert type(model[0]) is nn.Embedding
    assert torch.equal(model(IDS), before)


def test_a_compiled_layer_is_one_graph() -> None:
    stock = stock_layer()
    packed = PackedEmbedding(stock, quantize(stock.weight, format="nf256_b64"))
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDS), packed(IDS))
