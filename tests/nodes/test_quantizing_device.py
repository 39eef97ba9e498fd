"""Where a MODEL is quantised, and how long the page says that takes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FORM = {"preset": "balanced", "effort": "fast", "levels": "16", "conv_levels": "32"}


@pytest.fixture
def bake(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that quantises, in a host with a GPU that can."""
    bake = sys.modules[f"{plugin.__name__}.nodes.bake"]
    monkeypatch.setattr(bake.comfy.model_management, "get_torch_device", lambda: GPU)
    monkeypatch.setattr(bake, "check_device", lambda device, dtype: None)
    return bake


def test_a_gpu_is_used_if_there_is_one(bake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {choice: bake.quantizing_device(choice) for choice in bake.DEVICES}
    assert choices == {"auto": GPU, "cpu": CPU, "gpu": GPU}
    monkeypatch.setattr(bake.comfy.model_management, "get_torch_device", lambda: CPU)
    assert {bake.quantizing_device(choice) for choice in bake.DEVICES} == {CPU}


def test_a_gpu_that_cannot_quantise(bake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Apple's, without float64."""

    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise bake.NFQError("it cannot")

    monkeypatch.setattr(bake, "check_device", refuse)
    assert bake.quantizing_device("auto") == CPU
    with pytest.raises(bake.NFQError, match="it cannot"):
        bake.quantizing_device("gpu")


def test_too_little_memory_on_the_gpu(bake: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    used = []

    def work(device: torch.device) -> str:
        used.append(device)
        if device != CPU:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert bake.on_device(work, GPU, or_cpu=True) == "done"
    assert used == [GPU, CPU]
    assert "cuda:0 has too little free memory to quantise, so the CPU does it" in caplog.text
    with pytest.raises(torch.cuda.OutOfMemoryError):
        bake.on_device(work, GPU, or_cpu=False)


@pytest.fixture
def answer(plugin: ModuleType, tmp_path: Path):
    """What the page is told about the time for a small model."""
    save_file({"layer.weight": torch.randn(640, 640).half()}, tmp_path / "models" / "checkpoints" / "a.safetensors")
    routes = sys.modules[f"{plugin.__name__}.nodes.routes"]

    def ask(**query: str) -> tuple[int, dict]:
        return routes._answer(*routes.ROUTES["/nfq/time"], {"folder": "checkpoints", "name": "a.safetensors", **query})

    return ask


def test_the_time_depends_on_the_settings(answer, bake: ModuleType) -> None:
    status, fast = answer(**FORM, device="cpu")
    assert status == 200 and 0 < fast["seconds"] < 60
    assert answer(**FORM | {"effort": "best"}, device="cpu")[1]["seconds"] > fast["seconds"]
    assert answer(**FORM, device="cpu", calibrated="true")[1]["seconds"] > fast["seconds"]


def test_no_time_is_told_for_a_gpu(answer, bake: ModuleType) -> None:
    assert answer(**FORM, device="auto") == (200, {"seconds": None})


@pytest.mark.parametrize("wrong", [{"preset": "huge"}, {"levels": "many"}, {"effort": ""}])
def test_wrong_settings_are_refused(answer, wrong: dict[str, str]) -> None:
    status, body = answer(**FORM | wrong)
    assert status == 422 and body["error"].startswith("not a setting: ")


def test_only_listed_originals_are_described(answer) -> None:
    assert answer(**FORM, name="gone.safetensors")[0] == 404
    assert answer(**FORM, name="../../a.safetensors")[0] == 404
    assert answer(**FORM, folder="loras")[0] == 400
