"""Where a MODEL is quantised, and how long the page says it takes."""

from __future__ import annotations

import logging
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
    choices = {choice: bake.quantizing_device(choice)[0] for choice in bake.DEVICES}
    assert choices == {"auto": GPU, "cpu": CPU, "gpu": GPU}
    monkeypatch.setattr(bake.comfy.model_management, "get_torch_device", lambda: CPU)
    assert bake.quantizing_device("auto") == bake.quantizing_device("cpu") == (CPU, "")
    with pytest.raises(bake.NFQError, match="runs on the CPU; set device to auto"):
        bake.quantizing_device("gpu")


def test_a_gpu_that_cannot_quantise(bake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Apple's, without float64."""

    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise bake.NFQError("it cannot")

    monkeypatch.setattr(bake, "check_device", refuse)
    assert bake.quantizing_device("auto") == (CPU, "it cannot")
    with pytest.raises(bake.NFQError, match="it cannot"):
        bake.quantizing_device("gpu")


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
    ids=["torch", "cublas"],
)
def test_too_little_memory_on_the_gpu(bake: ModuleType, caplog: pytest.LogCaptureFixture, error: RuntimeError) -> None:
    used = []

    def work(device: torch.device) -> str:
        used.append(device)
        if device != CPU:
            raise error
        return "done"

    assert bake.on_device(work, GPU, or_cpu=True) == "done"
    assert used == [GPU, CPU]
    assert "cuda:0 has too little free memory to quantise, so the CPU does it" in caplog.text
    with pytest.raises(RuntimeError):
        bake.on_device(work, GPU, or_cpu=False)


def test_another_error_on_the_gpu_is_raised(bake: ModuleType) -> None:
    def work(device: torch.device) -> None:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        bake.on_device(work, GPU, or_cpu=True)


def test_a_patch_that_runs_out_of_memory_is_no_silent_loss(
    plugin: ModuleType, bake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's adapters catch and log every error, and return the weight as it was."""

    def calculate(patches: list, weight: torch.Tensor, key: str) -> torch.Tensor:
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        except torch.cuda.OutOfMemoryError as error:
            logging.error("ERROR lora %s %s", key, error)
        return weight

    misfits = sys.modules[f"{plugin.__name__}.nodes.misfits"]
    monkeypatch.setattr(misfits.comfy.lora, "calculate_weight", calculate)
    convert = lambda weight, inplace: weight  # noqa: E731
    read = bake.baker({"a.weight": [(torch.zeros(2, 2), convert), "a LoRA"]}, "", CPU)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        read("a.weight")


@pytest.fixture
def answer(plugin: ModuleType, tmp_path: Path):
    """What the page's route answers about the time for a small model."""
    save_file({"layer.weight": torch.randn(640, 640).half()}, tmp_path / "models" / "checkpoints" / "a.safetensors")
    routes = sys.modules[f"{plugin.__name__}.nodes.routes"]

    def ask(**query: str) -> tuple[int, dict]:
        asked = {"folder": "checkpoints", "name": "a.safetensors", "device": "cpu", **query}
        return routes._answer(*routes.ROUTES["/nfq/time"], asked)

    return ask


def test_the_time_depends_on_the_settings(answer, bake: ModuleType) -> None:
    status, fast = answer(**FORM)
    assert status == 200 and 0 < fast["seconds"] < 60
    assert answer(**FORM | {"effort": "best"})[1]["seconds"] > fast["seconds"]
    assert answer(**FORM, calibrated="true")[1]["seconds"] > fast["seconds"]


def test_the_time_on_a_gpu_is_unknown(answer, bake: ModuleType) -> None:
    assert answer(**FORM, device="auto") == (200, {"seconds": None})


@pytest.mark.parametrize("wrong", [{"preset": "huge"}, {"levels": "many"}, {"effort": ""}, {"device": "tpu"}])
def test_wrong_settings_are_refused(answer, wrong: dict[str, str]) -> None:
    status, body = answer(**FORM | wrong)
    assert status == 422 and body["error"].startswith("not a setting: ")


def test_nothing_to_quantise_takes_no_time(answer, tmp_path: Path) -> None:
    save_file({"bias": torch.zeros(8)}, tmp_path / "models" / "checkpoints" / "b.safetensors")
    assert answer(**FORM, name="b.safetensors") == (200, {"seconds": None})


def test_the_path_stays_here(answer, plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "models" / "checkpoints" / "c.safetensors"
    damaged.write_bytes(b"no model")
    host = sys.modules[f"{plugin.__name__}.nodes.host"]
    monkeypatch.setattr(host.folder_paths, "get_full_path", lambda folder, name: f"{damaged.parent}//./{name}")
    status, body = answer(**FORM, name="c.safetensors")
    assert status == 422 and body["error"].startswith("c.safetensors ") and str(tmp_path) not in body["error"]


def test_only_listed_originals_are_described(answer) -> None:
    status, missing = answer(**FORM, name="gone.safetensors")
    assert status == 404 and missing.keys() == {"error"}
    assert answer(**FORM, name="../../a.safetensors")[0] == 404
    assert answer(**FORM, folder="loras")[0] == 400
