"""The plain decode on devices other than a CPU: a whole layer at once, in few operations; their bits on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from independent_reader import common_levels
from operations import Recorder
from reference import COMMON_IDS, FORMAT_IDS, decode
from samples import random_buffer

from nfq_core import NFTensor
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.packed import op, torch_decode
from nfq_core.packed.formats import format_by_id
from nfq_core.packed.scales import (
    SCALE_STRIDES,
    SCALE_TABLE_MASK,
    all_scale_tables,
    check_scale_parameters,
    scale_table,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CASES = [(format_id, True) for format_id in FORMAT_IDS] + [(format_id, False) for format_id in COMMON_IDS]
"""Format ids, and whether the tensor has levels of its own."""

LARGEST = max(int(np.prod(shape)) for shape in tensor_shapes(SDXL_BASE, "ldm").values())


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU decodes as other devices do."""
    monkeypatch.setattr(torch_decode, "CHUNKED_DEVICES", ())


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether decoded weights have the bits of fp16 weights, cast to their dtype."""
    wanted = torch.from_numpy(expected).to(found.dtype)
    return torch.equal(found.view(-1).view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("format_id", "own_levels"), CASES)
@pytest.mark.parametrize("weights", [1, 63, 64, 65, 1000, 64 * 24 + 1, 64 * 24 * 5, 64 * 300 + 17])
def test_a_layer_at_once_has_the_bits_of_the_reference(format_id, own_levels, weights, at_once):
    data = random_buffer(format_id, weights, seed=weights, own_levels=own_levels)
    expected = decode(data.numpy(), format_id, weights, None if own_levels else common_levels()[format_id])
    for dtype in DTYPES:
        packed = NFTensor(data, format_by_id(format_id), (weights,), torch.float16)
        assert same_bits(packed.dequantize(dtype), expected)
        assert same_bits(op.dequantize(data, format_id, (weights,), dtype), expected)


@pytest.mark.parametrize("format_id", FORMAT_IDS)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunks_of_other_devices_meet_without_a_seam(format_id, extra, at_once, monkeypatch):
    fmt = format_by_id(format_id)
    monkeypatch.setattr(torch_decode, "DEVICE_CHUNK_WEIGHTS", 64 * fmt.blocks_per_group * 2)
    weights = 64 * fmt.blocks_per_group * 2 * 2 + extra
    data = random_buffer(format_id, weights)
    found = NFTensor(data, fmt, (weights,), torch.float16).dequantize()
    assert same_bits(found, decode(data.numpy(), format_id, weights))


@pytest.mark.parametrize("format_id", FORMAT_IDS)
def test_both_ways_agree_on_damaged_codes(format_id, monkeypatch):
    fmt = format_by_id(format_id)
    data = random_buffer(format_id, 5000)
    sections = fmt.sections(5000)
    planes = torch.randint(0, 256, (sections.scales - sections.coarse,), generator=torch.Generator().manual_seed(0))
    data[sections.coarse : sections.scales] = planes
    tensor = NFTensor(data, fmt, (5000,), torch.float16)
    in_chunks = tensor.dequantize()
    monkeypatch.setattr(torch_decode, "CHUNKED_DEVICES", ())
    assert torch.equal(tensor.dequantize().view(torch.int16), in_chunks.view(torch.int16))


def on_meta(format_id: str, own_levels: bool, dtype: torch.dtype, weights: int) -> Recorder:
    """What a decode does on a device that holds no data, and so cannot be waited for."""
    fmt = format_by_id(format_id)
    data = torch.empty(fmt.sections(weights, own_levels).end, dtype=torch.uint8, device="meta")
    out = torch.empty(weights, dtype=dtype, device="meta")
    torch_decode.dequantize_into(out, data, fmt)
    # What is kept for the process is there now.
    with Recorder(data, out) as found:
        torch_decode.dequantize_into(out, data, fmt)
    return found


@pytest.mark.parametrize(("format_id", "own_levels"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_and_temporaries_of_the_largest_layer(format_id, own_levels, dtype):
    found = on_meta(format_id, own_levels, dtype, LARGEST)
    # No decode unpacks, looks up and multiplies in fewer than four, with an index of two bytes a weight.
    assert 4 <= len(found.operations) <= (24 if format_id.startswith("t") else 16), found.operations
    assert 2 * LARGEST <= found.most <= 300 * 10**6


@pytest.mark.parametrize("format_id", FORMAT_IDS)
def test_temporaries_of_chunks_are_within_the_bound(format_id):
    found = on_meta(format_id, True, torch.float32, 4 * torch_decode.DEVICE_CHUNK_WEIGHTS)
    assert 2 * torch_decode.DEVICE_CHUNK_WEIGHTS <= found.most <= torch_decode.MAX_TEMPORARY_BYTES


@pytest.mark.parametrize("stride", SCALE_STRIDES)
@pytest.mark.parametrize("exponent", range(-14, 16))
def test_every_scale_table_can_be_selected(stride, exponent):
    row, column = exponent & SCALE_TABLE_MASK[0], stride & SCALE_TABLE_MASK[1]
    found = all_scale_tables(torch.device("cpu"))[row, column]
    try:
        check_scale_parameters(exponent, stride)
    except ValueError:
        assert found.isnan().all()
    else:
        assert torch.equal(found.view(torch.int16), scale_table(exponent, stride).view(torch.int16))
