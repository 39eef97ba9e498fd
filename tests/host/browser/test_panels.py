"""The panels that the page adds to our nodes, in a real host and in both of its canvases."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from driver import HostError
from page import HOSTILE, SHOW_MS, Page
from PIL import Image
from playwright.sync_api import expect

LOADER = {"type": "NFQuantizedUNetLoader", "at": [40, 80]}
ORIGINAL = {"type": "UNETLoader", "at": [40, 80], "values": {"unet_name": "vega.safetensors"}}
INSPECT = {"type": "NFInspect", "at": [800, 80], "links": {"model": ["quantize", 0]}}
COMPARE = {"type": "NFCompare", "at": [420, 40], "links": {"image_1": ["image", 0], "image_2": ["image", 0]}}
QUANTIZE = {"type": "NFQuantizeUNet", "at": [420, 80], "links": {"model": ["load", 0]}}

FURTHER = """(first) => {
  const width = parseFloat(document.querySelector(".nfq-progress .nfq-track > div")?.style.width);
  return first < width && width < 100;
}"""
"""Whether the progress bar has grown but is not full."""

GREYED = """
const node = app.graph._nodes.find((each) => each.type === "NFQuantizeUNet");
return node.widgets.filter((each) => each.disabled).map((each) => each.name);
"""
"""Names of the settings that the script disabled. Nodes 2.0 of ComfyUI 0.8.0 does not show this."""


def file_node(name: str) -> dict:
    return {**LOADER, "values": {"unet_name": name}}


def test_a_chosen_file_is_described(page: Page, hostile: str) -> None:
    page.build(load=file_node("vega.nfq.safetensors"))
    bits = ["16 levels", "bits per weight", "of 1.49 GB in fp16"]
    page.shows("facts", *bits, "a good balance", "vega.safetensors", "effort=fast")
    page.shot("facts")
    page.set("NFQuantizedUNetLoader", "unet_name", hostile)
    page.shows("facts", "16 levels", HOSTILE)
    page.set("NFQuantizedUNetLoader", "unet_name", "vega.nfq.safetensors")
    page.shows("facts", "of 1.49 GB in fp16")
    recipe = json.loads(page.workflow()["nodes"][0]["widgets_values"][1])
    assert recipe["source"] == "vega.safetensors"
    assert len(page.workflow()["nodes"][0]["widgets_values"]) == 3


def test_a_hostile_header_is_text(page: Page, hostile: str) -> None:
    page.build(load=file_node(hostile), look={"type": "NFInspect", "at": [420, 80], "values": {}})
    page.set("NFInspect", "file_name", f"diffusion_models/{hostile}")
    page.run()
    page.shows("facts", HOSTILE)
    page.shows("chart", "bits per weight")
    chart = page.panel("chart").locator("canvas")
    width = chart.bounding_box()["width"]
    chart.hover(position={"x": width * 0.3, "y": 80})
    page.shows("chart", HOSTILE)
    text = download(page, "CSV").read_text()
    assert [line[:6] for line in text.splitlines()[1:]] == ['"<img ', "'=1+1."]
    page.open(
        workflow_with("gone.nfq.safetensors", {"settings": {HOSTILE: 1}, "source": HOSTILE, "source_sha256": HOSTILE})
    )
    page.shows("facts", "is missing", HOSTILE)
    assert page.tab.locator(".nfq-content img").count() == 0
    assert page.script("return window.hacked") is None


def download(page: Page, button: str) -> Path:
    """The file that a button of the first chart saves."""
    with page.tab.expect_download() as got:
        page.panel("chart").first.get_by_role("button", name=button).click()
    return got.value.path()


def workflow_with(name: str, recipe: dict) -> dict:
    """A shared workflow with one loader."""
    node = {
        "id": 1,
        "type": "NFQuantizedUNetLoader",
        "pos": [40, 80],
        "size": [340, 120],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": None}],
        "properties": {},
        "widgets_values": [name, json.dumps(recipe)],
    }
    return {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "groups": [], "version": 0.4}


RECIPE = {
    "architecture": "SDXL",
    "settings": {"levels": 12, "conv_levels": 32, "baked": ["LoRA style.safetensors at 0.8"]},
    "source": "theirs.safetensors",
    "source_sha256": "ab" * 32,
    "header_sha256": "cd" * 32,
    "file_bytes": 1,
}


def test_a_missing_file_is_explained(page: Page) -> None:
    page.open(workflow_with("sub/gone.nfq.safetensors", RECIPE))
    source = ["theirs.safetensors + LoRA style.safetensors at 0.8", "ab" * 32, "levels=12 conv_levels=32"]
    page.shows("facts", "sub/gone.nfq.safetensors is missing", *source, "filename_prefix sub/gone")
    page.shot("missing")
    assert json.loads(page.workflow()["nodes"][0]["widgets_values"][1]) == RECIPE


def test_another_file_never_gets_the_previous_recipe(page: Page, base: Path) -> None:
    cut = base / "models" / "diffusion_models" / "cut.nfq.safetensors"
    cut.write_bytes((cut.parent / "vega.nfq.safetensors").read_bytes()[:1000])
    try:
        page.open(workflow_with("gone.nfq.safetensors", RECIPE))
        page.shows("facts", "is missing", "levels=12")
        page.set("NFQuantizedUNetLoader", "unet_name", cut.name)
        page.shows("facts", f"{cut.name} is cut short")
        assert str(base) not in page.panel("facts").inner_text()
        assert page.workflow()["nodes"][0]["widgets_values"] == [cut.name, "", "packed"]
    finally:
        cut.unlink()
    page.script("await app.refreshComboInNodes();")
    page.shows("facts", f"{cut.name} is missing", "Put the file into its models folder")


def test_a_missing_checkpoint_or_import_is_explained(page: Page) -> None:
    workflow = workflow_with("gone.nfq.safetensors", RECIPE)
    workflow["nodes"][0]["type"] = "NFQuantizedCheckpointLoader"
    page.open(workflow)
    page.shows("facts", "filename_prefix gone, CLIP and VAE")
    page.open(workflow_with("gone.nfq.safetensors", {**RECIPE, "settings": {"imported": "article"}}))
    page.shows("facts", "In a terminal on ComfyUI's computer", "import-article FILE")


def test_another_file_of_the_same_name_gives_a_warning(page: Page) -> None:
    page.open(workflow_with("vega.nfq.safetensors", RECIPE))
    toast = page.tab.locator(".p-toast-detail", has_text="is not the file this workflow was saved with")
    expect(toast).to_contain_text("theirs.safetensors", timeout=SHOW_MS)
    page.shows("facts", "vega.safetensors with levels=16")
    page.tab.locator(".p-toast-close-button").first.click()


def test_live_progress_interrupt_and_chart(page: Page) -> None:
    page.build(load=ORIGINAL, quantize=QUANTIZE, look=INSPECT)
    page.shows("progress", "balanced", "4.1 bits per weight")
    page.shows("progress", "for vega.safetensors on ComfyUI's computer", "baked in")
    page.set("NFQuantizeUNet", "preset", "tiny")
    page.shows("progress", "tiny", "2.8 bits per weight")
    assert page.script(GREYED) == ["levels", "conv_levels"]
    page.shot("settings")
    page.set("NFQuantizeUNet", "preset", "levels")
    page.shows("progress", "16 levels", "a good balance")
    page.set("NFQuantizeUNet", "levels", 12)
    page.shows("progress", "12 levels")
    assert page.script(GREYED) == []

    # Slow enough to be interrupted on any machine.
    page.set("NFQuantizeUNet", "effort", "best")
    prompt = page.queue()
    bar = page.panel("progress").locator(".nfq-track > div")
    expect(bar).to_be_attached(timeout=SHOW_MS)
    page.shows("progress", ".weight", "_b64", " dB", " left")
    first = float(bar.evaluate("bar => parseFloat(bar.style.width)"))
    assert 0 < first < 100
    page.tab.wait_for_function(FURTHER, arg=first, timeout=SHOW_MS)
    page.shot("progress")
    page.tab.get_by_role("button", name=re.compile("interrupt|cancel|stop", re.I)).first.click()
    page.shows("progress", "Interrupted")
    with pytest.raises(HostError, match="interrupted in NFQuantizeUNet"):
        page.host.wait(prompt)

    page.set("NFQuantizeUNet", "effort", "fast")
    page.run()
    page.shows("progress", "12 levels")
    chart = page.panel("chart").first
    expect(chart).to_contain_text("bits per weight in memory", timeout=SHOW_MS)
    assert re.search(r"SQNR \d\d\.\d\d dB over all layers", chart.inner_text())
    assert re.search(r"[\d.]+ MB, \d\d % of 1\.\d\d GB in fp16", chart.inner_text())
    plot = chart.locator("canvas")
    width = plot.bounding_box()["width"]
    chart.locator("select").select_option("error")
    plot.hover(position={"x": width * 0.5, "y": 100})
    expect(chart.locator(".nfq-hover")).to_contain_text("_b64", timeout=SHOW_MS)
    page.shot("chart")
    rows = list(csv.DictReader(io.StringIO(download(page, "CSV").read_text())))
    errors = [float(row["sqnr_db"]) for row in rows]
    assert len(rows) > 200 and errors == sorted(errors)
    assert sum(int(row["weights"]) for row in rows) > 700e6
    with Image.open(download(page, "PNG")) as picture:
        assert picture.size == (1400, 700)
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_runs_output_is_shown_again(page: Page) -> None:
    """Open another workflow and go back."""
    page.build(image={"type": "NFQTestImage", "at": [40, 40]}, compare=COMPARE)
    page.run()
    page.shows("compare", "equal · SSIM 1.0000")
    page.open(workflow_with("vega.nfq.safetensors", {}))
    page.shows("facts", "16 levels")
    page.tab.locator(".workflow-tabs-container .p-togglebutton").nth(-2).click()
    page.shows("compare", "equal · SSIM 1.0000")


def test_a_saved_file_dropped_on_the_canvas_opens_its_workflow(page: Page) -> None:
    prefix = f"dropped/{page.name}"
    keep = {"type": "NFSaveCheckpoint", "at": [800, 80], "values": {"filename_prefix": prefix, "overwrite": True}}
    page.build(load=ORIGINAL, quantize=QUANTIZE, keep={**keep, "links": {"model": ["quantize", 0]}})
    page.run()
    page.shows("saved", "saved ", f"{page.name}.nfq.safetensors")
    types = page.types()
    page.new_workflow()
    page.drop(page.host.output / "diffusion_models" / f"{prefix}.nfq.safetensors")
    page.tab.wait_for_function(
        "() => (window.app ?? window.comfyAPI.app.app).graph._nodes.length === 3", timeout=SHOW_MS
    )
    assert page.types() == types
    page.shot("dropped")
    # The list contains the file without a manual refresh.
    page.build(load=LOADER)
    options = page.script("return app.graph._nodes[0].widgets[0].options.values;")
    assert f"{prefix}.nfq.safetensors" in options
    page.set("NFQuantizedUNetLoader", "unet_name", f"{prefix}.nfq.safetensors")
    page.shows("facts", "a format chosen for each layer", "vega.safetensors", "preset=balanced")


def test_pictures_are_compared_side_by_side(page: Page) -> None:
    images = {f"image{n}": {"type": "NFQTestImage", "at": [40, 40 + 110 * n], "values": {"number": n}} for n in (1, 2)}
    labels = f"fp16\n{HOSTILE}\n"
    page.build(
        **images,
        compare={
            "type": "NFCompare",
            "at": [420, 40],
            "values": {"labels": labels},
            "links": {"image_1": ["image1", 0], "image_2": ["image2", 0], "image_3": ["image1", 0]},
        },
    )
    page.run()
    page.shows("compare", "fp16", "the reference", HOSTILE, " dB · SSIM 0.", "image_3", "equal · SSIM 1.0000")
    pictures = page.panel("compare").locator("img")
    assert pictures.evaluate_all("all => all.map((each) => each.naturalWidth)") == [64, 64, 64]
    own = pictures.nth(1).get_attribute("src")
    pictures.nth(1).hover()
    page.tab.mouse.down()
    expect(pictures.nth(1)).to_have_attribute("src", pictures.nth(0).get_attribute("src"))
    page.tab.mouse.up()
    expect(pictures.nth(1)).to_have_attribute("src", own)
    page.shot("compare")


@pytest.mark.parametrize(
    ("locale", "title", "words"), [("ja", "NFQ 拡散モデル", "レベル"), ("zh", "NFQ 扩散模型", "级")]
)
def test_other_languages(browser, host, locale: str, title: str, words: str) -> None:
    page = Page(browser, host, nodes2=True, locale=locale)
    try:
        page.build(load=file_node("vega.nfq.safetensors"))
        page.shows("facts", words)
        assert title in page.script("return app.graph._nodes[0].title;")
        page.shot(locale)
    finally:
        page.close()
        host.post("/settings", {"Comfy.Locale": "en"})
