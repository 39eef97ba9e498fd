"""Pictures of ComfyUI's page for the docs, and thumbnails: `python -m benchmarks.hosts.pictures --dir DIR`.

COMFYUI_PATH names the host and COMFYUI_PYTHON its Python. Needs Chromium and the extras `browser` and `demo`. The host
quantises a synthetic checkpoint of SDXL's shapes (6.94 GB), so panels show SDXL's sizes. Compared pictures are those of
the demo model.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image, ImageOps

from nfq_core import quantize_state_dict
from nfq_core.checkpoints.whole_checkpoint import dequantize_state_dict
from nfq_core.demo.model import build_pipeline, load_weights, sample
from nfq_core.demo.run import SEED
from nfq_core.demo.shapes import CAPTIONS
from nfq_core.files.container import SUFFIX
from nfq_core.packed.formats import LEVELS

from ..checkpoint_shapes import sdxl_checkpoint
from ..shared import IMAGES, ROOT, argument_parser, write_synthetic

TEMPLATES = ROOT / "example_workflows"

NAME = "my-checkpoint"
"""Name of the synthetic checkpoint, without its ending."""

WRITTEN = f"{NAME}-balanced{SUFFIX}"
"""The file that the first template makes of it."""

COMPARED = 3
"""Number of the caption whose pictures are compared."""

UPPER_PART = ("CheckpointLoaderSimple", "NFQuantizeUNet", "NFSaveCheckpoint")
"""The nodes of the first template that quantise a checkpoint."""

MARGIN = 24
"""Pixels around the nodes in a picture."""

WINDOW = {"width": 1780, "height": 1510}

THUMBNAIL = (640, 400)

GAMMA = 0.6
"""Brightens the thumbnails of the dark canvas; 1 would leave them as they are."""

NAMED = (
    *("loras/your-lora.safetensors", "vae/sdxl_vae.safetensors", f"diffusion_models/{NAME}.safetensors"),
    *(f"text_encoders/clip_{name}.safetensors" for name in "lg"),
)
"""Files that the templates name beside the checkpoint."""

SHOW = """
const boxes = app.graph._nodes.filter((node) => !argument.types || argument.types.includes(node.type))
  .map((node) => [...node.pos, ...node.size]);
const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1])) - 30;
const width = Math.max(...boxes.map((box) => box[0] + box[2])) - left;
const height = Math.max(...boxes.map((box) => box[1] + box[3])) - top;
const scale = Math.min(1, argument.width / width, argument.height / height);
app.canvas.ds.scale = scale;
app.canvas.ds.offset = [argument.left / scale - left, argument.top / scale - top];
app.canvas.deselectAll?.();
app.canvas.setDirty(true, true);
return [width * scale, height * scale];
"""
"""Moves nodes of some types into view, at most full size; returns the width and height that they take."""

A_QUARTER = """() => {
  const bar = document.querySelector(".nfq-progress .nfq-track > div");
  return bar && parseFloat(bar.style.width) > 25;
}"""
"""Whether a quarter of the work is done."""

RESIZE = """
for (const { id, size } of argument) {
  const node = app.graph.getNodeById(id);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, size[0]), Math.max(height, size[1])]);
}
"""


class Camera:
    """Takes pictures of a page's graph."""

    LEFT, TOP, RIGHT, BOTTOM = 90, 180, 40, 40
    """Pixels at the window's edges that the page's own controls cover."""

    def __init__(self, page) -> None:
        self.page = page

    def picture(self, types: Sequence[str] | None = None) -> Image.Image:
        """A picture of the nodes of some types, by default of all."""
        window = self.page.tab.viewport_size
        room = {"width": window["width"] - self.LEFT - self.RIGHT, "height": window["height"] - self.TOP - self.BOTTOM}
        width, height = self.page.script(SHOW, {"types": types, "left": self.LEFT, "top": self.TOP, **room})
        self.page.settle()
        self.page.tab.wait_for_timeout(1500)
        clip = {
            "x": self.LEFT - MARGIN,
            "y": self.TOP - MARGIN,
            "width": width + 2 * MARGIN,
            "height": height + 2 * MARGIN,
        }
        return Image.open(io.BytesIO(self.page.tab.screenshot(clip=clip))).convert("RGB")


def open_template(page, path: Path, values: dict) -> None:
    """Open a template for the checkpoint with other values of its widgets, all nodes active."""
    page.new_workflow()
    # The page marks nodes whose file was missing when they were opened.
    page.open(json.loads(path.read_text("utf-8").replace("sd_xl_base_1.0", NAME)))
    page.settle()
    page.set_all(values)
    page.script("for (const node of app.graph._nodes) node.mode = 0;")


def demo_pictures() -> Iterator[tuple[str, Image.Image]]:
    """One caption drawn by the demo model in fp16 and at each number of levels, with labels."""
    original = load_weights()
    for levels in (None, *LEVELS):
        weights = original if levels is None else quantize_state_dict(original, levels=levels)
        pixels = sample(
            build_pipeline(dequantize_state_dict(dict(weights))),
            CAPTIONS[COMPARED : COMPARED + 1],
            seed=SEED + COMPARED,
        )
        yield "fp16" if levels is None else f"{levels} levels", Image.fromarray(pixels[0])


def compare(page, inputs: Path) -> None:
    """NFQ Compare with pictures of the demo model."""
    nodes, links, labels = {}, {}, []
    for number, (label, picture) in enumerate(demo_pictures(), 1):
        picture.resize((256, 256), Image.Resampling.NEAREST).save(inputs / f"demo-{number}.png")
        nodes[f"image{number}"] = {
            "type": "LoadImage",
            "at": [-400, 320 * number],
            "values": {"image": f"demo-{number}.png"},
        }
        links[f"image_{number}"] = [f"image{number}", 0]
        labels.append(label)
    values = {"labels": "\n".join(labels)}
    page.script("await app.refreshComboInNodes();")
    page.build(**nodes, compare={"type": "NFCompare", "at": [0, 0], "values": values, "links": links})
    page.run()
    page.shows("compare", labels[-1], " dB · SSIM 0.")
    page.script("app.graph._nodes.find((node) => node.type === 'NFCompare').setSize([460, 700]);")
    page.tab.wait_for_timeout(1000)


def loaders(page, missing: dict) -> None:
    """Two loaders: a file's facts, and how to make a missing file."""
    values = {"ckpt_name": WRITTEN}
    page.build(have={"type": "NFQuantizedCheckpointLoader", "at": [0, 0], "values": values})
    workflow = page.workflow()
    (have,) = workflow["nodes"]
    lacks = {**have, "id": 2, "pos": [have["size"][0] + 60, 0]}
    lacks["widgets_values"] = [f"photo-style{SUFFIX}", json.dumps(missing), "packed"]
    page.new_workflow()
    page.open({**workflow, "nodes": [have, lacks], "last_node_id": 2})
    for words in ("bits per weight", "is missing"):
        page.panel("facts").filter(has_text=words).wait_for()


def whole_checkpoint(page, camera: Camera) -> Image.Image:
    """The first template at work, as a picture for the docs, and when its file is written and chosen, returned."""
    path = TEMPLATES / "1 Whole checkpoint.json"
    (page.host.output / "checkpoints" / WRITTEN).unlink(missing_ok=True)
    open_template(page, path, {})
    page.script("for (const node of app.graph._nodes) if (node.pos[1] > 700) node.mode = 2;")
    page.shows("progress", "balanced", "on ComfyUI's computer")
    page.script("for (const node of app.graph._nodes) node.setSize(node.computeSize());")
    run = page.queue()
    page.tab.wait_for_function(A_QUARTER)
    camera.picture(UPPER_PART).save(IMAGES / "progress.png", optimize=True)
    page.host.wait(run)
    page.shows("chart", "bits per weight")
    page.shows("saved", "saved ")
    page.script("await app.refreshComboInNodes();")
    page.set_all({"NFQuantizedCheckpointLoader.ckpt_name": WRITTEN})
    page.shows("facts", "bits per weight")
    page.script("for (const node of app.graph._nodes) node.mode = 0;")
    page.script(RESIZE, json.loads(path.read_text("utf-8"))["nodes"])
    return camera.picture()


def thumbnail(picture: Image.Image) -> Image.Image:
    """A picture made smaller and brighter, with the canvas's colour around it."""
    picture = picture.point([round(255 * (value / 255) ** GAMMA) for value in range(256)] * 3)
    whole = Image.new("RGB", THUMBNAIL, picture.getpixel((2, picture.height - 3)))
    small = ImageOps.contain(picture, THUMBNAIL, Image.Resampling.LANCZOS)
    whole.paste(small, ((whole.width - small.width) // 2, (whole.height - small.height) // 2))
    return whole


def make_files(base: Path) -> None:
    """The synthetic checkpoint, and empty files of the names in the templates, which the page would mark as missing."""
    source = base / "models" / "checkpoints" / f"{NAME}.safetensors"
    if not source.exists():
        write_synthetic(source, sdxl_checkpoint())
    for name in NAMED:
        file = base / "models" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    written = base / "output" / "checkpoints" / WRITTEN
    listed = base / "models" / "diffusion_models" / written.name
    if not listed.is_symlink():
        listed.symlink_to(written)


def take(directory: Path) -> None:
    """All pictures, into the docs and next to the templates."""
    sys.path.append(str(ROOT / "tests" / "host" / "browser"))
    from driver import Host, make_base
    from page import CHROMIUM, FLAGS, Page
    from playwright.sync_api import sync_playwright

    base = directory / "comfyui"
    if not base.exists():
        make_base(base)
    make_files(base)
    with (
        closing(Host(base, "--fp16-unet", "--fp16-text-enc")) as host,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser,
    ):
        host.post("/settings", {"Comfy.Minimap.Visible": False})
        page = Page(browser, host)
        page.tab.set_viewport_size(WINDOW)
        camera = Camera(page)
        workflow = whole_checkpoint(page, camera)
        workflow.save(IMAGES / "workflow.png", optimize=True)
        recipe = host.get(f"/nfq/file?folder=checkpoints&name={WRITTEN}")["recipe"]
        recipe["source"] = "photo-style.safetensors"
        recipe["settings"]["baked"] = ["LoRA film.safetensors at 0.8"]
        loaders(page, recipe)
        camera.picture().save(IMAGES / "loader.png", optimize=True)
        compare(page, base / "input")
        camera.picture(["NFCompare"]).save(IMAGES / "compare.png", optimize=True)
        for path in sorted(TEMPLATES.glob("*.json")):
            open_template(page, path, {})
            picture = workflow if path.stem.startswith("1") else camera.picture()
            thumbnail(picture).save(path.with_suffix(".jpg"), quality=80)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the host's files, 10 GB")
    take(parser.parse_args().dir.resolve())
