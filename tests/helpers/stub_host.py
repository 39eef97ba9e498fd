"""A stub of ComfyUI with which the plugin can be imported. It computes nothing; `tests/host` runs the real host."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from systems import link

ROOT = Path(__file__).resolve().parents[2]


def import_plugin(folder: Path) -> ModuleType:
    """Import the plugin as the host does: from a folder of custom nodes, under a name made from its path."""
    link(folder, ROOT)
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    plugin = importlib.util.module_from_spec(spec)
    sys.modules[name] = plugin
    spec.loader.exec_module(plugin)
    return plugin


class _Kind:
    """A kind of input and output, such as `io.Model`; it keeps a node's declarations unchanged."""

    @staticmethod
    def Input(name: str, advanced: bool | None = None, **options: Any) -> SimpleNamespace:
        optional = options.pop("optional", False)
        return SimpleNamespace(id=name, optional=optional, advanced=advanced, options=options)

    @staticmethod
    def Output(*_: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(**options)


class _Schema(SimpleNamespace):
    """`io.Schema` of hosts with search aliases."""

    __dataclass_fields__: ClassVar = {"search_aliases": None}


class _NodeOutput:
    """`io.NodeOutput`: a node's results and its output for the page."""

    def __init__(self, *result: Any, ui: Any = None) -> None:
        self.result, self.ui = result, ui


class _Casting:
    """`comfy.ops.manual_cast`."""

    Linear, Conv2d, Embedding = torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding


class _QuantizedTensor:
    """`comfy_kitchen.tensor.QuantizedTensor`, without its operations."""

    def __init__(self, data: torch.Tensor, layout: str, params: Any = None) -> None:
        self._qdata, self._layout_cls, self._params = data, layout, params


@dataclass(frozen=True)
class _LayoutParams:
    scale: Any
    orig_dtype: Any
    orig_shape: Any


def _module(name: str, **members: Any) -> ModuleType:
    """A module whose other members are mocks."""
    module = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(members)
    module.__getattr__ = lambda member: MagicMock(name=f"{name}.{member}")
    return module


def install(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """Install the stub's modules under the host's names; `models` contains the model folders."""
    names = ("Boolean", "Clip", "Combo", "Float", "Image", "Int", "Latent", "Model", "MultiType", "String", "Vae")
    kinds = {name: _Kind for name in names}
    schema = SimpleNamespace(
        **kinds, Hidden=MagicMock(), FolderType=MagicMock(), Schema=_Schema, ComfyNode=object, NodeOutput=_NodeOutput
    )

    def file_names(folder: str) -> list[str]:
        return sorted(path.relative_to(models / folder).as_posix() for path in (models / folder).rglob("*.safetensors"))

    def full_path(folder: str, name: str) -> str | None:
        path = models / folder / name
        return str(path) if path.is_file() else None

    modules = [
        _module("comfyui_version", __version__="0.22.0"),
        _module(
            "folder_paths",
            get_filename_list=file_names,
            get_full_path=full_path,
            models_dir=str(models),
            get_output_directory=lambda: str(models.parent / "output"),
        ),
        _module("server", PromptServer=SimpleNamespace()),
        _module("aiohttp"),
        _module("comfy_api"),
        _module("comfy_api.latest", ComfyExtension=object, io=schema),
        _module("comfy_api.torch_helpers"),
        _module("comfy_api.torch_helpers.torch_compile", TORCH_COMPILE_KWARGS="torch_compile_kwargs"),
        _module("comfy_kitchen", __spec__=MagicMock()),
        _module("comfy_kitchen.tensor", QuantizedLayout=object, QuantizedTensor=_QuantizedTensor),
        _module("comfy_kitchen.tensor.base", BaseLayoutParams=_LayoutParams),
        _module("comfy"),
        _module("comfy.ops", manual_cast=_Casting),
        _module("comfy.model_patcher", ModelPatcher=object),
        _module("comfy.sd", CLIP=object),
    ]
    parts = ("cli_args", "hooks", "latent_formats", "lora", "model_base", "model_management", "model_sampling")
    others = ("patcher_extension", "sample", "sd1_clip", "utils", "weight_adapter")
    modules += [_module(f"comfy.{part}") for part in (*parts, *others)]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
