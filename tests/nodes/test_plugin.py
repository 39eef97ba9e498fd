"""The plugin as a host loads it: imported under a name made from its path, or refused; its packaging."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from structure import absolute_imports
from stub_host import import_plugin

from nfq_core.version import __version__

ROOT = Path(__file__).resolve().parents[2]

LOAD = """
import importlib.util, sys
path = sys.argv[1]
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
"""


def load_in(host: Path) -> str:
    """Import the plugin as ComfyUI does, with `host` as the host's folder; returns the last line of the error."""
    command = [sys.executable, "-c", LOAD, str(ROOT)]
    result = subprocess.run(command, cwd=host, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("version", ["0.3.64", "0.7.1", None])
def test_older_hosts_are_refused_in_one_line(tmp_path: Path, version: str | None) -> None:
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    message = load_in(tmp_path)
    shown = version or "older"
    assert message == f"ImportError: ComfyUI-NFQ needs ComfyUI 0.8.0 or newer, this is {shown}: update ComfyUI"


@pytest.mark.parametrize("version", ["0.8.0", "0.22.0", "0.33.0", "1.0.0rc1"])
def test_a_missing_package_is_named(tmp_path: Path, version: str) -> None:
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    # Makes the package missing even if it is installed: this folder comes first on the path and blocks the name.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['comfy_kitchen'] = None\n")
    command = [sys.executable, "-c", "import sitecustomize\n" + LOAD, str(ROOT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    message = result.stderr.strip().splitlines()[-1]
    run = f"{sys.executable} -m pip install comfy-kitchen"
    assert message == f"ImportError: ComfyUI-NFQ needs comfy-kitchen, run: {run}"


INPUTS = {
    "NFQuantizedUNetLoader": (["unet_name"], ["recipe", "memory"]),
    "NFQuantizedCheckpointLoader": (["ckpt_name"], ["recipe", "memory"]),
    "NFQuantizeUNet": (
        ["model"],
        ["preset", "effort", "levels", "conv_levels", "device", "quantize_first_last", "calibration"],
    ),
    "NFSaveCheckpoint": (["model"], ["clip", "vae", "filename_prefix", "overwrite", "text_encoders"]),
    "NFQuantizeCLIP": (["clip"], ["bits"]),
    "NFSaveCLIP": (["clip"], ["filename_prefix", "overwrite"]),
    "NFQuantizedCLIPLoader": (["clip_name"], ["type", *(f"clip_name{n}" for n in range(2, 5)), "recipe"]),
    "NFInspect": ([], ["model", "original", "file_name"]),
    "NFCompare": (["image_1", "image_2"], [*(f"image_{n}" for n in range(3, 9)), "vae", "labels", "side"]),
    "NFCalibrate": (["model", "clip"], ["steps", "cfg", "prompts", "side", "sensitivities", "filename_prefix"]),
    "NFCollectCalibration": (["model"], ["hessians", "sensitivities"]),
    "NFSaveCalibration": (["model", "samples"], ["filename_prefix", "overwrite"]),
    "NFQualityReport": (["original_name", "file_name"], [f"file_name_{n}" for n in range(2, 5)]),
}
"""Required and optional inputs of each node, in order: saved workflows depend on them."""

SOCKETS = {"model", "samples", "original", "clip", "vae", *(f"image_{number}" for number in range(1, 9))}


def test_the_plugin_gives_the_nodes_of_the_contract(plugin: ModuleType) -> None:
    extension = asyncio.run(plugin.comfy_entrypoint())
    nodes = {schema.node_id: schema for schema in map(schema_of, asyncio.run(extension.get_node_list()))}
    assert nodes.keys() == INPUTS.keys()
    for name, (needed, optional) in INPUTS.items():
        inputs = nodes[name].inputs
        assert [item.id for item in inputs if not item.optional] == needed
        assert [item.id for item in inputs if item.optional] == optional
        assert nodes[name].category == "NFQ" and nodes[name].description and len(nodes[name].search_aliases) > 2
        for item in inputs:
            assert item.options["tooltip"].strip()
            assert not item.optional or item.id in SOCKETS or "default" in item.options
    assert (ROOT / plugin.WEB_DIRECTORY).is_dir()


def test_the_dial_comes_first_and_the_rest_is_advanced(plugin: ModuleType) -> None:
    extension = asyncio.run(plugin.comfy_entrypoint())
    nodes = {schema.node_id: schema for schema in map(schema_of, asyncio.run(extension.get_node_list()))}
    _, preset, effort, *rest = nodes["NFQuantizeUNet"].inputs
    assert preset.options["options"] == ["large", "balanced", "small", "tiny", "levels"]
    assert (preset.options["default"], effort.options["default"]) == ("balanced", "fast")
    assert not preset.advanced and not effort.advanced and all(item.advanced for item in rest)


def schema_of(node: type) -> SimpleNamespace:
    return node.define_schema()


def test_two_copies_of_the_plugin(plugin: ModuleType, tmp_path: Path) -> None:
    """Each has its own layout, so neither treats the other's packed weights as its own."""
    copy = import_plugin(tmp_path / "ComfyUI-NFQ-copy")
    layouts = [sys.modules[f"{module.__name__}.nodes.packed_tensor"].LAYOUT for module in (plugin, copy)]
    assert layouts[0] != layouts[1]


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda path: path.name)
def test_nodes_import_their_own_relatively(path: Path) -> None:
    """The host has a top-level module called `nodes`, so ours must be imported relatively."""
    allowed = {"torch", "aiohttp", "comfy", "comfy_api", "comfy_kitchen", "folder_paths", "server"}
    assert absolute_imports(path) <= allowed | set(sys.stdlib_module_names)


def project_facts() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_requirements_never_touch_the_hosts_torch() -> None:
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines and not any("torch" in line for line in lines)
    assert set(lines) <= set(project_facts()["project"]["dependencies"])


def test_registry_facts() -> None:
    facts = project_facts()
    assert facts["project"]["version"] == __version__
    assert {"PublisherId", "DisplayName", "Icon"} <= facts["tool"]["comfy"].keys()
    assert "web" not in facts["tool"]["comfy"], "WEB_DIRECTORY names it already"
    assert (ROOT / "web").is_dir()
