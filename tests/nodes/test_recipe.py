"""A MODEL's origin as read from a graph, and the explanation of a file that a workflow lacks."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

UNETS = "diffusion_models"


@pytest.fixture
def recipe(plugin: ModuleType) -> ModuleType:
    return sys.modules[f"{plugin.__name__}.nodes.recipe"]


def loader(name: str) -> dict:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": name}}


def lora(model: str, strength: object = 0.8) -> dict:
    inputs = {"lora_name": "styles\\ink.safetensors", "strength_model": strength, "model": [model, 0]}
    return {"class_type": "LoraLoaderModelOnly", "inputs": inputs}


def merge(first: str, second: str) -> dict:
    return {"class_type": "ModelMergeSimple", "inputs": {"model2": [second, 0], "model1": [first, 0], "ratio": 0.5}}


def quantise(model: str) -> dict:
    return {"class_type": "NFQuantizeUNet", "inputs": {"model": [model, 0], "preset": "levels", "levels": 16}}


def test_origin_of_a_loaded_model(recipe: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "models" / UNETS / "deep" / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    origin = recipe.origin_in_graph({"a": loader("deep/a.safetensors"), "q": quantise("a")}, "q")
    assert origin == recipe.Origin("a.safetensors", str(file), ())
    source = origin.hashing()()
    assert (source.name, source.bytes) == ("a.safetensors", 7)
    assert source.sha256 == hashlib.sha256(b"weights").hexdigest()


def test_origin_of_loras_and_merges(recipe: ModuleType) -> None:
    graph = {"a": loader("a.safetensors"), "b": loader("b.safetensors"), "l": lora("b"), "m": merge("a", "l")}
    graph |= {"late": lora("m", ["number", 0]), "q": quantise("late")}
    origin = recipe.origin_in_graph(graph, "q")
    assert origin.name == "a.safetensors"
    assert origin.baked == ("LoRA ink.safetensors", "LoRA ink.safetensors at 0.8", "model b.safetensors")
    assert origin.hashing()().sha256 == ""


@pytest.mark.parametrize("prompt", [None, {}, {"q": quantise("q")}, {"q": quantise("gone")}], ids=str)
def test_unknown_origin(recipe: ModuleType, prompt: dict | None) -> None:
    assert recipe.origin_in_graph(prompt, "q") == recipe.Origin()
    assert recipe.origin_in_graph(prompt, None).hashing()().name == ""


def recipe_json(**changes: object) -> str:
    settings = {"levels": 12, "conv_levels": 32, "effort": "fast", "quantize_first_last": False}
    return json.dumps({"settings": settings, "source": "a.safetensors", "source_sha256": "ab" * 32} | changes)


def test_a_missing_file_is_explained(recipe: ModuleType) -> None:
    text = recipe.missing_file(UNETS, "deep/x.nfq.safetensors", recipe_json())
    assert text == (
        "'deep/x.nfq.safetensors' is not in models/diffusion_models. It was made from 'a.safetensors' (SHA-256 "
        + "ab" * 32
        + ") with preset=levels effort=fast levels=12 conv_levels=32 quantize_first_last=False: load that with the "
        "stock loader, connect NFQ Quantize Model with these settings, then Save NFQ Checkpoint with filename_prefix "
        "'deep/x'; or run `nfq quantize` on it with --levels 12 --conv-levels 32 --effort fast"
    )
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings={"baked": ["LoRA b at 1"]}, source=""))
    assert "made from an unrecorded model plus LoRA b at 1: load that" in text
    assert "nfq quantize" not in text
    text = recipe.missing_file("checkpoints", "x.nfq.safetensors", recipe_json())
    assert "with filename_prefix 'x' and its CLIP and VAE" in text
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings={"imported": "article"}))
    assert "imported from 'a.safetensors'" in text and text.endswith("run `nfq import-article` on that file again")


def test_the_size_of_a_preset_is_explained_as_the_preset(recipe: ModuleType) -> None:
    settings = {"effort": "best", "target_bpw": 3.4, "calibration": "c", "calibration_sha256": "ab"}
    for preset, option in (({}, "--target-bpw 3.4"), ({"preset": "small"}, "--preset small")):
        text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings=preset | settings))
        assert " with preset=small effort=best calibration=c: load that" in text
        assert sorted(text.partition("; or run `nfq quantize` on it with --")[2].split(" --")) == sorted(
            ["effort best", option.removeprefix("--"), "calibration c"]
        )


def test_a_preset_that_had_other_bits_is_explained_as_a_command(recipe: ModuleType) -> None:
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings={"preset": "small", "target_bpw": 3.3}))
    assert text.endswith(": run `nfq quantize` on it with --target-bpw 3.3") and "NFQ Quantize Model" not in text


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"format": "t4w8_b64", "conv_format": "t5w9_b64"}, "--format t4w8_b64 --conv-format t5w9_b64"),
        ({"target_bytes": 1200000000}, "--target-size 1200000000B"),
        ({"target_bpw": 3.3, "quantize_first_last": True}, "--target-bpw 3.3 --quantize-first-last"),
    ],
)
def test_settings_that_the_node_does_not_offer_are_explained_as_a_command(
    recipe: ModuleType, settings: dict, options: str
) -> None:
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings=settings))
    assert text.endswith(f": run `nfq quantize` on it with {options}") and "NFQ Quantize Model" not in text
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings=settings | {"baked": ["LoRA b at 1"]}))
    assert " plus LoRA b at 1: save that with Save Checkpoint, and run `nfq quantize` on it" in text


def test_a_workflow_cannot_inject_a_command(recipe: ModuleType) -> None:
    settings = {"target_bpw": 3.3, "calibration": "my file; ls", "effort": "$(ls)", "x; ls": "y"}
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings=settings))
    assert text.endswith("on it with --target-bpw 3.3 --calibration 'my file; ls' --effort '$(ls)'")


def test_a_recipe_is_printed_without_control_characters(recipe: ModuleType) -> None:
    settings = {"x": "\x1b[2J\n\u202eabc", "baked": ["\x1b]0;hi\x07"]}
    text = recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(settings=settings, source_sha256="\x1b[31m"))
    assert text.isprintable() and "\\x1b]0;hi" in text
    assert len(recipe.missing_file(UNETS, "x.nfq.safetensors", recipe_json(source="a" * 10_000))) < 3000


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"settings": 3}', '{"settings": {}}'])
def test_an_invalid_recipe_is_ignored(recipe: ModuleType, text: str) -> None:
    wanted = "'x.nfq.safetensors' is not in models/diffusion_models; put it there, or choose another file"
    assert recipe.missing_file(UNETS, "x.nfq.safetensors", text) == wanted


def test_existing_files_and_foreign_names(recipe: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "models" / UNETS / "deep"
    folder.mkdir()
    (folder / "x.nfq.safetensors").touch()
    for name in (None, "deep/x.nfq.safetensors", "deep\\x.nfq.safetensors"):
        assert recipe.missing_file(UNETS, name, "") == ""
    for name in ("x.safetensors", 5, ["x"]):
        assert "load others with a stock loader" in recipe.missing_file(UNETS, name, recipe_json())


def test_dropped_extras_are_dropped_again(recipe: ModuleType) -> None:
    settings = {"levels": 12, "drop_extras": True}
    assert recipe.command_options(settings) == "--levels 12 --drop-extras"
    whole = {"preset": "small", "target_bpw": 3.4, "effort": "fast", "text_encoders": "8bit"}
    assert recipe.command_options(whole) == "--preset small --effort fast --text-encoders 8bit"
    assert recipe.node_inputs(settings) == {"preset": "levels", "levels": 12}
