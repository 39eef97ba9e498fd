"""The example workflows open in both canvases, and run with random weights of Segmind Vega's size."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from graphs import VEGA_ORIGINAL
from page import Page
from PIL import Image
from playwright.sync_api import expect

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import file_info

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "example_workflows").glob("*.json"))

SMALLER = {"width": 64, "height": 64, "steps": 1, "side": 64, "NFCalibrate.side": 256, "NFCalibrate.prompts": 1}
"""Widgets' values with which a run takes seconds."""


def test_there_are_seven() -> None:
    assert len(EXAMPLES) == 7


@pytest.fixture(scope="module")
def files(host, base) -> dict:
    """Stock and packed files of one random model, by widget name."""
    made = {"model": VEGA_ORIGINAL, "companions": {"class_type": "NFQTestCompanions", "inputs": {}}}
    both = {"clip": ["companions", 0], "vae": ["companions", 1]}
    for kind, inputs, prefix in (
        ("CheckpointSave", {"model": ["model", 0], **both}, "checkpoints/example"),
        ("CLIPSave", {"clip": both["clip"]}, "clip/example"),
        ("VAESave", {"vae": both["vae"]}, "vae/example"),
    ):
        made[kind] = {"class_type": kind, "inputs": {**inputs, "filename_prefix": prefix}}
    host.run(made)
    host.free()
    checkpoint = host.output / "checkpoints" / "example_00001_.safetensors"
    quantize_file(checkpoint, base / "models" / "checkpoints" / "example.nfq.safetensors")
    clips = [name for name in host.options("DualCLIPLoader", "clip_name1") if name.startswith("example")]
    return {
        **SMALLER,
        "ckpt_name": checkpoint.name,
        "NFQuantizedCheckpointLoader.ckpt_name": "example.nfq.safetensors",
        "unet_name": "vega.nfq.safetensors",
        "UNETLoader.unet_name": VEGA_ORIGINAL["inputs"]["unet_name"],
        "lora_name": "vega-lora.safetensors",
        "clip_name1": next(name for name in clips if "clip_l" in name),
        "clip_name2": next(name for name in clips if "clip_g" in name),
        "vae_name": next(name for name in host.options("VAELoader", "vae_name") if name.startswith("example")),
    }


def opened(page: Page, example: Path) -> None:
    """Open an example as the host's list of templates serves it."""
    served = page.host.get(f"/api/workflow_templates/ComfyUI-NFQ/{urllib.parse.quote(example.name)}")
    assert served == json.loads(example.read_text("utf-8"))
    page.open(served)
    page.settle()
    assert page.types() == sorted(node["type"] for node in served["nodes"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem.partition(" ")[0])
def test_an_example_opens_without_missing_nodes(page: Page, example: Path) -> None:
    assert example.stem in page.host.get("/workflow_templates")["ComfyUI-NFQ"]
    opened(page, example)
    unknown = page.script(
        "return app.graph._nodes.map((node) => node.type)"
        ".filter((type) => !LiteGraph.registered_node_types[type] && type !== 'MarkdownNote');"
    )
    assert unknown == []
    expect(page.tab.get_by_text("Missing Node", exact=False)).to_have_count(0)
    page.shot(f"example{example.stem[0]}")


def example_number(number: int) -> Path:
    return next(path for path in EXAMPLES if path.stem.startswith(str(number)))


def run_example(page: Page, files: dict, number: int, **also) -> dict:
    """Run an example with the tests' files; returns the outputs by node type."""
    opened(page, example_number(number))
    page.set_all(files | also)
    outputs = page.run()
    types = {str(node["id"]): node["type"] for node in page.workflow()["nodes"]}
    page.shot(f"ran{number}")
    return {types[node]: output for node, output in outputs.items()}


def picture(page: Page, outputs: dict) -> Image.Image:
    saved = outputs["SaveImage"]["images"][0]
    return Image.open(page.host.output / saved["subfolder"] / saved["filename"])


@pytest.fixture(scope="module")
def classic(browser, host) -> Iterator[Page]:
    """A page for runs, which are the same in both canvases."""
    page = Page(browser, host)
    yield page
    page.close()


def test_whole_checkpoint(classic: Page, files: dict) -> None:
    run_example(classic, files, 1)
    name = "example_00001_-balanced.nfq.safetensors"
    assert (classic.host.output / "checkpoints" / name).exists()
    # As its note says: choose the new file and unmute the lower part.
    classic.script("for (const node of app.graph._nodes) node.mode = 0;")
    classic.set("NFQuantizedCheckpointLoader", "ckpt_name", name)
    classic.set("NFSaveCheckpoint", "overwrite", True)
    classic.set("SaveImage", "filename_prefix", "walk")
    classic.run()
    assert list(classic.host.output.glob("walk*.png"))
    classic.host.free()


def test_quantise_and_save(classic: Page, files: dict) -> None:
    outputs = run_example(classic, files, 6, filename_prefix="examples/six")
    assert " dB over all layers" in outputs["NFInspect"]["text"][0]
    assert (classic.host.output / "diffusion_models" / "examples" / "six.nfq.safetensors").exists()
    classic.host.free()


def test_load_and_sample(classic: Page, files: dict) -> None:
    assert picture(classic, run_example(classic, files, 7)).size == (64, 64)
    classic.host.free()


def test_lora(classic: Page, files: dict) -> None:
    with_lora = picture(classic, run_example(classic, files, 2)).tobytes()
    without = picture(classic, run_example(classic, files, 2, strength_model=0.0, strength_clip=0.0)).tobytes()
    assert with_lora != without
    classic.host.free()


def test_five_levels_side_by_side(classic: Page, files: dict) -> None:
    outputs = run_example(classic, files, 4)
    compared = outputs["NFCompare"]["nfq_compare"]
    assert [each["label"] for each in compared] == ["fp16", *(f"{n} levels" for n in (32, 24, 16, 12, 7))]
    assert compared[0]["ssim"] is None
    ratios = [each["psnr_db"] for each in compared[1:]]
    assert ratios == sorted(ratios, reverse=True), ratios
    assert picture(classic, outputs).width > 6 * 64
    classic.host.free()


def test_calibrate_and_quantise(classic: Page, files: dict) -> None:
    outputs = run_example(classic, files, 3, filename_prefix="examples/three")
    name = outputs["NFCalibrate"]["text"][0].removeprefix("saved ")
    saved = classic.host.output / "checkpoints" / "examples" / "three.nfq.safetensors"
    assert file_info(saved)["settings"]["calibration"] == name.rpartition("/")[2]
    assert outputs["NFQuantizeUNet"]["nfq"][0]["expected"]["calibration_db"] > 0
    classic.host.free()
    again = run_example(classic, files, 3, filename_prefix="examples/three", overwrite=True)
    assert again["NFCalibrate"]["text"] == [f"found {name} again"]
    classic.host.free()


def test_text_encoders(classic: Page, files: dict) -> None:
    run_example(classic, files, 5, filename_prefix="examples/five")
    saved = classic.host.output / "text_encoders" / "examples"
    assert sorted(path.name for path in saved.iterdir()) == [f"five_clip_{n}.nfq.safetensors" for n in "gl"]
    assert "examples/five_clip_g.nfq.safetensors" in classic.host.options("NFQuantizedCLIPLoader", "clip_name2")
    classic.host.free()
