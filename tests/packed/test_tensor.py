"""Quantising a weight, and the decode of its packed buffer bit for bit."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from independent_reader import common_levels
from operations import Recorder
from reference import COMMON_IDS, FORMAT_IDS, decode, sqnr_db
from samples import gaussian, random_buffer
from torch._subclasses.fake_tensor import FakeTensorMode

from nfq_core import (
    Calibration,
    CannotQuantizeError,
    CorruptFileError,
    Formats,
    NFTensor,
    Settings,
    quantize,
)
from nfq_core.decibels import sqnr_db as error_db
from nfq_core.files.article import article_dequantize, article_quantize
from nfq_core.fitting.codebook import effort_by_name, fit_codebook
from nfq_core.fitting.search import ScaleGrid, largest_magnitudes
from nfq_core.packed import torch_decode
from nfq_core.packed.formats import LEVELS, format_by_id, nf_format
from nfq_core.packed.packing import unpack_codes
from nfq_core.packed.scales import SCALE_STEPS_PER_OCTAVE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# The decode


@pytest.mark.parametrize("format_id", FORMAT_IDS)
@pytest.mark.parametrize("weights", [1, 63, 64, 65, 1000, 64 * 24 + 1, 64 * 300 + 17])
def test_decode_equals_the_reference_bit_for_bit(format_id, weights):
    data = random_buffer(format_id, weights, seed=weights)
    found = NFTensor(data, format_by_id(format_id), (weights,), torch.float16).dequantize()
    assert (found.numpy().view(np.uint16) == decode(data.numpy(), format_id, weights).view(np.uint16)).all()


@pytest.mark.parametrize("format_id", COMMON_IDS)
@pytest.mark.parametrize("weights", [1, 64, 1000, 64 * 300 + 17])
def test_decode_with_common_levels_equals_the_reference_bit_for_bit(format_id, weights):
    data = random_buffer(format_id, weights, seed=weights, own_levels=False)
    found = NFTensor(data, format_by_id(format_id), (weights,), torch.float16)
    found.validate()
    expected = decode(data.numpy(), format_id, weights, common_levels()[format_id])
    assert (found.dequantize().numpy().view(np.uint16) == expected.view(np.uint16)).all()


@pytest.mark.parametrize("format_id", FORMAT_IDS)
@pytest.mark.parametrize("extra", [-1, 0, 1, 65])
def test_chunks_of_the_decode_meet_without_a_seam(format_id, extra, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch_decode, "THREAD_WEIGHTS", 64 * format_by_id(format_id).blocks_per_group * 3)
    fmt = format_by_id(format_id)
    weights = 64 * fmt.blocks_per_group * 3 * 2 + extra
    data = random_buffer(format_id, weights)
    found = NFTensor(data, fmt, (weights,), torch.float16).dequantize()
    assert (found.numpy().view(np.uint16) == decode(data.numpy(), format_id, weights).view(np.uint16)).all()


def test_decode_by_hand():
    # With exponent 0 and stride 1, scale codes 1 and 128 + 17 name the scales 1 and -2.
    fmt = nf_format(16)
    data = torch.zeros(fmt.packed_bytes(66), dtype=torch.uint8)
    data[:32].view(torch.float16)[:3] = torch.tensor([0.5, -1.0, 0.1])
    data[-2:] = torch.tensor([0, 1])
    data[32:34] = torch.tensor([1 + 0 * 16, 0 + 1 * 16])
    data[35] = 2
    data[-4:-2] = torch.tensor([1, 128 + 17])
    weights = NFTensor(data, fmt, (66,), torch.float16).dequantize().tolist()
    assert weights[:4] == [-1.0, 0.5, 0.5, float(np.float16(0.1))]
    assert weights[63:] == [0.5, -1.0, 2.0]


def test_decode_of_a_trellis_by_hand():
    # Level i is i / 256; element 63 has code 10, elements 0, 1 and 2 have codes 15, 3 and 0, all others code 0.
    fmt = format_by_id("t4w8_b64")
    data = torch.zeros(fmt.sections(64).end, dtype=torch.uint8)
    data[:512].view(torch.float16)[:] = torch.arange(256) / 256
    data[512:514] = torch.tensor([15, 3])
    data[512 + 63] = 10
    data[-3:] = torch.tensor([1, 0, 1])
    numbers = [weight * 256 for weight in NFTensor(data, fmt, (64,), torch.float16).dequantize().tolist()]
    assert numbers[:4] == [10 * 16 + 15, 15 * 16 + 3, 3 * 16, 0]
    assert numbers[61:] == [0, 0, 10]


@pytest.mark.parametrize("format_id", FORMAT_IDS)
def test_other_dtypes_are_the_fp16_value_cast(format_id):
    tensor = NFTensor(random_buffer(format_id, 1000), format_by_id(format_id), (8, 125), torch.float16)
    half = tensor.dequantize()
    for dtype in DTYPES:
        assert torch.equal(tensor.dequantize(dtype), half.to(dtype))
        assert tensor.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("format_id", FORMAT_IDS)
def test_any_bytes_decode_to_some_levels(format_id):
    fmt = format_by_id(format_id)
    data = random_buffer(format_id, 1000)
    sections = fmt.sections(1000)
    planes = torch.randint(0, 256, (sections.scales - sections.coarse,), generator=torch.Generator().manual_seed(0))
    data[sections.coarse : sections.scales] = planes
    decoded = NFTensor(data, fmt, (1000,), torch.float16).dequantize()
    scales = fmt.block_scales(data, 1000).float().repeat_interleave(64)[:1000]
    possible = (fmt.levels_in(data, sections).float() * scales[:, None]).half()
    assert (decoded[:, None] == possible).any(dim=1).all()


# Quantising


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (10, 100), (64 * 24 + 1,), (3, 5, 3, 3), (7, 1, 191)])
def test_round_trip_of_any_size(levels, shape):
    weight = gaussian(*shape)
    tensor = quantize(weight, levels)
    assert tensor.shape == weight.shape
    assert tensor.dtype == torch.float32
    assert tensor.nbytes == nf_format(levels).packed_bytes(weight.numel())
    assert tensor.bits_per_weight == 8 * tensor.nbytes / weight.numel()
    tensor.validate()
    decoded = tensor.dequantize()
    expected = decode(tensor.data.numpy(), f"nf{levels}_b64", weight.numel())
    assert (decoded.numpy().view(np.uint16).ravel() == expected.view(np.uint16)).all()

    # Among the scales tried is the second one above a block's largest magnitude or smaller: no weight is then clipped
    # by more than its distance to the outermost level, nor farther from a level than half the widest gap. The scale
    # that is taken instead is better but for the grid of the search, see test_search.py (2 * 8 * 0.0042 of the largest
    # magnitude), for the grid of the codes (a cell of 0.00055 for each of 64 weights) and for the rounding to fp16.
    book = tensor.levels.double().sort().values
    farthest = max(book.diff().amax().item() / 2, 1 + book[0].item(), 1 - book[-1].item())
    step = 2 ** (2 * tensor.data[2 * levels + 1].item() / SCALE_STEPS_PER_OCTAVE)
    pad = (0, -weight.numel() % 64)
    blocks = torch.nn.functional.pad(weight.flatten().double(), pad).view(-1, 64)
    errors = torch.nn.functional.pad((weight - decoded.float()).flatten().double(), pad).view(-1, 64).norm(dim=1)
    bound = 8 * (farthest * step + 2 * 0.0042 + 2 * 0.00055 + 2**-11) * blocks.abs().amax(dim=1)
    assert (errors <= bound).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_fast_is_better_than_the_article_on_gaussian_weights(levels):
    weight = gaussian(256, 512)
    ours = sqnr_db(weight.numpy(), quantize(weight, levels).dequantize(torch.float32).numpy())
    article = sqnr_db(weight.numpy(), article_dequantize(article_quantize(weight, levels)).float().numpy())
    # Measured: 0.89 dB at 32 levels to 1.45 dB at 7.
    assert ours > article + 0.5


@pytest.mark.parametrize("levels", LEVELS)
def test_best_is_no_worse_than_fast(levels):
    weight = gaussian(64, 512)
    errors = {
        effort: (weight - quantize(weight, levels, effort=effort).dequantize(torch.float32)).square().sum()
        for effort in ("fast", "best")
    }
    # The same rounds, more of them, and the best one counts; Gaussian codes need no size limit.
    assert errors["best"] <= errors["fast"] * (1 + 1e-6)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_best_spares_small_tensors(levels, rows):
    """What a table of codes takes, much of so small a tensor, is no reason for fewer levels."""
    weight = gaussian(rows, 64)
    fast, best = (error_db(weight, quantize(weight, levels, effort=effort).dequantize()) for effort in ("fast", "best"))
    assert best > fast - 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_taken_and_remembered(dtype):
    weight = gaussian(5, 100).to(dtype)
    tensor = quantize(weight, 24)
    assert tensor.dtype == dtype
    assert torch.equal(tensor.data, quantize(weight.float(), 24).data)


@pytest.mark.parametrize(
    "view",
    [lambda w: w.T, lambda w: w[::2, 1::3], lambda w: w.flip(0), lambda w: w[0].expand(40, 90)],
    ids=["transposed", "strided", "flipped", "expanded"],
)
def test_strides_do_not_matter(view):
    weight = view(gaussian(60, 90))
    tensor = quantize(weight, 12)
    assert tensor.shape == weight.shape
    assert torch.equal(tensor.data, quantize(weight.contiguous(), 12).data)


def test_the_weight_is_left_alone_and_needs_no_grad():
    weight = gaussian(10, 100).requires_grad_()
    before = weight.detach().clone()
    decoded = quantize(weight).dequantize()
    assert torch.equal(weight.detach(), before)
    assert not decoded.requires_grad


def test_quantising_is_deterministic():
    weight = gaussian(40, 100)
    assert torch.equal(quantize(weight).data, quantize(weight).data)


@pytest.mark.parametrize("levels", LEVELS)
def test_chunks_of_a_weight_meet_without_a_seam(levels, monkeypatch):
    module = sys.modules["nfq_core.fitting.quantizer"]
    chunk = nf_format(levels).blocks_per_group
    assert module.CHUNK_BLOCKS % chunk == 0
    weight = gaussian(64 * chunk * 3 + 65)
    whole = quantize(weight, levels)
    monkeypatch.setattr(module, "CHUNK_BLOCKS", chunk)
    assert torch.equal(quantize(weight, levels).data, whole.data)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blocks_are_quantised_where_they_are_without_waiting(levels, dtype):
    """Fakes refuse to mix devices, and to tell a value, for which a real device would have to be waited for."""
    module = sys.modules["nfq_core.fitting.quantizer"]
    fmt, sample = nf_format(levels), gaussian(300, 64)
    grid = ScaleGrid.for_blocks(largest_magnitudes(sample))
    book = fit_codebook(sample, grid, fmt, effort_by_name("fast"), 300 * 64)
    blocks = 2 * module.DEVICE_CHUNK_BLOCKS + 5
    assert module.DEVICE_CHUNK_BLOCKS % fmt.blocks_per_group == 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        flat = torch.empty(64 * blocks - 7, dtype=dtype, device="meta")
        largest = torch.empty(blocks, device="meta")
        assert largest_magnitudes(module._blocks(flat, 0, blocks, dtype)).device.type == "meta"
        fitted, parts = module._scalar(flat, largest, grid, book)
        data = module._encode(parts, len(flat), fmt, grid, fitted, flat.device)
        assert data.device.type == "meta"
        assert len(data) == fmt.packed_bytes(len(flat))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("levels", LEVELS)
def test_quantising_on_a_cuda_device_is_as_good(levels):
    weight = gaussian(1000, 640).half()
    found = [quantize(weight, levels, device=device).to("cpu").dequantize() for device in ("cpu", "cuda")]
    errors = [(one.double() - weight.double()).square().sum().item() for one in found]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("levels", LEVELS)
def test_levels_are_numbered_from_the_most_used_to_the_least(levels):
    tensor = quantize(gaussian(512, 64), levels)
    sections = tensor.sections
    coarse = tensor.data[sections.coarse : sections.fine]
    fine = tensor.data[sections.fine : sections.scales]
    uses = torch.bincount(unpack_codes(coarse, fine, 512, tensor.format).flatten(), minlength=levels)
    assert (uses.diff() <= 0).all()
    assert uses[-1] < uses[0]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(1,), (64,), (3, 50), (64 * 24 + 1,)])
def test_zeros_come_back_as_zeros(levels, shape):
    tensor = quantize(torch.zeros(shape), levels)
    tensor.validate()
    assert torch.equal(tensor.dequantize(), torch.zeros(shape, dtype=torch.float16))


@pytest.mark.parametrize("levels", LEVELS)
def test_zero_blocks_come_back_as_zeros(levels):
    weight = gaussian(20, 64)
    weight[3], weight[19] = 0, 0
    tensor = quantize(weight, levels)
    decoded = tensor.dequantize()
    assert (tensor.data[-22:-2] == 0).nonzero().flatten().tolist() == [3, 19]
    assert (decoded[[3, 19]] == 0).all()
    assert (decoded != 0).any(dim=1).sum() == 18


@pytest.mark.parametrize("levels", LEVELS)
def test_one_huge_outlier_spoils_only_its_own_block(levels):
    weight = gaussian(256, 64)
    plain = quantize(weight, levels).dequantize()
    weight[7, 11] = 1e4
    decoded = quantize(weight, levels).dequantize()
    # Half a step of the coarsest grid of scales, which has 16/3 in an octave.
    assert decoded[7, 11].item() == pytest.approx(1e4, rel=2 ** (3 / 32) - 1)
    others = torch.arange(256) != 7
    # Coarser scales cost 0.2 to 0.7 dB.
    floor = sqnr_db(weight[others].numpy(), plain[others].numpy()) - 1
    assert sqnr_db(weight[others].numpy(), decoded[others].numpy()) > floor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 63, 100, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_refused(value, position, dtype):
    weight = gaussian(130).to(dtype)
    weight[position] = value
    with pytest.raises(CannotQuantizeError, match="NaN or Inf"):
        quantize(weight)


@pytest.mark.parametrize("largest", [1e-5, 2**-12.1, 65505.0, 1e10, -1e10])
def test_weights_beyond_fp16_scales_are_refused(largest):
    weight = gaussian(130) * 1e-6
    weight[7] = largest
    with pytest.raises(CannotQuantizeError, match=r"largest magnitude, .* is out of the range of fp16 scales"):
        quantize(weight)


def test_weights_beyond_fp32_are_refused():
    with pytest.raises(CannotQuantizeError, match="its largest magnitude is beyond fp32"):
        quantize(torch.full((64, 64), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("outlier", [65504.0, -65504.0, 61000.0, 60000.0])
@pytest.mark.parametrize("tiny_blocks", [0, 1])
def test_an_outlier_beyond_the_largest_scale_doubles_the_levels(levels, outlier, tiny_blocks):
    # Beside 0.02 the grid must span 21 octaves: it is the coarsest one, and ends at 2**15.625 = 50528.
    weight = gaussian(256, 64)
    weight[3 : 3 + tiny_blocks] *= 1e-5
    others = torch.arange(256) != 7
    before = sqnr_db(weight[others].numpy(), quantize(weight, levels).dequantize(torch.float32)[others].numpy())
    weight[7, 11] = outlier
    tensor = quantize(weight, levels)
    tensor.validate()
    assert tensor.levels.abs().amax() == 2
    decoded = tensor.dequantize(torch.float32)
    assert torch.isfinite(decoded).all()
    # Twice a scale is within a step of the coarsest grid, 16/3 in an octave, below the outlier. The nearest may be
    # above it, but not beyond fp16.
    assert 1 - decoded[7, 11].item() / outlier == pytest.approx(0, abs=1 - 2 ** (-3 / 16))
    # Weights far below the smallest scale, 2**-8 here, are nearest to zero.
    assert (decoded[3 : 3 + tiny_blocks] == 0).all()
    # Coarser scales and levels that a single block has moved cost 0.1 to 1.3 dB, as with an outlier of 50,000.
    assert sqnr_db(weight[others].numpy(), decoded[others].numpy()) > before - 1.5


@pytest.mark.parametrize("largest", [65504.0, 60000.0])
def test_no_value_leaves_fp16_where_every_block_is_at_its_end(largest):
    weight = gaussian(64, 64, sigma=largest / 3).clamp(-largest, largest)
    weight[:, 0] = largest
    decoded = quantize(weight, 32).dequantize()
    assert torch.isfinite(decoded).all()
    # The end of the range keeps all largest magnitudes from the nearest scale; elsewhere 32 levels leave 27 dB.
    assert sqnr_db(weight.numpy(), decoded.float().numpy()) > 20


def test_levels_are_doubled_only_where_they_must_be():
    weight = gaussian(10, 64)
    weight[7, 11] = 50000.0
    tensor = quantize(weight)
    assert tensor.levels.abs().amax() == 1
    assert tensor.dequantize()[7, 11].item() == pytest.approx(50000, rel=2 ** (3 / 32) - 1)


@pytest.mark.parametrize("levels", LEVELS)
def test_one_tiny_block_costs_the_others_nothing(levels):
    weight = gaussian(4096, 64)
    without = quantize(weight, levels)
    others = torch.arange(4096) != 1234
    before = sqnr_db(weight[others].numpy(), without.dequantize(torch.float32)[others].numpy())
    weight[1234] *= 1e-5
    tensor = quantize(weight, levels)
    assert tensor.data[-1] == without.data[-1] == (1 if levels >= 16 else 2)
    decoded = tensor.dequantize(torch.float32)
    assert sqnr_db(weight[others].numpy(), decoded[others].numpy()) > before - 0.02
    # The block itself lies far below the smallest scale: zero is nearest.
    assert (decoded[1234] == 0).all()


@pytest.mark.parametrize("levels", [32, 24, 16])
def test_many_tiny_blocks_keep_their_precision(levels):
    weight = gaussian(4096, 64)
    tiny = torch.arange(4096) % 100 == 0
    before = sqnr_db(weight[tiny].numpy(), quantize(weight, levels).dequantize(torch.float32)[tiny].numpy())
    weight[tiny] *= 2**-9
    tensor = quantize(weight, levels)
    assert tensor.data[-1] == 2
    # Twice the step between scales costs 0.15 to 0.25 dB.
    found = sqnr_db(weight[tiny].numpy(), tensor.dequantize(torch.float32)[tiny].numpy())
    assert found > before - 0.4


@pytest.mark.parametrize("largest", [2**-12.0, 60000.0, 65504.0])
def test_the_ends_of_the_range_are_quantised(largest):
    decoded = quantize(torch.linspace(-1, 1, 640) * largest, 32).dequantize(torch.float32)
    assert sqnr_db((torch.linspace(-1, 1, 640) * largest).numpy(), decoded.numpy()) > 20


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(CannotQuantizeError, match=f"this one is {dtype}"):
        quantize(torch.ones(64).to(dtype))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)])
def test_empty_weights_are_refused(shape):
    with pytest.raises(CannotQuantizeError, match="empty"):
        quantize(torch.zeros(shape))


def test_other_levels_and_efforts_are_refused():
    with pytest.raises(ValueError, match="got 8"):
        quantize(gaussian(64), 8)
    with pytest.raises(ValueError, match="fast, best, got 'slow'"):
        quantize(gaussian(64), effort="slow")


# Writing into `out`


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_out_is_written_and_nothing_of_its_size_is_allocated(levels, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch_decode, "THREAD_WEIGHTS", 64 * 24 * 16)
    weights = 64 * 24 * 16 * 8
    format_id = f"nf{levels}_b64"
    tensor = NFTensor(random_buffer(format_id, weights), format_by_id(format_id), (96, 2048), torch.float16)
    out = torch.full(tensor.shape, float("nan"), dtype=dtype)
    with Recorder(out, tensor.data) as with_out:
        assert tensor.dequantize(out=out) is out
    with Recorder(tensor.data) as without_out:
        plain = tensor.dequantize(dtype)
    assert torch.equal(out, plain)
    assert max(without_out.sizes) == out.nbytes
    assert max(with_out.sizes) <= out.nbytes / 2


@pytest.mark.parametrize("threads", [1, 64])
def test_temporaries_are_bounded(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights = torch_decode.CPU_CHUNK_WEIGHTS + 2 * torch_decode.THREAD_WEIGHTS
    tensor = NFTensor(random_buffer("nf24_b64", weights), nf_format(24), (weights,), torch.float16)
    out = torch.empty(weights, dtype=torch.float32)
    with Recorder(out, tensor.data) as found:
        tensor.dequantize(out=out)
    at_once = min(torch_decode.THREAD_WEIGHTS * threads, torch_decode.CPU_CHUNK_WEIGHTS)
    assert max(found.sizes) <= 2.1 * at_once < out.nbytes
    assert at_once < found.most <= 10 * at_once


QUANTIZED = {
    "scalar": {"levels": 24},
    "scalar, calibrated": {"importance": torch.linspace(0.1, 1, 64)},
    "scalar, with feedback": {"hessian": torch.eye(64) + 0.1},
    "trellis": {"format": "t3w8_b64"},
    "trellis, with feedback": {"format": "t3w8_b64", "hessian": torch.eye(64) + 0.1},
}


@pytest.mark.parametrize("arguments", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_torch_make_no_difference(arguments, dtype):
    weight = gaussian(96, 64)
    wanted = quantize(weight, **arguments)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = quantize(weight, **arguments)
        with torch.device("meta"):
            on_meta = quantize(weight, **arguments)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.data, wanted.data) and torch.equal(on_meta.data, wanted.data)


def test_a_default_device_does_not_spoil_what_is_kept():
    tensor = quantize(gaussian(7, 100), 12)
    with torch.device("meta"):
        tensor.dequantize(out=(out := torch.empty(7, 100, device="cpu")))
    assert torch.equal(out, tensor.dequantize(torch.float32))


@pytest.mark.parametrize(
    "make", [lambda data: torch.stack([data, data], 1)[:, 0], lambda data: torch.cat([data[:2], data])[2:]]
)
def test_a_buffer_that_kernels_cannot_read_is_refused(make):
    tensor = quantize(gaussian(7, 100))
    with pytest.raises(CorruptFileError, match="contiguous, with a storage offset that is a multiple of four bytes"):
        NFTensor(make(tensor.data), tensor.format, tensor.shape, tensor.dtype)


@pytest.mark.parametrize(
    "out",
    [torch.zeros(100, 5), torch.zeros(500), torch.zeros(100, 5).T, torch.zeros(5, 200)[:, ::2]],
    ids=["other shape", "flat", "transposed", "strided"],
)
def test_an_out_of_another_shape_or_strides_is_refused(out):
    tensor = quantize(gaussian(5, 100))
    with pytest.raises(ValueError, match=r"out must be a contiguous .*tensor of shape \(5, 100\) on cpu"):
        tensor.dequantize(out=out)
    assert (out == 0).all()


def test_an_out_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"on cpu, got .* on meta"):
        quantize(gaussian(5, 100)).dequantize(out=torch.zeros(5, 100, device="meta"))


def test_an_integer_out_or_dtype_is_refused():
    tensor = quantize(gaussian(5, 100))
    with pytest.raises(ValueError, match=r"fp16, bf16, fp32 or fp64, got torch\.int8"):
        tensor.dequantize(out=torch.zeros(5, 100, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"fp16, bf16, fp32 or fp64, got torch\.int8"):
        tensor.dequantize(torch.int8)


# The packed buffer's own checks


@pytest.mark.parametrize("change", [-1, 1])
def test_a_buffer_of_another_length_is_refused(change):
    data = torch.zeros(nf_format(16).packed_bytes(500) + change, dtype=torch.uint8)
    with pytest.raises(CorruptFileError, match=r"nf16_b64 weight of shape \(5, 100\) is .* buffer of 298 bytes"):
        NFTensor(data, nf_format(16), (5, 100), torch.float16)


@pytest.mark.parametrize("reshape", [lambda d: d.view(1, -1), lambda d: d.to(torch.int8)])
def test_a_buffer_of_another_kind_is_refused(reshape):
    data = torch.zeros(nf_format(16).packed_bytes(500), dtype=torch.uint8)
    with pytest.raises(CorruptFileError, match="1-D uint8 buffer"):
        NFTensor(reshape(data), nf_format(16), (500,), torch.float16)


@pytest.mark.parametrize(("exponent", "stride"), [(-15, 1), (9, 1), (0, 0), (-14, 4), (-7, 3)])
def test_scale_parameters_out_of_bounds_are_refused(exponent, stride):
    tensor = quantize(gaussian(500))
    tensor.data[-2:] = torch.tensor([exponent % 256, stride])
    with pytest.raises(CorruptFileError, match="scale"):
        tensor.validate(codes=False)


@pytest.mark.parametrize("format_id", FORMAT_IDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_levels_that_are_not_finite_are_refused(format_id, value):
    tensor = NFTensor(random_buffer(format_id, 500), format_by_id(format_id), (500,), torch.float16)
    tensor.validate(codes=False)
    tensor.levels[-1] = value
    with pytest.raises(CorruptFileError, match="its levels are not finite"):
        tensor.validate(codes=False)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_superblock_scales_that_are_not_finite_are_refused(levels, value):
    format_id, weights = f"article{levels}_b64", 64 * 256 + 1
    fmt = format_by_id(format_id)
    tensor = NFTensor(random_buffer(format_id, weights), fmt, (weights,), torch.float16)
    tensor.validate()
    fmt.split_scales(tensor.data, weights)[0][1] = value
    with pytest.raises(CorruptFileError, match="its superblock scales are not finite"):
        tensor.validate(codes=False)


@pytest.mark.parametrize("prefix", ["nf", "article"])
@pytest.mark.parametrize(("levels", "byte"), [(24, 216), (12, 255)])
def test_a_coarse_byte_beyond_its_digits_is_refused(prefix, levels, byte):
    format_id = f"{prefix}{levels}_b64"
    tensor = NFTensor(random_buffer(format_id, 500), format_by_id(format_id), (500,), torch.float16)
    tensor.validate()
    tensor.data[tensor.format.sections(500).coarse] = byte
    with pytest.raises(CorruptFileError, match="coarse plane holds an invalid byte"):
        tensor.validate()


@pytest.mark.parametrize("prefix", ["nf", "article"])
def test_a_code_that_names_no_level_is_refused(prefix):
    format_id = f"{prefix}7_b64"
    tensor = NFTensor(random_buffer(format_id, 500), format_by_id(format_id), (500,), torch.float16)
    sections = tensor.format.sections(500)
    tensor.data[sections.coarse] |= 3
    tensor.data[sections.fine] |= 1
    with pytest.raises(CorruptFileError, match="a code without a level"):
        tensor.validate()


# What one would guess of a tensor


@pytest.fixture
def packed():
    return quantize(gaussian(6, 40), 16)


def test_it_has_the_shape_of_a_tensor(packed):
    assert (packed.ndim, packed.dim(), packed.size(), packed.size(-1), packed.numel()) == (2, 2, (6, 40), 40, 240)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_a_dtype_dequantises(packed, dtype):
    expected = packed.dequantize(dtype)
    for found in (
        packed.to(dtype),
        packed.to(dtype=dtype),
        packed.to("cpu", dtype),
        packed.to(device="cpu", dtype=dtype),
    ):
        assert found.dtype == dtype and torch.equal(found, expected)


def test_short_names_of_dtypes(packed):
    assert torch.equal(packed.float(), packed.dequantize(torch.float32))
    assert torch.equal(packed.half(), packed.dequantize())
    assert torch.equal(packed.bfloat16(), packed.dequantize(torch.bfloat16))


def test_to_a_device_keeps_it_packed(packed):
    for found in (packed.to("meta"), packed.to(device="meta", non_blocking=True), packed.to(torch.device("meta"))):
        assert isinstance(found, NFTensor) and found.device.type == "meta" and found.shape == packed.shape
    assert torch.equal(packed.cpu().data, packed.data)
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            packed.cuda()


def test_to_refuses_what_it_does_not_do(packed):
    with pytest.raises(TypeError, match=r"has no memory_format; dequantize\(\) it first"):
        packed.to("cpu", memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"dequantised to fp16, bf16, fp32 or fp64, got torch\.int8"):
        packed.to(torch.int8)


def test_as_a_numpy_array(packed):
    expected = packed.dequantize().numpy()
    assert (packed.numpy() == expected).all() and packed.numpy().dtype == np.float16
    assert (np.asarray(packed) == expected).all()
    assert np.asarray(packed, dtype=np.float32).dtype == np.float32
    assert np.array(packed).shape == (6, 40)


def test_what_is_printed_is_short(packed):
    assert repr(packed) == "NFTensor(nf16_b64, shape=(6, 40), 5.533 bits per weight)"
    assert repr(packed.format) == "<nf16_b64>"
    assert len(repr(Settings(Formats.of(12)))) < 160
    assert repr(Calibration({}, "SDXL", prompts=8)) == "Calibration(SDXL, 0 weights, 8 prompts)"
