"""The host under test, and the models that the tests load into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from driver import Host, make_base
from models import KINDS, random_adapter, write_unet
from safetensors.torch import save_file

from nfq_core.convert import dequantize_file, quantize_file
from nfq_core.unet_keys import SEGMIND_VEGA


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a host, or where the whole suite is run, these tests are skipped: they take a quarter of an hour."""
    if not os.environ.get("COMFYUI_PATH"):
        skip = pytest.mark.skip(reason="COMFYUI_PATH does not name a ComfyUI")
    elif not any("host" in argument for argument in config.args):
        skip = pytest.mark.skip(reason="`python -m pytest tests/host` runs the tests in a real host")
    else:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory):
    """A base directory with Vega-sized models: fp16, packed, and the packed one dequantised; v-prediction; adapters."""
    base = make_base(tmp_path_factory.mktemp("comfyui") / "base")
    unets = base / "models" / "diffusion_models"
    write_unet(unets / "vega.safetensors", SEGMIND_VEGA)
    quantize_file(unets / "vega.safetensors", unets / "vega.nfq.safetensors")
    dequantize_file(unets / "vega.nfq.safetensors", unets / "vega-dense.safetensors")
    for number, kind in enumerate(KINDS):
        save_file(random_adapter(SEGMIND_VEGA, kind, number), base / "models" / "loras" / f"{kind}.safetensors")
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def host(base: Path):
    running = Host(base)
    yield running
    running.close()
