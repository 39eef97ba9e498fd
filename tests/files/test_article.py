"""The article's format: hand-computed values, an independent loop, its bug, its file and files that lie."""

from __future__ import annotations

import bz2
import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import bits, random_weight

from nfq_core.errors import CannotQuantizeError, CorruptFileError, UnsupportedFileError
from nfq_core.files.article import (
    MAX_LEVELS,
    PARTS,
    ArticleTensor,
    article_codebook,
    article_dequantize,
    article_disk_bytes,
    article_quantize,
    is_article_file,
    iter_article_tensors,
    quantized_shapes,
    read_article_tensor,
    write_article_file,
)

SUPERBLOCK = 64 * 256


def spoilt_weight() -> torch.Tensor:
    """One superblock with the maximum 255, so that scales are whole numbers; blocks 1 and 2 meet the bug."""
    weight = torch.zeros(256, 64)
    weight[0, 0] = 255.0
    weight[1, :5] = torch.tensor([1.4, 1.1, -1.4, 0.3, 1.151])
    weight[2, :2] = torch.tensor([0.4, -0.4])
    return weight


def test_two_and_three_levels_by_hand():
    assert article_codebook(2).tolist() == [-1.0, 1.0]
    assert article_codebook(3).tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("levels", [7, 12, 16, 24, 32])
def test_codebook_is_made_of_normal_quantiles(levels):
    codebook = article_codebook(levels)
    assert codebook.dtype == torch.float32

    # erfinv by bisection on math.erf; fp32 erfinv near ±0.96 is good to some 1e-6.
    def erfinv(y: float) -> float:
        low, high = -3.0, 3.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if math.erf(middle) < y else (low, middle)
        return low

    quantiles = [erfinv(0.96 * (2 * i / levels - 1)) for i in range(levels + 1)]
    middles = [(a + b) / 2 for a, b in pairwise(quantiles)]
    np.testing.assert_allclose(codebook.numpy(), np.array(middles) / max(middles), atol=2e-6)


@pytest.mark.parametrize("levels", [1, 0, -4, MAX_LEVELS + 1])
def test_codebooks_of_other_sizes_are_refused(levels):
    with pytest.raises(ValueError, match=f"2 to {MAX_LEVELS} levels, got {levels}"):
        article_codebook(levels)


def test_a_vector_by_hand():
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([1.0, -0.5, 0.25, -1.0])
    weight[1, :3] = torch.tensor([0.5, 0.3, -0.2])
    tensor = article_quantize(weight, 3)
    assert tensor.shape == (2, 64)
    assert tensor.param.tolist() == [128, 3, 50, 64, 16384]
    assert tensor.c2.tolist() == [1.0]
    # 255 * 0.5 = 127.5 is rounded to the even 128.
    assert tensor.c1.tolist() == [255, 128] + [0] * 254
    # Thresholds -0.5, 0.5 and 1.15; a weight on a threshold belongs below it.
    assert tensor.codes[:4].tolist() == [2, 0, 1, 0]
    assert tensor.codes[64:67].tolist() == [2, 2, 1]
    values = article_dequantize(tensor)
    assert values.dtype == torch.float16
    assert values[0, :4].tolist() == [1.0, -1.0, 0.0, -1.0]
    scale = float(np.float16(128 / 255))
    assert values[1, :3].tolist() == [scale, scale, 0.0]


def test_a_spoilt_block_by_hand():
    tensor = article_quantize(spoilt_weight(), 3)
    assert tensor.c1[:3].tolist() == [255, 1, 0]
    assert tensor.block_scales()[:2].tolist() == [255.0, 1.0]
    # 1.4 and 1.151 are beyond 1.15 and become byte 1, which is code 1 - 50 modulo 256.
    assert tensor.codes[64:69].tolist() == [207, 2, 0, 1, 207]
    values = article_dequantize(tensor)
    assert values[1, :5].tolist() == [207.0, 1.0, -1.0, 0.0, 207.0]
    # A block whose scale is rounded to 0 comes back as zeros, whatever its codes are.
    assert tensor.codes[2 * 64] >= 3
    assert values[2].abs().max() == 0
    assert tensor.corrupt_weights() == 2


@pytest.mark.parametrize("levels", [2, 7, 12, 16, 24, 32, MAX_LEVELS])
@pytest.mark.parametrize("kind", ["normal", "short", "rows", "zero", "half", "convolution"])
def test_agrees_with_a_loop_over_the_definition(kind, levels):
    weight = {
        "normal": lambda: random_weight(20, 100),
        "short": lambda: random_weight(3, 1),
        "rows": lambda: random_weight(60, 70) * torch.exp(random_weight(60, 1, seed=1)),
        "zero": lambda: torch.zeros(5, 5),
        "half": lambda: random_weight(30, 64).half(),
        "convolution": lambda: random_weight(8, 4, 3, 3),
    }[kind]()
    tensor = article_quantize(weight, levels)
    c1, c2, codes, values = loop(weight.float().numpy().ravel(), levels)
    assert tensor.c1.tolist() == c1
    assert tensor.c2.tolist() == c2
    assert tensor.codes.tolist() == codes
    assert torch.equal(bits(article_dequantize(tensor)).flatten(), bits(torch.from_numpy(values)))


def loop(weights: np.ndarray, levels: int) -> tuple[list[int], list[float], list[int], np.ndarray]:
    """Quantise and dequantise weight by weight in numpy scalars, from the format's definition alone."""
    f32 = np.float32
    codebook = article_codebook(levels).numpy()
    above = np.append(codebook[1:], f32(1.3))
    thresholds = [(low + high) / f32(2) for low, high in zip(codebook, above, strict=True)]
    c1, c2, codes, values = [], [], [], []
    for start in range(0, len(weights), SUPERBLOCK):
        superblock = np.zeros(SUPERBLOCK, dtype=f32)
        part = weights[start : start + SUPERBLOCK]
        superblock[: len(part)] = part
        largest = np.abs(superblock).max()
        c2.append(float(largest))
        for first in range(0, SUPERBLOCK, 64):
            block = superblock[first : first + 64]
            rounded = int(np.rint(f32(255) * np.abs(block).max() / largest)) if largest else 0
            c1.append(rounded)
            scale = largest * (f32(rounded) if rounded else f32(1e-12)) / f32(255)
            for weight in block[: max(0, len(part) - first)]:
                ratio = weight / scale if scale else f32("nan")
                code = next((i for i, threshold in enumerate(thresholds) if ratio <= threshold), None)
                if code is None:
                    code = ((0 if np.isnan(ratio) else int(np.rint(ratio))) - 50) % 256
                codes.append(code)
                level = np.float16(codebook[code]) if code < levels else np.float16(code)
                values.append(np.float16(f32(level) * scale))
    return c1, c2, codes, np.array(values, dtype=np.float16)


def test_codes_that_are_no_index_can_be_replaced_where_nothing_is_spoilt():
    weight = torch.cat([torch.zeros(256, 64), random_weight(256, 64)])
    weight[300] = 0
    tensor = article_quantize(weight, 16)
    assert (tensor.codes >= 16).any()
    assert tensor.corrupt_weights() == 0
    replaced = ArticleTensor(tensor.shape, 16, tensor.c1, tensor.c2, tensor.assignable_codes())
    assert replaced.codes.max() == 15
    assert torch.equal(bits(article_dequantize(replaced)), bits(article_dequantize(tensor)))


@pytest.mark.parametrize(
    ("levels", "packed_bits", "decibels"), [(32, 5.172, 27.02), (16, 4.169, 20.87), (7, 2.959, 12.97)]
)
def test_has_the_rate_and_error_measured_for_the_articles_code(levels, packed_bits, decibels):
    weight = random_weight(512, 512)
    tensor = article_quantize(weight, levels)
    # The figures were measured on 4.2 million weights; bz2 and the sample vary by about a percent.
    assert 8 * article_disk_bytes(tensor) / weight.numel() == pytest.approx(packed_bits, rel=0.01)
    error = article_dequantize(tensor).float() - weight
    assert 10 * torch.log10(weight.var() / error.square().mean()).item() == pytest.approx(decibels, abs=0.1)


@pytest.mark.parametrize(
    "weight", [torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf, 1.0]]), torch.empty(0, 4)]
)
def test_weights_without_a_meaning_are_refused(weight, tmp_path):
    with pytest.raises(CannotQuantizeError, match="at least one weight, and all of them finite"):
        article_quantize(weight, 16)
    with pytest.raises(CannotQuantizeError, match="tensor 'layer': the article's format needs"):
        write_article_file(tmp_path / "a.safetensors", {"layer": weight}, 16, 32)


STATE_DICT = {
    "attention.weight": random_weight(40, 70).half(),
    "convolution.weight": random_weight(6, 5, 3, 3).half(),
    "time_emb_proj.weight": random_weight(12, 10).half(),
    "attention.bias": random_weight(40).half(),
    "one.bias": torch.tensor([3.0]),
}


@pytest.fixture
def article_file(tmp_path):
    path = tmp_path / "article.safetensors"
    write_article_file(path, STATE_DICT, 16, 32)
    return path


def test_the_file_holds_the_articles_tensors(article_file):
    stored = load_file(article_file)
    quantised = ["attention.weight", "convolution.weight"]
    assert stored.keys() == {
        *STATE_DICT,
        *(f"{name}.quantization.{part}" for name in quantised for part in PARTS),
    }
    assert stored["attention.weight"].tolist() == [0]
    prefix = "convolution.weight.quantization."
    assert stored[prefix + "orig_shape"].tolist() == [6, 5, 3, 3]
    assert stored[prefix + "param"].tolist() == [270, 32, 50, 64, 16384]
    assert {part: stored[prefix + part].dtype for part in PARTS} == PARTS
    data = bz2.decompress(stored[prefix + "M"].numpy().tobytes())
    assert len(data) == 270
    assert 50 <= min(data) <= max(data) < 50 + 32


def test_a_file_is_read_back_as_it_was_written(article_file):
    stored = load_file(article_file)
    assert is_article_file(stored)
    tensors = dict(iter_article_tensors(stored, stored.__getitem__))
    assert tensors.keys() == STATE_DICT.keys()
    for name, weight in STATE_DICT.items():
        tensor = tensors[name]
        if isinstance(tensor, ArticleTensor):
            expected = article_quantize(weight, 32 if weight.dim() == 4 else 16)
            assert (tensor.shape, tensor.levels) == (weight.shape, expected.levels)
            assert torch.equal(tensor.codes, expected.codes)
            assert torch.equal(bits(article_dequantize(tensor)), bits(article_dequantize(expected)))
            assert tensor.corrupt_weights() == 0
        else:
            assert torch.equal(tensor, weight)
            assert tensor.dtype == weight.dtype


def test_shapes_are_told_without_reading_the_codes(article_file):
    stored = load_file(article_file)
    read = []

    def get(name: str) -> torch.Tensor:
        read.append(name)
        return stored[name]

    assert dict(quantized_shapes(stored, get)) == {
        "attention.weight": ((40, 70), 16),
        "convolution.weight": ((6, 5, 3, 3), 32),
        "time_emb_proj.weight": None,
        "attention.bias": None,
        "one.bias": None,
    }
    assert {name.rpartition(".")[2] for name in read} == {"orig_shape", "param"}


def test_a_spoilt_weight_passes_through_a_file(tmp_path):
    write_article_file(tmp_path / "spoilt.safetensors", {"layer": spoilt_weight()}, 3, 3)
    stored = load_file(tmp_path / "spoilt.safetensors")
    tensor = read_article_tensor(stored.__getitem__, "layer")
    assert tensor.corrupt_weights() == 2
    assert article_dequantize(tensor)[1, 0] == 207.0


def test_the_writer_stops_where_the_articles_does(tmp_path):
    weight = torch.zeros(256, 64)
    weight[0, 0] = 1.0
    weight[1, 0] = 200 * 1e-12 / 255
    with pytest.raises(CannotQuantizeError, match=r"tensor 'layer': .* not ASCII, and 1 weights have such bytes"):
        write_article_file(tmp_path / "wide.safetensors", {"layer": weight}, 16, 32)
    assert not (tmp_path / "wide.safetensors").exists()


def test_other_files_are_none_of_the_articles():
    assert not is_article_file([])
    assert not is_article_file(["a.weight", "a.quantization", "a.quantization.scale", ".quantization.M"])


def damaged(part: str, change) -> dict[str, torch.Tensor]:
    """The tensors of a sound file of one 8 x 8 weight, one of which has gone through `change`."""
    tensor = article_quantize(random_weight(8, 8), 16)
    stored = {
        "": torch.tensor([0]),
        "orig_shape": torch.tensor(tensor.shape),
        "param": tensor.param,
        "c1": tensor.c1,
        "c2": tensor.c2,
        "M": compress((tensor.codes + 50).numpy().tobytes()),
    }
    stored[part] = change(stored[part])
    return {f"layer.quantization.{key}" if key else "layer": value for key, value in stored.items()}


def compress(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(bz2.compress(data)), dtype=torch.uint8)


def parameter(place: int, value: int):
    def change(param: torch.Tensor) -> torch.Tensor:
        changed = param.clone()
        changed[place] = value
        return changed

    return change


def flip_a_byte(data: torch.Tensor) -> torch.Tensor:
    changed = data.clone()
    changed[len(data) // 2] ^= 255
    return changed


MALFORMED = {
    "placeholder": (
        "",
        lambda _: torch.zeros(8, 8),
        "'layer' is stored twice: quantised, and as torch.float32 of shape \\(8, 8\\)",
    ),
    "shape's dtype": (
        "orig_shape",
        torch.Tensor.float,
        "'layer.quantization.orig_shape' must be 1-D torch.int64",
    ),
    "parameters' dtype": (
        "param",
        torch.Tensor.long,
        "'layer.quantization.param' must be 1-D torch.int32, got",
    ),
    "c1's dtype": (
        "c1",
        torch.Tensor.int,
        "'layer.quantization.c1' must be 1-D torch.uint8, got torch.int32",
    ),
    "c2's dtype": ("c2", torch.Tensor.half, "'layer.quantization.c2' must be 1-D torch.float32, got"),
    "codes' dimensions": (
        "M",
        lambda data: data[None],
        "'layer.quantization.M' must be 1-D torch.uint8, got",
    ),
    "no dimensions": (
        "orig_shape",
        lambda _: torch.tensor([], dtype=torch.int64),
        "'layer' has 0 dimensions",
    ),
    "dimensions": (
        "orig_shape",
        lambda _: torch.ones(1000, dtype=torch.int64),
        "'layer' has 1000 dimensions",
    ),
    "zero size": ("orig_shape", lambda _: torch.tensor([0, 64]), "'layer' has a size below 1"),
    "negative sizes": ("orig_shape", lambda _: torch.tensor([-8, -8]), "'layer' has a size below 1"),
    "huge shape": ("orig_shape", lambda _: torch.tensor([2**62] * 8), "'layer' of shape .* its length is 64"),
    "parameters": ("param", lambda param: param[:4], "'layer' has 4 parameters, wanted 5"),
    "no levels": ("param", parameter(1, 0), "'layer' has 0 levels, wanted 2 to 78"),
    "levels": ("param", parameter(1, 2**31 - 1), "'layer' has 2147483647 levels, wanted 2 to 78"),
    "length": ("param", parameter(0, 65), "'layer' of shape \\(8, 8\\) needs 64 weights, its length is 65"),
    "negative length": ("param", parameter(0, -1), "needs 64 weights, its length is -1"),
    "c1's length": ("c1", lambda c1: c1[:255], "'layer' of shape .* needs 256 values in c1, found 255"),
    "c2's length": ("c2", lambda c2: c2.repeat(2), "'layer' of shape .* needs 1 values in c2, found 2"),
    "negative maximum": ("c2", torch.Tensor.neg, "'layer' has a negative superblock maximum in c2"),
    "no bz2": ("M", lambda _: torch.zeros(40, dtype=torch.uint8), "'layer' has damaged codes: "),
    "flipped byte": ("M", flip_a_byte, "'layer' has damaged codes: "),
    "no codes": ("M", lambda data: data[:0], "'layer' needs 64 codes, found 0"),
    "truncated": ("M", lambda data: data[:-20], "'layer' needs 64 codes, found 0"),
    "too few codes": ("M", lambda _: compress(b"2" * 63), "'layer' needs 64 codes, found 63"),
    "too many codes": ("M", lambda _: compress(b"2" * 65), "'layer' needs 64 codes, found more than 64"),
    "no end": ("M", lambda data: data[:-1], "'layer' has codes whose bz2 stream is cut short"),
    "two streams": (
        "M",
        lambda data: data.repeat(2),
        "'layer' has codes whose bz2 stream is followed by other data",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_tensor_is_refused_by_name(case):
    part, change, message = MALFORMED[case]
    stored = damaged(part, change)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_article_tensor(stored.__getitem__, "layer")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("place", "value"), [(2, 40), (3, 32), (3, 0), (4, 8192), (4, -1)])
def test_another_geometry_is_refused(place, value):
    stored = damaged("param", parameter(place, value))
    with pytest.raises(UnsupportedFileError, match=f"'layer' has shift, block and superblock .*{value}"):
        read_article_tensor(stored.__getitem__, "layer")


@pytest.mark.parametrize("missing", ["", *(f".quantization.{part}" for part in PARTS)])
def test_an_incomplete_tensor_is_refused(missing):
    stored = damaged("", lambda placeholder: placeholder)
    del stored["layer" + missing]
    for read in (iter_article_tensors, quantized_shapes):
        with pytest.raises(CorruptFileError, match=f"'layer' is incomplete: the file lacks 'layer{missing}'"):
            next(read(stored, stored.__getitem__))


def assert_refused_within_a_megabyte(stored: dict[str, torch.Tensor], reason: str) -> None:
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match=reason):
        read_article_tensor(stored.__getitem__, "layer")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_bz2_bomb_is_not_expanded():
    stored = damaged("M", lambda _: compress(bytes(30_000_000)))
    assert_refused_within_a_megabyte(stored, "needs 64 codes, found more than 64")


def test_a_claimed_size_alone_allocates_nothing():
    stored = damaged("param", parameter(0, 2**31 - 1))
    stored["layer.quantization.orig_shape"] = torch.tensor([2**31 - 1])
    stored["layer.quantization.M"] = compress(bytes(30_000_000))
    assert_refused_within_a_megabyte(stored, "needs 33,554,432 values in c1, found 256")


def test_a_scale_that_is_nan_reads_as_nan_and_counts_as_spoilt(tmp_path):
    """What the article's code makes of a superblock with NaN in it: its writer does not look."""
    stored = damaged("c2", lambda _: torch.tensor([math.nan]))
    stored["layer.quantization.M"] = compress(bytes(64))
    save_file(stored, tmp_path / "nan.safetensors")
    tensor = read_article_tensor(load_file(tmp_path / "nan.safetensors").__getitem__, "layer")
    assert article_dequantize(tensor).isnan().all()
    assert tensor.corrupt_weights() == 64
