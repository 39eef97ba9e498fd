"""Files with text encoders: converted, described, compared, turned back, and loaded where programs want them dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import TINY as TINY_UNET
from text_models import SMALL_G, SMALL_L, TINY, decoder, random_tensors

from benchmarks.checkpoint_shapes import clip, text_encoders
from nfq_core import NFQFile, NFTensor, Settings, load, quantize_state_dict
from nfq_core.checkpoints.batch import convert_folders
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.dry_run import forecast_file, forecast_lines
from nfq_core.checkpoints.examine import compare_files, file_info, info_lines, of_main_component, verify_file
from nfq_core.checkpoints.kinds import kind_of
from nfq_core.checkpoints.state_dict import load_tensors
from nfq_core.checkpoints.targets import container_name
from nfq_core.checkpoints.whole_checkpoint import diffusers_unet_names, missing_companions, text_encoders_of, unet_names
from nfq_core.errors import UnsupportedFileError
from nfq_core.files.original import Original
from nfq_core.models.unet_keys import tensor_shapes

UNET = tensor_shapes(TINY_UNET, "prefixed")
TEXT = text_encoders(SMALL_L, SMALL_G)
VAE = {"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3), "first_stage_model.encoder.conv_out.bias": (8,)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_file(random_tensors(TEXT | VAE | UNET), path)
    return path


@pytest.fixture(scope="module")
def packed(whole: Path) -> Path:
    path = whole.with_name("whole.nfq.safetensors")
    quantize_file(whole, path, Settings.of(text_encoders="5bit"))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("alone")
    save_file(random_tensors(clip(SMALL_L)), folder / "clip_l.safetensors")
    quantize_file(folder / "clip_l.safetensors", folder / "clip_l.nfq.safetensors")
    return folder / "clip_l.safetensors", folder / "clip_l.nfq.safetensors"


def test_info_of_each_component(whole, packed):
    info = file_info(packed)
    before, after = load_file(whole), {layer["name"]: layer for layer in info["layers"]}
    assert info["settings"]["text_encoders"] == "5bit"
    found = {each["name"]: each for each in info["components"]}
    assert [(each["kind"], each["name"]) for each in info["components"]] == [
        ("diffusion model", "diffusion model"),
        ("text encoder", "CLIP-L"),
        ("text encoder", "OpenCLIP-G"),
        ("VAE", "VAE"),
    ]
    for name, start in (("diffusion model", "model."), ("CLIP-L", "conditioner.embedders.0."), ("VAE", "first_stage")):
        component, keys = found[name], [key for key in before if key.startswith(start)]
        layers = [layer for key, layer in after.items() if key.startswith(start)]
        weights = sum(before[layer["name"]].numel() for layer in layers)
        stored = sum(layer["bits_per_weight"] * before[layer["name"]].numel() / 8 for layer in layers)
        assert (component["tensors"], component["weights"]) == (len(keys), weights)
        assert component["original_bytes"] == sum(before[key].nbytes for key in keys)
        kept = sum(before[key].nbytes for key in keys if key not in after)
        assert component["file_bytes"] == pytest.approx(kept + stored)
        assert component["bits_per_weight"] == (pytest.approx(stored * 8 / weights) if weights else None)
    assert found["VAE"]["packed_bits_per_weight"] is None
    assert found["diffusion model"]["packed_bits_per_weight"] <= 4.1 < found["CLIP-L"]["packed_bits_per_weight"]
    assert sum(each["weights"] for each in info["components"]) == info["weights"]
    main = of_main_component(info)
    for key in ("weights", "bits_per_weight", "packed_bits_per_weight"):
        assert main[key] == info["components"][0][key] != info[key]
    assert main["file_bytes"] == info["file_bytes"]
    lines = dict(info_lines(packed, info))
    assert "packed" in lines["OpenCLIP-G"] and lines["VAE"].endswith("kept")


def test_a_file_of_one_component_has_no_lines_of_components(alone):
    info = file_info(alone[1])
    lines = dict(info_lines(alone[1], info))
    assert lines["model"] == "CLIP-L, plain keys" and "CLIP-L" not in lines
    assert of_main_component(info) == info


def test_there_and_back(whole, packed, tmp_path):
    assert verify_file(packed)["ok"]
    dequantize_file(packed, tmp_path / "back.safetensors")
    before, back = load_file(whole), load_file(tmp_path / "back.safetensors")
    assert {key: (value.shape, value.dtype) for key, value in before.items()} == {
        key: (value.shape, value.dtype) for key, value in back.items()
    }
    loaded = load(packed)
    for key, value in loaded.items():
        wanted = value.dequantize() if isinstance(value, NFTensor) else before[key]
        assert torch.equal(back[key], wanted)
    assert isinstance(loaded["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"], NFTensor)


def test_in_memory_as_in_files(whole, packed):
    in_memory, in_file = quantize_state_dict(load_file(whole), text_encoders="5bit"), load(packed)
    for key, value in in_memory.items():
        if isinstance(value, NFTensor):
            assert torch.equal(value.data, in_file[key].data), key
        else:
            assert torch.equal(value, in_file[key]), key


def test_compare_tells_the_models_apart(whole, packed, tmp_path):
    result = compare_files(whole, packed)
    parts = {each["name"]: each["sqnr_db"] for each in result["components"]}
    # 32 levels leave some 28 dB on Gaussian weights, and 8 bits some 45 in the table of tokens.
    assert 27 < parts["CLIP-L"] < 30 and 27 < parts["OpenCLIP-G"] < 30
    assert parts["diffusion model"] < parts["CLIP-L"] and "not_compared" not in result
    save_file({key: value for key, value in load_file(whole).items() if key in UNET}, tmp_path / "unet.safetensors")
    result = compare_files(tmp_path / "unet.safetensors", packed)
    assert result["not_compared"] == ["CLIP-L", "OpenCLIP-G"]
    assert result["sqnr_db"] == pytest.approx(parts["diffusion model"])
    assert all(layer["name"] in UNET for layer in result["layers"])


def test_compare_with_the_unet_in_another_layout(whole, packed, tmp_path):
    """The text encoders have their names, the UNet has others."""
    before = load_file(whole)
    with NFQFile(packed) as file:
        names = diffusers_unet_names(file)
    save_file({names.get(key, key): value for key, value in before.items()}, tmp_path / "other.safetensors")
    assert compare_files(tmp_path / "other.safetensors", packed) == compare_files(whole, packed)


def test_a_dry_run_of_each_component(whole, packed, tmp_path):
    expected = forecast_file(whole, tmp_path / "a.nfq.safetensors", Settings.of(text_encoders="5bit"))
    made = file_info(packed)
    assert expected["file_bytes"] == pytest.approx(made["file_bytes"], rel=0.01)
    for one, other in zip(expected["components"], made["components"], strict=True):
        assert one["name"] == other["name"] and one["weights"] == other["weights"]
        assert one["file_bytes"] == pytest.approx(other["file_bytes"], rel=0.02)
    assert any(line.startswith("OpenCLIP-G: about") for line in forecast_lines(expected))


def test_a_size_of_the_whole_file(whole, tmp_path):
    target = tmp_path / "a.nfq.safetensors"
    quantize_file(whole, target, Settings.of(target_bytes=21_000_000, text_encoders="5bit"))
    size = target.stat().st_size
    assert 0.99 * 21_000_000 <= size <= 21_000_000
    formats = {layer["format"] for layer in file_info(target)["layers"] if layer["name"] not in UNET}
    assert formats == {"nf32_b64", "nf256_b64"}


def test_loading_where_only_the_unet_stays_packed(packed):
    with NFQFile(packed) as file:
        names = unet_names(file)
        others = {key for key in file.keys() if key not in names}  # noqa: SIM118
        loaded = load_tensors(file, dense=others)
        assert list(loaded) == file.keys()
        assert missing_companions(file) == []
        for key, value in loaded.items():
            assert isinstance(value, NFTensor) is (key in file.quantized and key in names)
            if key in others and key in file.quantized:
                assert value.dtype == torch.float16 and torch.equal(value, file.load(key).dequantize())


def test_text_encoders_keep_their_dtype_when_they_are_dense(tmp_path):
    save_file(random_tensors(UNET | TEXT, torch.bfloat16), tmp_path / "a.safetensors")
    quantize_file(tmp_path / "a.safetensors", tmp_path / "a.nfq.safetensors")
    with NFQFile(tmp_path / "a.nfq.safetensors") as file:
        loaded = load_tensors(file, TEXT, dense=TEXT)
    assert {value.dtype for value in loaded.values()} == {torch.bfloat16}


def test_a_sharded_language_model(tmp_path):
    tensors = random_tensors(decoder(TINY, marks={"self_attn.q_proj.bias": (128,)}), torch.bfloat16)
    names = list(tensors)
    parts = {"m-00001-of-00002.safetensors": names[::2], "m-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / part)
    index = {key: part for part, keys in parts.items() for key in keys}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    target = tmp_path / "qwen.nfq.safetensors"
    quantize_file(tmp_path, target, Settings.of(preset="small"))
    info = file_info(target)
    (component,) = info["components"]
    assert (component["kind"], component["name"], info["settings"]["text_encoders"]) == (
        "text encoder",
        "Qwen 2",
        "5bit",
    )
    assert {layer["name"]: layer["format"] for layer in info["layers"]}["model.embed_tokens.weight"] == "nf256_b64"
    assert load(target, memory="resident")["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_names_of_files_say_what_is_not_the_default():
    def name(**choice: object) -> str:
        return container_name("a.safetensors", Settings.of(**choice))

    assert name() == name(text_encoders="8bit") == "a-balanced.nfq.safetensors"
    assert name(text_encoders="keep") == "a-balanced-TEkeep.nfq.safetensors"
    assert name(preset="small", text_encoders="8bit") == "a-small-TE8bit.nfq.safetensors"
    assert name(levels=12, text_encoders="5bit") == "a-NF12-TE5bit.nfq.safetensors"


def test_kinds(whole, alone):
    with Original(alone[0]) as file:
        assert kind_of(file).name == "text encoder (CLIP-L)"
    with Original(whole) as file:
        assert kind_of(file).name == "SDXL-like checkpoint"


def test_a_batch_knows_what_is_done(whole, tmp_path):
    (tmp_path / "in").mkdir()
    save_file(load_file(whole), tmp_path / "in" / "a.safetensors")

    def results(settings: Settings) -> list[str]:
        report = convert_folders([tmp_path / "in"], tmp_path / "out", settings)
        return [str(row["result"]) for row in report["files"]]

    small = Settings.of(preset="small")
    assert results(small) == ["converted"]
    assert results(small) == results(Settings.of(preset="small", text_encoders="5bit")) == ["done"]
    assert results(Settings.of(preset="small", text_encoders="8bit")) == ["converted"]
    (tmp_path / "out" / "a-small-TE8bit.nfq.safetensors").rename(tmp_path / "out" / "a-small.nfq.safetensors")
    assert results(small) == ["failed"]


def test_a_file_given_to_the_wrong_loader(whole, packed, alone, tmp_path):
    with NFQFile(alone[1]) as file:
        assert [encoder.name for encoder in text_encoders_of(file)] == ["CLIP-L"]
        with pytest.raises(UnsupportedFileError, match=r"is a text encoder \(CLIP-L\), not a diffusion model"):
            unet_names(file)
    with NFQFile(packed) as file:
        assert [encoder.name for encoder in text_encoders_of(file)] == ["CLIP-L", "OpenCLIP-G"]
    save_file({key: value for key, value in load_file(whole).items() if key in UNET}, tmp_path / "unet.safetensors")
    quantize_file(tmp_path / "unet.safetensors", tmp_path / "unet.nfq.safetensors")
    with NFQFile(tmp_path / "unet.nfq.safetensors") as file:
        assert "text_encoders" not in file.facts.settings
        with pytest.raises(UnsupportedFileError, match=r"is a UNet, not a text encoder; it belongs in models"):
            text_encoders_of(file)
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    quantize_file(tmp_path / "other.safetensors", tmp_path / "other.nfq.safetensors")
    with (
        NFQFile(tmp_path / "other.nfq.safetensors") as file,
        pytest.raises(UnsupportedFileError, match="no text encoder of a known kind"),
    ):
        text_encoders_of(file)


@pytest.mark.parametrize("prefix", ["conditioner.embedders.0.transformer.", "cond_stage_model.transformer."])
def test_a_checkpoint_with_one_text_encoder_of_two_or_a_foreign_one(tmp_path, prefix):
    """It is converted; the file's text encoder is packed and named."""
    save_file(random_tensors(UNET | clip(SMALL_L, prefix)), tmp_path / "a.safetensors")
    quantize_file(tmp_path / "a.safetensors", tmp_path / "a.nfq.safetensors")
    info = file_info(tmp_path / "a.nfq.safetensors")
    assert [each["name"] for each in info["components"]] == ["diffusion model", "CLIP-L"]
    assert info["components"][1]["packed_bits_per_weight"] == pytest.approx(8.1, abs=0.1)
