"""The example workflows fit the nodes that the plugin has now; hosts open and run them in `tests/host/browser`."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from test_page import schemas

pytest.importorskip("PIL", reason="thumbnails need Pillow")
from PIL import Image

TEMPLATES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem.partition(" ")[0])
def template(request: pytest.FixtureRequest) -> Path:
    return request.param


def nodes_of(template: Path) -> list[dict]:
    return json.loads(template.read_text("utf-8"))["nodes"]


def test_a_note_explains_it(template: Path) -> None:
    (note,) = (node for node in nodes_of(template) if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert text.startswith("## ") and len(text) > 100


def test_it_has_a_thumbnail(template: Path) -> None:
    with Image.open(template.with_suffix(".jpg")) as picture:
        assert (picture.format, picture.size) == ("JPEG", (640, 400))


def test_its_nodes_have_the_inputs_of_their_schemas(template: Path, plugin: ModuleType) -> None:
    known = schemas(plugin)
    ours = [node for node in nodes_of(template) if node["type"].startswith("NF")]
    assert ours
    for node in ours:
        inputs = {item.id: item for item in known[node["type"]].inputs}
        assert {item["name"] for item in node["inputs"]} <= inputs.keys()
        # Saved values belong to widgets by their order.
        widgets = [item["name"] for item in node["inputs"] if "widget" in item]
        assert widgets == [name for name in inputs if name in widgets]
        for name, value in zip(widgets, node["widgets_values"], strict=True):
            options = inputs[name].options.get("options")
            assert options is None or value in options or str(value).endswith(".safetensors"), name
