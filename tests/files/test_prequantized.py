"""Weights that a source holds quantised already: scales undone by hand-computed vectors, other forms refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import SMALLEST, random_unet, random_weight

import nfq_core
from nfq_core import NFQError
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import compare_files
from nfq_core.checkpoints.state_dict import load, quantize_state_dict
from nfq_core.errors import AlreadyQuantizedError, CorruptFileError
from nfq_core.files.original import Original
from nfq_core.files.prequantized import find_prequantized, rotation_matrix
from nfq_core.files.safetensors_io import describe
from nfq_core.models.unet_keys import tensor_shapes
from nfq_core.planning.settings import Formats, Settings

FP8 = torch.float8_e4m3fn


def conf(**fields) -> torch.Tensor:
    """A tensor `comfy_quant`: JSON as bytes."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def opened(tmp_path, tensors, metadata=None) -> Original:
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    return Original(tmp_path / "a.safetensors")


# 1.5 and −0.75 are numbers of fp8 in both spellings, so that 3 and −1.5 come out exactly at a scale of 2.
VALUES = torch.tensor([[1.5, -0.75], [0.5, 2.0]])
SPELLINGS = {
    "the old one": (
        {"a.weight": VALUES.to(FP8), "a.scale_weight": torch.tensor(2.0), "scaled_fp8": torch.zeros(2).to(FP8)},
        {},
    ),
    "with a scale of inputs": (
        {
            "a.weight": VALUES.to(FP8),
            "a.scale_weight": torch.tensor([2.0]),
            "a.scale_input": torch.tensor(1.0),
            "model.diffusion_model.scaled_fp8": torch.zeros(0),
        },
        {},
    ),
    "e5m2": ({"a.weight": VALUES.to(torch.float8_e5m2), "a.scale_weight": torch.tensor(2.0, dtype=torch.bfloat16)}, {}),
    "a description": (
        {
            "a.weight": VALUES.to(FP8),
            "a.weight_scale": torch.tensor(2.0),
            "a.input_scale": torch.tensor(7.0),
            "a.comfy_quant": conf(format="float8_e4m3fn", full_precision_matrix_mult=True),
        },
        {},
    ),
    "in the metadata": (
        {"a.weight": VALUES.to(FP8), "a.weight_scale": torch.tensor(2.0)},
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": {"format": "float8_e4m3fn"}}})},
    ),
    "int8": (
        {
            "a.weight": torch.tensor([[3, -6], [4, 16]], dtype=torch.int8),
            "a.weight_scale": torch.tensor([[1.0], [0.25]]),
            "a.comfy_quant": conf(format="int8_tensorwise"),
        },
        {},
    ),
}
MEANT = {"int8": torch.tensor([[3.0, -6.0], [1.0, 4.0]])}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scales_are_undone_in_every_spelling(tmp_path, spelling):
    tensors, metadata = SPELLINGS[spelling]
    with opened(tmp_path, tensors | {"a.bias": torch.ones(2)}, metadata) as original:
        assert set(original.entries) == {"a.weight", "a.bias"}
        assert original.entries["a.weight"].dtype == "F16"
        weight = original.tensor("a.weight")
        assert weight.dtype == torch.float16
        assert torch.equal(weight.float(), MEANT.get(spelling, 2 * VALUES))
        assert "_quantization_metadata" not in original.metadata


def test_a_layer_named_below_the_checkpoints_prefix(tmp_path):
    layers = {"layers": {"x": {"format": "nvfp4"}}}
    tensors = {"model.diffusion_model.x.weight": torch.zeros(4, 4, dtype=torch.uint8)}
    with pytest.raises(AlreadyQuantizedError, match="already as nvfp4"):
        opened(tmp_path, tensors, {"_quantization_metadata": json.dumps(layers)})


def test_a_convolution_with_a_scale_for_each_output(tmp_path):
    weight = torch.ones(3, 2, 3, 3)
    scales = torch.tensor([1.0, 2.0, 4.0])
    with opened(tmp_path, {"c.weight": weight.to(FP8), "c.weight_scale": scales.reshape(3, 1)}) as original:
        assert torch.equal(original.tensor("c.weight").float(), weight * scales.reshape(3, 1, 1, 1))


def test_the_rotation_is_the_regular_hadamard_matrix():
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    assert np.array_equal(rotation_matrix(4).numpy(), four)
    assert np.allclose(rotation_matrix(16).numpy(), np.kron(four, four))
    assert np.allclose(rotation_matrix(256) @ rotation_matrix(256), np.eye(256), atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_rotated_int8_weights_are_rotated_back(tmp_path, nested):
    meant = random_weight(8, 32).numpy().astype(np.float64)
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = np.kron(four, four)
    rotated = (meant.reshape(8, 2, 16) @ matrix.T).reshape(8, 32)
    scales = np.abs(rotated).max(axis=1, keepdims=True) / 127
    codes = np.round(rotated / scales)
    fields = {"convrot": True, "convrot_groupsize": 16}
    described = conf(format="int8_tensorwise", **({"params": fields} if nested else fields))
    tensors = {
        "a.weight": torch.from_numpy(codes).to(torch.int8),
        "a.weight_scale": torch.from_numpy(scales).float(),
        "a.comfy_quant": described,
    }
    wanted = ((codes * scales).reshape(8, 2, 16) @ matrix).reshape(8, 32)
    with opened(tmp_path, tensors) as original:
        # Half a unit in the last place of fp16, and fp32's rounding of 16 products.
        assert np.allclose(original.tensor("a.weight").double().numpy(), wanted, rtol=2**-11, atol=1e-5)
    assert np.abs(wanted - meant).max() < scales.max()


def test_mxfp8_blocks(tmp_path):
    rows, columns = 160, 96
    codes = torch.full((rows, columns), 1.5).to(FP8)
    exponents = np.arange(rows * 3).reshape(rows, 3) % 9 + 123
    swizzled = np.zeros((2, 1, 32, 4, 4), dtype=np.uint8)
    for row in range(rows):
        for block in range(3):
            # cuBLAS: tiles of 128 rows and 4 columns; within one, byte 16 (r mod 32) + 4 (r div 32) + c.
            swizzled[row // 128, 0, row % 32, row % 128 // 32, block] = exponents[row, block]
    tensors = {
        "a.weight": codes,
        "a.weight_scale": torch.from_numpy(swizzled.reshape(256, 4)),
        "a.bias": torch.zeros(rows),
        "a.comfy_quant": conf(format="mxfp8"),
    }
    wanted = np.repeat(1.5 * 2.0 ** (exponents - 127), 32, axis=1)
    with opened(tmp_path, tensors) as original:
        assert np.array_equal(original.tensor("a.weight").double().numpy(), wanted)


@pytest.mark.parametrize(
    ("beside", "dtype"),
    [
        ({"b.bias": torch.zeros(64, dtype=torch.bfloat16)}, "BF16"),
        ({"b.bias": torch.zeros(64).half()}, "F16"),
    ],
)
def test_the_dtype_is_that_of_the_rest(tmp_path, beside, dtype):
    with opened(tmp_path, {"a.weight": VALUES.to(FP8), "a.weight_scale": torch.tensor(1.0), **beside}) as original:
        assert original.entries["a.weight"].dtype == dtype


def test_sdxl_computes_in_fp16(tmp_path):
    unet = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in tensor_shapes(SMALLEST, "ldm").items()}
    name = "input_blocks.1.0.in_layers.2.weight"
    unet |= {name: unet[name].to(FP8), name.replace(".weight", ".weight_scale"): torch.tensor(1.0)}
    with opened(tmp_path, unet) as original:
        assert original.entries[name].dtype == "F16"


REFUSED = {
    "bitsandbytes": {"a.weight": torch.zeros(512, 1, dtype=torch.uint8), "a.weight.absmax": torch.zeros(16)},
    "bitsandbytes' int8": {"a.weight": torch.zeros(32, 32, dtype=torch.int8), "a.SCB": torch.zeros(32)},
    "NVFP4": {
        "a.weight": torch.zeros(32, 16, dtype=torch.uint8),
        "a.weight_scale": torch.zeros(32, 2).to(FP8),
        "a.weight_scale_2": torch.tensor(1.0),
    },
    "nvfp4": {"a.weight": torch.zeros(32, 16, dtype=torch.uint8), "a.comfy_quant": conf(format="nvfp4")},
    "convrot_w4a4": {
        "a.weight": torch.zeros(32, 16, dtype=torch.int8),
        "a.weight_scale": torch.zeros(32),
        "a.comfy_quant": conf(format="convrot_w4a4"),
    },
    "asym_w4a8_int8": {"a.weight": torch.zeros(32, 16, dtype=torch.int8), "a.weight_s_rel": torch.zeros(32, 2)},
    "SDNQ": {"a.weight": torch.zeros(32, 64, dtype=torch.uint8), "a.scale": torch.zeros(32, 1)},
    "GGUF": {"a.weight": torch.zeros(32, 144, dtype=torch.uint8)},
    "I8 without a scale": {"a.weight": torch.zeros(32, 64, dtype=torch.int8)},
    "Nunchaku": {"a.qweight": torch.zeros(32, 64, dtype=torch.int8), "a.wscales": torch.zeros(4)},
    "optimum-quanto": {"a.weight._data": torch.zeros(32, 64, dtype=torch.int8), "a.weight._scale": torch.zeros(32)},
    "in blocks": {"a.weight": torch.zeros(256, 256).to(FP8), "a.weight_scale_inv": torch.zeros(2, 2)},
    "scaled inputs": {
        "a.weight": VALUES.to(FP8),
        "a.weight_scale": torch.tensor(1.0),
        "a.pre_quant_scale": torch.ones(2),
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_by_name(tmp_path, name):
    save_file(REFUSED[name], tmp_path / "a.safetensors")
    for convert in (Original, lambda path: quantize_file(path, tmp_path / "b.nfq.safetensors")):
        with pytest.raises(AlreadyQuantizedError) as refusal:
            convert(tmp_path / "a.safetensors")
        text = str(refusal.value)
        assert name.removesuffix("' int8") in text and "'a." in text and "fp16 or bf16 file" in text
        assert "\n" not in text
    assert not (tmp_path / "b.nfq.safetensors").exists()
    with pytest.raises(AlreadyQuantizedError, match="the state dict: tensor 'a"):
        quantize_state_dict(REFUSED[name])


FP8_WEIGHT = {"a.weight": VALUES.to(FP8)}
INT8_WEIGHT = {"a.weight": torch.zeros(8, 24, dtype=torch.int8), "a.weight_scale": torch.ones(8)}
MISFITS = {
    "a scale of another length": (FP8_WEIGHT | {"a.weight_scale": torch.ones(3)}, "does not fit its weight [2, 2]"),
    "a scale for each column": (
        {"a.weight": torch.zeros(2, 3).to(FP8), "a.weight_scale": torch.ones(1, 3)},
        "does not fit its weight [2, 3]",
    ),
    "an integer scale": (FP8_WEIGHT | {"a.weight_scale": torch.ones(2, dtype=torch.int32)}, "(I32 [2]) does not fit"),
    "a rotation of another size": (
        INT8_WEIGHT | {"a.comfy_quant": conf(format="int8_tensorwise", convrot=True, convrot_groupsize=16)},
        "cannot be rotated in groups of 16",
    ),
    "a rotation by no power of four": (
        INT8_WEIGHT | {"a.comfy_quant": conf(format="int8_tensorwise", convrot=True, convrot_groupsize=8)},
        "cannot be rotated in groups of 8",
    ),
    "mxfp8 with one scale": (
        {
            "a.weight": torch.zeros(32, 32).to(FP8),
            "a.weight_scale": torch.ones(1),
            "a.comfy_quant": conf(format="mxfp8"),
        },
        "does not fit its weight [32, 32]",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_scales_that_do_not_fit_are_refused(tmp_path, name):
    tensors, words = MISFITS[name]
    with pytest.raises(AlreadyQuantizedError) as refusal:
        opened(tmp_path, tensors)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def text(*characters: int) -> dict[str, torch.Tensor]:
    return FP8_WEIGHT | {"a.comfy_quant": torch.tensor(characters, dtype=torch.uint8)}


DAMAGED = {
    "no JSON": (text(*b"hello"), {}, "(it is not valid JSON from character 0 on)"),
    "no text": (text(255, 254), {}, "(it is not UTF-8 text)"),
    "a list": (text(*b"[]"), {}, "(a description is not a JSON object)"),
    "a format that is no text": (FP8_WEIGHT | {"a.comfy_quant": conf(format=8)}, {}, "(a format is not text)"),
    "a description of floats": (FP8_WEIGHT | {"a.comfy_quant": torch.ones(2)}, {}, "is not a description)"),
    "int8 without its scale": (
        {"a.weight": VALUES.to(torch.int8), "a.comfy_quant": conf(format="int8_tensorwise")},
        {},
        "is int8_tensorwise without a scale",
    ),
    "metadata that is no JSON": (FP8_WEIGHT, "]", "(it is not valid JSON from character 0 on)"),
    "metadata that is a list": (FP8_WEIGHT, "[]", "(a description is not a JSON object)"),
    "metadata without layers": (FP8_WEIGHT, "{}", "('layers' is missing)"),
    "layers that are null": (FP8_WEIGHT, '{"layers":null}', "(a description is not a JSON object)"),
    "a layer that is text": (FP8_WEIGHT, '{"layers":{"a":"fp8"}}', "(a description is not a JSON object)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_descriptions_are_told_in_words(tmp_path, name):
    tensors, described, words = DAMAGED[name]
    with pytest.raises(CorruptFileError) as refusal:
        opened(tmp_path, tensors, {"_quantization_metadata": described} if described else None)
    assert words in str(refusal.value) and "fetch it again" in str(refusal.value)


def test_integers_that_are_no_weights_stay_what_they_are(tmp_path):
    tensors = {
        "position_ids": torch.arange(4096, dtype=torch.int32),
        "mask": torch.zeros(4096, dtype=torch.uint8),
        "small.weight": torch.zeros(8, dtype=torch.uint8),
        "norm.scale": torch.ones(64),
        "norm.weight": torch.ones(64),
    }
    with opened(tmp_path, tensors) as original:
        assert set(original.entries) == set(tensors)


def scaled_unet() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A UNet with fp8 weights and scales, and the same one as fp16; first and last convolution scaled, too."""
    meant, stored = {}, {"scaled_fp8": torch.zeros(2).to(FP8)}
    for key, weight in random_unet().items():
        if weight.ndim < 2:
            meant[key] = stored[key] = weight
            continue
        scale = weight.abs().max().float() / 448
        stored[key] = (weight.float() / scale).to(FP8)
        stored[key.removesuffix("weight") + "scale_weight"] = scale
        meant[key] = (stored[key].float() * scale).half()
    return stored, meant


def test_a_scaled_checkpoint_becomes_the_file_that_its_fp16_twin_becomes(tmp_path):
    stored, meant = scaled_unet()
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(meant, tmp_path / "fp16.safetensors")
    told = []
    for name in ("fp8", "fp16"):
        result = quantize_file(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.nfq.safetensors")
        told.append((result["quantized"], result["kept"], result["warnings"]))
        dequantize_file(tmp_path / f"{name}.nfq.safetensors", tmp_path / f"{name}-back.safetensors")
    assert told[0] == told[1]
    ours, twins = load_file(tmp_path / "fp8-back.safetensors"), load_file(tmp_path / "fp16-back.safetensors")
    assert ours.keys() == twins.keys() == meant.keys()
    for key, weight in twins.items():
        assert ours[key].dtype == weight.dtype and torch.equal(ours[key], weight), key
    target = tmp_path / "fp8.nfq.safetensors"
    compared = compare_files(tmp_path / "fp8.safetensors", target)
    assert compared == compare_files(tmp_path / "fp16.safetensors", target)
    assert compared["sqnr_db"] > 19


def test_a_scaled_state_dict_in_memory(tmp_path):
    stored, meant = scaled_unet()
    ours, twins = quantize_state_dict(stored), quantize_state_dict(meant)
    assert ours.keys() == twins.keys()
    for key, value in twins.items():
        assert torch.equal(*(each.data if isinstance(each, nfq_core.NFTensor) else each for each in (ours[key], value)))
        assert ours[key].dtype == value.dtype


def test_plain_fp8_is_an_ordinary_source(tmp_path):
    stored = {key: w.to(FP8) for key, w in random_unet().items()}
    save_file(stored, tmp_path / "a.safetensors")
    save_file({key: w.half() for key, w in stored.items()}, tmp_path / "b.safetensors")
    result = quantize_file(tmp_path / "a.safetensors", tmp_path / "a.nfq.safetensors")
    twin = quantize_file(tmp_path / "b.safetensors", tmp_path / "b.nfq.safetensors")
    assert result["warnings"] == twin["warnings"]
    ours, twins = load(tmp_path / "a.nfq.safetensors"), load(tmp_path / "b.nfq.safetensors")
    for key, value in twins.items():
        if isinstance(value, nfq_core.NFTensor):
            assert torch.equal(ours[key].data, value.data) and ours[key].dtype == torch.float16
        else:
            # What is kept keeps its bytes.
            assert ours[key].dtype == FP8
            assert torch.equal(ours[key].half(), value)


def test_fp8_that_cannot_be_quantised_is_kept_as_what_is_meant(tmp_path):
    bad = torch.full((64, 64), torch.nan).to(FP8)
    scaled = {"b.weight": bad.clone(), "b.weight_scale": torch.ones(())}
    save_file({"a.weight": bad} | scaled, tmp_path / "a.safetensors")
    result = quantize_file(tmp_path / "a.safetensors", tmp_path / "a.nfq.safetensors", Settings(Formats()))
    assert len(result["warnings"]) == 2
    kept = load(tmp_path / "a.nfq.safetensors")
    assert kept.keys() == {"a.weight", "b.weight"}
    assert all(each.dtype == torch.float16 and each.isnan().all() for each in kept.values())


def test_nothing_is_read_but_scales_and_descriptions():
    tensors = SPELLINGS["a description"][0]
    read = []
    find_prequantized(describe(tensors), (), lambda key: read.append(key) or tensors[key], "it")
    assert sorted(read) == ["a.comfy_quant", "a.weight_scale"]


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    from nfq_core.cli import main

    save_file(REFUSED["nvfp4"], tmp_path / "a.safetensors")
    assert main(["quantize", str(tmp_path / "a.safetensors"), str(tmp_path / "b.nfq.safetensors")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert issubclass(AlreadyQuantizedError, NFQError)
