"""Quantising whole weights to trellis formats: any size, zeros, outliers, both ends of fp16."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from independent_reader import common_levels
from reference import COMMON_IDS, TRELLIS_IDS, sqnr_db
from samples import decoded_by_reference, gaussian, random_weight

from nfq_core import quantize
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.packed.formats import format_by_id


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (10, 100), (64 * 24 + 1,), (3, 5, 3, 3), (7, 1, 191)])
def test_round_trip_of_any_size(format_id, shape):
    weight = gaussian(*shape)
    tensor = quantize(weight, format=format_id)
    assert (tensor.shape, tensor.dtype, tensor.format) == (weight.shape, weight.dtype, format_by_id(format_id))
    tensor.validate()
    decoded = tensor.dequantize()
    expected = decoded_by_reference(tensor)
    assert (decoded.numpy().view(np.uint16).ravel() == expected.view(np.uint16)).all()
    # Two bits leave 11 dB of many Gaussian weights; the error of single blocks strays.
    assert sqnr_db(weight.numpy(), decoded.float().numpy()) > 8


@pytest.mark.parametrize("format_id", COMMON_IDS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_a_small_weight_uses_the_common_levels_unless_others_gain_much(format_id, effort):
    fmt = format_by_id(format_id)
    small, large = gaussian(64, 64), gaussian(256, 256)
    large[large.abs() < large.std()] = 0
    tensor = quantize(small, format=format_id, effort=effort)
    assert tensor.nbytes == fmt.packed_bytes(64 * 64) == fmt.sections(64 * 64, own_levels=False).end
    assert torch.equal(tensor.levels, torch.from_numpy(common_levels()[format_id]))
    assert (tensor.dequantize().numpy().ravel() == decoded_by_reference(tensor)).all()
    # So many zeros are worth levels of their own, in a small weight too.
    tensor = quantize(large, format=format_id, effort=effort)
    assert tensor.sections.coarse == 2 * fmt.levels
    assert not torch.equal(tensor.levels, torch.from_numpy(common_levels()[format_id]))


@pytest.mark.parametrize("format_id", COMMON_IDS)
def test_a_small_weight_beyond_the_table_of_scales_has_its_own_levels(format_id):
    weight = gaussian(64, 64) * 2.0**-4
    weight[::2] *= 2.0**-9
    tensor = quantize(weight, format=format_id)
    assert tensor.sections.coarse
    assert (tensor.dequantize().numpy().ravel() == decoded_by_reference(tensor)).all()
    assert sqnr_db(weight[::2].numpy(), tensor.dequantize()[::2].float().numpy()) > 8


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_zeros_come_back_as_zeros(format_id):
    weight = gaussian(20, 64)
    weight[3], weight[19] = 0, 0
    tensor = quantize(weight, format=format_id)
    assert (tensor.data[-22:-2] == 0).nonzero().flatten().tolist() == [3, 19]
    assert (tensor.dequantize()[[3, 19]] == 0).all()
    assert (quantize(torch.zeros(3, 50), format=format_id).dequantize() == 0).all()


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
@pytest.mark.parametrize("outlier", [1e4, 65504.0, -65504.0])
def test_one_huge_outlier_spoils_only_its_own_block(format_id, outlier):
    weight = gaussian(256, 64)
    plain = quantize(weight, format=format_id).dequantize(torch.float32)
    weight[7, 11] = outlier
    tensor = quantize(weight, format=format_id)
    tensor.validate()
    decoded = tensor.dequantize(torch.float32)
    # Its scale is 0.95 to 1 of it or a step of the coarsest grid beside that, the end of fp16 being a step away too.
    assert decoded[7, 11].item() == pytest.approx(outlier, rel=0.05 + 1 - 2 ** (-3 / 16))
    others = torch.arange(256) != 7
    before = sqnr_db(weight[others].numpy(), plain[others].numpy())
    # A level that the outlier has for itself and coarser scales cost 0.1 to 0.6 dB.
    assert sqnr_db(weight[others].numpy(), decoded[others].numpy()) > before - 1


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_no_value_leaves_fp16_where_every_block_is_at_its_end(format_id):
    weight = (random_weight(64, 64) * 20000).clamp(-65504, 65504)
    weight[:, 0] = 65504
    assert torch.isfinite(quantize(weight, format=format_id).dequantize()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides_do_not_matter(dtype):
    weight = gaussian(60, 90).T.to(dtype)
    tensor = quantize(weight, format="t4w8_b64")
    assert tensor.dtype == dtype
    assert torch.equal(tensor.data, quantize(weight.contiguous().float(), format="t4w8_b64").data)


@pytest.mark.parametrize("format_id", TRELLIS_IDS)
def test_chunks_of_a_weight_meet_without_a_seam(format_id, monkeypatch):
    module = sys.modules["nfq_core.fitting.quantizer"]
    chunk = format_by_id(format_id).blocks_per_group
    assert module.CHUNK_BLOCKS % chunk == 0
    weight = gaussian(64 * chunk * 3 + 65)
    whole = quantize(weight, format=format_id)
    monkeypatch.setattr(module, "CHUNK_BLOCKS", chunk)
    assert torch.equal(quantize(weight, format=format_id).data, whole.data)


@pytest.mark.parametrize("format", ["article16_b64", "t4w8", "", "nf8_b64"])
def test_other_formats_are_refused(format):
    with pytest.raises(ValueError, match="format must be one of nf32_b64, "):
        quantize(gaussian(64), format=format)


def test_a_scalar_format_is_the_same_as_its_levels():
    assert torch.equal(quantize(gaussian(10, 100), format="nf7_b64").data, quantize(gaussian(10, 100), 7).data)
