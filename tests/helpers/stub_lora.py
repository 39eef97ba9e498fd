"""A stand-in for the host's LoRA arithmetic, and the plugin's module of patches over it."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

KEY = "diffusion_model.layer.weight"
ROOT = logging.getLogger()


class Adapter:
    """Two factors, as in the host's `LoRAAdapter`; with `special` weights it is not a plain LoRA."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, *special: object) -> None:
        self.weights = (up, down, None, *(special or (None, None, None)))


class Failing(Adapter):
    """Fits by its shapes, but fails with `error` when its factors have values."""

    def __init__(self, error: Exception) -> None:
        super().__init__(torch.ones(4, 1), torch.ones(1, 6), "special")
        self.error = error


def calculate_weight(patches, weight, key, intermediate_dtype=torch.float32, original_weights=None):
    """Like the host's: failures are logged through the root logger, and the weight is returned unchanged."""
    whole = weight
    for strength, adapter, strength_model, offset, function in patches:
        weight = whole if offset is None else whole.narrow(*offset)
        if strength_model != 1.0:
            weight *= strength_model
        if isinstance(adapter, tuple):
            if adapter[0].shape != weight.shape:
                ROOT.warning(f"WARNING SHAPE MISMATCH {key} WEIGHT NOT MERGED")
            else:
                weight += strength * adapter[0].to(weight)
            continue
        up, down, *_ = (value.to(weight.device) for value in adapter.weights[:2])
        try:
            change = (up.to(intermediate_dtype) @ down.to(intermediate_dtype)).reshape(weight.shape)
            if isinstance(adapter, Failing) and not weight.is_meta:
                raise adapter.error
            weight += strength * (function or (lambda x: x))(change).to(weight.dtype)
        except Exception as e:
            ROOT.error(f"ERROR lora {key} {e}")
    return whole


def lora_module(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of layers' patches, over the stand-in."""
    modules = {name: sys.modules[f"{plugin.__name__}.nodes.{name}"] for name in ("lora", "misfits")}
    monkeypatch.setattr(sys.modules["comfy.lora"], "calculate_weight", calculate_weight, raising=False)
    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "device_supports_non_blocking", lambda device: True, raising=False)
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 0, raising=False)
    monkeypatch.setattr(modules["lora"], "LoRAAdapter", Adapter)
    for module in modules.values():
        monkeypatch.setattr(module, "WeightAdapterBase", Adapter)
    return modules["lora"]


def patch(
    adapter: object,
    strength: float = 1.0,
    strength_model: float = 1.0,
    function: object = None,
    offset: tuple[int, int, int] | None = None,
) -> tuple:
    """A patch in the host's form."""
    return (strength, adapter, strength_model, offset, function)
