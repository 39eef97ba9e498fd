"""What several tests of the nodes use."""

from __future__ import annotations

from types import ModuleType

import pytest
from stub_lora import lora_module


@pytest.fixture
def lora(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of layers' patches, over the stand-in for the host's arithmetic."""
    return lora_module(plugin, monkeypatch)
