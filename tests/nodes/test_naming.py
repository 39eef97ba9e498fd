"""The name that a new file gets if the user gives none, from the graph and from the finished MODEL alike."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from nfq_core import Settings

LOADER = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "deep/sd xl.safetensors"}}


@pytest.fixture
def naming(plugin: ModuleType) -> ModuleType:
    return sys.modules[f"{plugin.__name__}.nodes.naming"]


def graph(**inputs: object) -> dict:
    """Load, quantise with these inputs, save as node "s"."""
    return {
        "l": LOADER,
        "q": {"class_type": "NFQuantizeUNet", "inputs": {"model": ["l", 0], **inputs}},
        "s": {"class_type": "NFSaveCheckpoint", "inputs": {"model": ["q", 0]}},
    }


@pytest.mark.parametrize(
    ("inputs", "settings", "name"),
    [
        ({}, Settings(), "sd xl-balanced"),
        ({"preset": "tiny", "levels": 7}, Settings.of(preset="tiny"), "sd xl-tiny"),
        ({"preset": "levels", "levels": 12}, Settings.of(levels=12), "sd xl-NF12"),
        ({"preset": "levels", "conv_levels": 16}, Settings.of(conv_levels=16), "sd xl-NF16-NF16"),
    ],
    ids=["defaults", "preset", "levels", "convolutions"],
)
def test_the_graph_tells_what_the_model_records(naming: ModuleType, inputs: dict, settings: Settings, name: str):
    assert naming.planned_name(graph(**inputs), "s") == name
    assert naming.default_name("sd xl.safetensors", settings.as_dict()) == name


def test_a_calibration_is_told(naming: ModuleType):
    recorded = Settings().as_dict() | {"calibration": "mine.calibration.safetensors"}
    assert naming.default_name("a.safetensors", recorded) == "a-balanced-calibrated"
    assert naming.planned_name(graph(calibration=["c", 0]), "s") == "sd xl-balanced-calibrated"
    assert naming.planned_name(graph(calibration="(none)"), "s") == "sd xl-balanced"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("", "ComfyUI-NFQ"),
        ("b.ckpt", "b"),
        ("sdxl-v1.0", "sdxl-v1.0"),
        ("..\\up/C.SafeTensors", "C"),
        ("c-small.nfq.safetensors", "c-small"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16"),
    ],
)
def test_names_of_sources(naming: ModuleType, source: str, name: str):
    assert naming.default_name(source, Settings().as_dict()) == f"{name}-balanced"


@pytest.mark.parametrize(
    ("settings", "tag"),
    [
        ({"target_bytes": 10**9}, "1GB"),
        ({"target_bpw": 3.5}, "3.5bpw"),
        ({"format": "t4w8_b64", "conv_levels": 32}, "T4W8"),
        ({}, "nfq"),
        ({"imported": True}, "nfq"),
        ({"levels": "many"}, "nfq"),
        ({"levels": [16]}, "nfq"),
        ({"preset": "small", "target_bpw": 3.4, "levels": 7}, "nfq"),
    ],
    ids=str,
)
def test_settings_that_the_node_does_not_offer(naming: ModuleType, settings: dict, tag: str):
    assert naming.default_name("a.nfq.safetensors", settings) == f"a-{tag}"


def test_paths_that_join_are_not_followed(naming: ModuleType):
    joined = graph() | {"s": {"inputs": {"model": ["j", 0]}}, "j": {"inputs": {"model1": ["q", 0], "model2": ["l", 0]}}}
    assert naming.planned_name(joined, "s") is None


@pytest.mark.parametrize(
    "prompt",
    [None, {}, {"s": {"inputs": {"model": ["l", 0]}}, "l": LOADER}, graph(preset=["x", 0]), graph(preset="gone")],
    ids=["none", "empty", "nothing quantises", "linked", "unknown"],
)
def test_what_the_graph_does_not_tell(naming: ModuleType, prompt: dict | None):
    assert naming.planned_name(prompt, "s") is None
