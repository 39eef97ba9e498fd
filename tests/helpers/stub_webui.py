"""A stub of Automatic1111's web UI, Forge or Forge Neo that can load the extension.

`tests/webui` runs the real programs.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """The stub's state, which tests inspect."""

    def __init__(self) -> None:
        self.unload: list[Callable] = []
        self.warnings: list[str] = []
        self.read: list[tuple] = []
        self.options: dict[str, Any] = {}
        self.tabs: list[Callable] = []
        self.settings: list[Callable] = []
        self.before_ui: list[Callable] = []
        self.modules: dict[str, ModuleType] = {}

    def load_extension(self, root: Path = ROOT) -> None:
        """Run the entry point as the program does: without a package, with its folder first on the module path."""
        before = list(sys.path)
        sys.path.insert(0, str(root))
        try:
            runpy.run_path(str(root / "scripts" / "nfq.py"), run_name="nfq.py")
        finally:
            sys.path[:] = before


class Linear(torch.nn.Module):
    """A layer for quantised weights, as Forge's: it dequantises in `forward`."""

    apply = staticmethod(torch.nn.functional.linear)

    def __init__(self, *sizes: int) -> None:
        super().__init__()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self.weight, self.bias = state_dict[prefix + "weight"], state_dict[prefix + "bias"]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        weight = self.weight.gguf_cls.dequantize_pytorch(self.weight)
        return self.apply(values, weight.to(values.dtype), self.bias.to(values.dtype))


class Conv2d(Linear):
    """The same as a convolution, as only Forge Neo has it."""

    apply = staticmethod(torch.nn.functional.conv2d)


def install(monkeypatch: pytest.MonkeyPatch, *, kind: str) -> Program:
    """Install the stub's modules under the program's names: "automatic", "forge" or "neo"."""
    program = Program()

    def module(name: str, **members: Any) -> ModuleType:
        made = program.modules[name] = ModuleType(name)
        made.__path__ = []
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
        return made

    def patch(key: str, obj: ModuleType, field: str, replacement: Callable) -> None:
        assert (key, obj, field) not in originals
        originals[key, obj, field] = getattr(obj, field)
        setattr(obj, field, replacement)

    def undo(key: str, obj: ModuleType, field: str) -> None:
        setattr(obj, field, originals.pop((key, obj, field)))

    originals: dict[tuple, Callable] = {}

    def read(path: str, *args: Any, **kwargs: Any) -> Any:
        program.read.append(((path, *args), kwargs))
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            return "stock"

    def read_state_dict(checkpoint_file: str, print_global_state: Any = False, map_location: Any = None) -> Any:
        return read(checkpoint_file, print_global_state, map_location=map_location)

    def load_torch_file(ckpt: str, safe_load: Any = False, device: Any = None) -> Any:
        return read(ckpt, safe_load, device=device)

    def load_with_metadata(
        ckpt: str, *, safe_load: Any = True, device: Any = None, return_metadata: Any = False
    ) -> Any:
        tensors = read(ckpt, safe_load, device=device)
        return (tensors, {"format": "pt"}) if return_metadata else tensors

    module("gradio", Warning=program.warnings.append, components=MagicMock())
    module("modules")
    module("modules.patches", patch=patch, undo=undo)
    module(
        "modules.script_callbacks",
        on_before_ui=program.before_ui.append,
        on_script_unloaded=program.unload.append,
        on_ui_tabs=program.tabs.append,
        on_ui_settings=program.settings.append,
    )
    module(
        "modules.options", OptionHTML=MagicMock(), OptionInfo=MagicMock(), options_section=lambda _, options: options
    )
    module("modules.devices", get_optimal_device_name=lambda: "cpu")
    opts = SimpleNamespace(add_option=program.options.__setitem__, sd_model_checkpoint="")
    module("modules.shared", weight_load_location=None, opts=opts)
    data = SimpleNamespace(loaded_sd_models=[], forge_loading_parameters={}, forge_hash="", sd_model=None)
    models = module("modules.sd_models", model_data=data, checkpoints_loaded={}, checkpoints_list={})

    if kind == "automatic":

        def reload_model_weights(sd_model: Any = None, info: Any = None, forced_reload: bool = False) -> Any:
            return models.read_state_dict(info.filename)

        models.read_state_dict, models.reload_model_weights = read_state_dict, reload_model_weights
        return program

    def forge_model_reload() -> Any:
        found = program.modules["backend.loader"].load_torch_file(
            data.forge_loading_parameters["checkpoint_info"].filename
        )
        program.read.append(((), {}))
        return found

    reader = load_with_metadata if kind == "neo" else load_torch_file
    layers = {"Linear": Linear, "Conv2d": Conv2d if kind == "neo" else torch.nn.Conv2d}
    module("modules.processing", forge_model_reload=forge_model_reload)
    extras = module("modules.extras")
    merger = extras if kind == "neo" else models
    models.forge_model_reload, merger.load_torch_file = forge_model_reload, reader
    module("backend")
    module("backend.args", dynamic_args={})
    module("backend.loader", load_torch_file=reader)
    module("backend.utils", load_torch_file=reader)
    module(
        "backend.state_dict", load_state_dict=lambda model, sd, ignore_errors=(), log_name=None, ignore_start=None: sd
    )
    module("backend.memory_management", get_torch_device=lambda: torch.device("cpu"))
    module("backend.operations", ForgeOperationsGGUF=SimpleNamespace(**layers))
    return program
