"""A browser, and a page for each of the host's two canvases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driver import Host

from nfq_core import quantize_state_dict, save
from nfq_core.files.container import Source

try:
    from page import CHROMIUM, FLAGS, HOSTILE, Page
    from playwright.sync_api import sync_playwright
except ImportError:
    # These tests need playwright: `pip install -e ".[browser]"`.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: name one in CHROMIUM")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes2"])
def page(browser, host: Host, request: pytest.FixtureRequest) -> Iterator:
    page = Page(browser, host, nodes2=request.param)
    yield page
    errors = page.errors
    page.close()
    assert not [error for error in errors if "ComfyUI-NFQ" in error or "nfq" in error.split("\n")[0]]


@pytest.fixture(scope="session")
def hostile(base: Path) -> str:
    """The name of a file with markup in its header."""
    name = "hostile.nfq.safetensors"
    weights = {f"{HOSTILE}.weight": torch.randn(64, 64), "=1+1.weight": torch.randn(64, 128)}
    packed = quantize_state_dict(weights, levels=16)
    settings = {"levels": HOSTILE, HOSTILE: 16, "baked": [HOSTILE]}
    save(packed, base / "models" / "diffusion_models" / name, settings=settings, source=Source(HOSTILE))
    return name
