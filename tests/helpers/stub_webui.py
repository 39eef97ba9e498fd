"""A stub of Automatic1111's web UI or Forge that can load the extension; `tests/webui` runs the real programs."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

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


def install(monkeypatch: pytest.MonkeyPatch, *, forge: bool) -> Program:
    """Install the stub's modules under the program's names."""
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

    def reader(*args: Any, **kwargs: Any) -> str:
        program.read.append((args, kwargs))
        return "stock"

    module("gradio", Warning=program.warnings.append)
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
    data = SimpleNamespace(loaded_sd_models=[], forge_loading_parameters={}, forge_hash="")
    models = module("modules.sd_models", model_data=data, checkpoints_loaded={}, checkpoints_list={})

    def change(*args: Any, **kwargs: Any) -> str:
        program.read.append((args, kwargs))
        if forge:
            info = data.forge_loading_parameters["checkpoint_info"]
            return program.modules["backend.loader"].load_torch_file(info.filename)
        return models.read_state_dict(kwargs["info"].filename)

    if forge:
        module("modules.processing", forge_model_reload=change)
        module("backend")
        module("backend.args", dynamic_args={})
        module("backend.loader", load_torch_file=reader)
        models.load_torch_file, models.forge_model_reload = reader, change
    else:
        models.read_state_dict, models.reload_model_weights = reader, change
    return program
