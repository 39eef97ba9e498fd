"""The host under test, and the models that the tests load."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from driver import Host, host_python, make_base
from last_run import Recorder, asked_for, host_versions
from models import KINDS, NARROW, random_adapter, write_unet
from safetensors.torch import save_file

from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.models.unet_keys import SEGMIND_VEGA
from nfq_core.planning.settings import Formats, Settings


def pytest_configure(config: pytest.Config) -> None:
    def host() -> dict[str, str]:
        return host_versions(Path(os.environ["COMFYUI_PATH"]), host_python())

    config.pluginmanager.register(Recorder(config, Path(__file__).resolve().parent, host))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip these tests without a host, and in runs of the whole suite: they take a quarter of an hour."""
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if not ours:
        return
    if not os.environ.get("COMFYUI_PATH"):
        reason = "COMFYUI_PATH does not name a ComfyUI"
    elif not any(here in (path, *path.parents) for path in asked_for(config)):
        reason = "`python -m pytest tests/host` runs the tests in a real host"
    elif subprocess.run([host_python(), "-c", "import aiohttp, comfy_kitchen"], capture_output=True).returncode:
        reason = f"{host_python()} lacks packages that ComfyUI needs; name the host's own Python in COMFYUI_PYTHON"
    else:
        return
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory):
    """A base directory with two models in fp16, packed, and dequantised: a narrow one and Vega; adapters."""
    base = make_base(tmp_path_factory.mktemp("comfyui") / "base")
    unets = base / "models" / "diffusion_models"
    loras = base / "models" / "loras"
    for name, architecture in (("narrow", NARROW), ("vega", SEGMIND_VEGA)):
        write_unet(unets / f"{name}.safetensors", architecture)
        quantize_file(unets / f"{name}.safetensors", unets / f"{name}.nfq.safetensors", Settings(Formats()))
    dequantize_file(unets / "narrow.nfq.safetensors", unets / "narrow-dense.safetensors")
    for number, kind in enumerate(KINDS):
        save_file(random_adapter(NARROW, kind, number), loras / f"{kind}.safetensors")
    save_file(random_adapter(SEGMIND_VEGA, "lora", 0), loras / "vega-lora.safetensors")
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def host(base: Path):
    running = Host(base)
    yield running
    running.close()
