"""Calibrating a pipeline: the prompts, the function, and the two commands."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from commands import one_line, run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from sdxl_folder import make_folder

from nfq_core import Calibration, NFQError, NFQFile
from nfq_core.calibration.fingerprint import fingerprint
from nfq_core.calibration.prompts import PROMPTS, Prompt
from nfq_core.diffusers import calibrate, dense_pipeline

FAST = {"steps": 2, "side": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture
def pipeline(folder: Path):
    return dense_pipeline.load_dense_pipeline(folder, "cpu")


def test_prompts_differ_and_some_have_no_negative_one():
    assert len(set(PROMPTS)) == len(PROMPTS) >= 24
    assert any(not prompt.negative for prompt in PROMPTS) and any("1girl" in prompt.positive for prompt in PROMPTS)
    # CLIP reads 77 tokens, of which no word here has more than three.
    assert all(len(text.replace(",", " ,").split()) < 40 for prompt in PROMPTS for text in prompt)


def test_every_layer_is_recorded(pipeline):
    seen = []
    found = calibrate(pipeline, 3, **FAST, progress=lambda *state: seen.append(state))
    assert (found.prompts, found.steps) == (3, 2)
    assert all(inputs.correlation is not None for inputs in found.inputs.values()) and len(found.inputs) > 20
    # SDXL's own sensitivities do not fit this UNet layer by layer.
    assert found.sensitivities
    assert seen[0] == (1, 6, "prompt 1 of 3") and seen[-1] == (6, 6, "prompt 3 of 3")


def test_the_result_can_be_repeated_and_depends_on_the_prompts(pipeline):
    def importance(prompts: int | list[Prompt], **more: object) -> torch.Tensor:
        found = calibrate(pipeline, prompts, **FAST, sensitivities=False, **more)
        return next(inputs for name, inputs in found.inputs.items() if "attn1.to_out" in name).importance

    first = importance(1)
    assert torch.equal(importance([PROMPTS[0]]), first)
    assert not torch.equal(importance([Prompt("a cat")]), first)
    assert not torch.equal(importance(1, seed=1), first)


@pytest.mark.parametrize("prompts", [0, len(PROMPTS) + 1])
def test_a_wrong_number_of_prompts_is_refused(pipeline, prompts: int):
    with pytest.raises(NFQError, match=r"prompts must be from 1 to \d+"):
        calibrate(pipeline, prompts)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(NFQError, match="a dict has no UNet"):
        calibrate({})


def test_a_quantised_unet_is_refused(pipeline):
    layer = next(module for module in pipeline.unet.modules() if isinstance(module, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.uint8), requires_grad=False)
    with pytest.raises(NFQError, match="quantised, but a calibration needs dense weights"):
        calibrate(pipeline, 1, **FAST)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"side": 65}, "side must be a multiple of 8 pixels, got 65"),
        ({"prompts": [Prompt("")], "guidance": 7.5, "side": -8}, "side must be a multiple of 8 pixels, got -8"),
    ],
)
def test_what_cannot_be_sampled_is_refused(pipeline, wrong: dict, message: str):
    with pytest.raises(NFQError, match=message):
        calibrate(pipeline, **wrong)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float16, "load the model in bfloat16 or float32"), (torch.float32, "fetch the model again")],
)
def test_nan_is_told(pipeline, dtype: torch.dtype, advice: str):
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(float("nan"))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(NFQError, match=f"prompt 1 of 1 gave NaN or infinity in {kind}; {advice}"):
        calibrate(pipeline.to(dtype), 1, **FAST, sensitivities=False)


def test_an_interrupt_leaves_no_hooks(pipeline):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, 2, **FAST, progress=interrupt)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in pipeline.unet.modules())


OPTIONS = ("--prompts", "2", "--steps", "2", "--side", "64", "--device", "cpu")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    target = tmp_path / "sdxl.calibration.safetensors"
    code, out, error = run(capsys, "calibrate", folder, target, *OPTIONS)
    assert code == 0, error
    assert out.startswith(f"{target}: ") and "2 prompts" in out
    assert Calibration.load(target).steps == 2
    assert run(capsys, "calibrate", folder, target, *OPTIONS)[2].endswith("exists already; --force overwrites it\n")


def test_quantising_calibrates_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    """A UNet in a diffusers folder is sampled with the rest of the folder."""
    sampled, load = [], dense_pipeline.load_dense_pipeline
    monkeypatch.setattr(
        dense_pipeline, "load_dense_pipeline", lambda *given, **more: sampled.append(given[0]) or load(*given, **more)
    )
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("a", "b"):
        target = tmp_path / f"{name}.nfq.safetensors"
        code, _, error = run(capsys, "quantize", unet, target, "--calibrate", *OPTIONS)
        assert code == 0, error
        (kept,) = tmp_path.glob("*.calibration.safetensors")
        with NFQFile(target) as file:
            assert file.facts.settings["calibration"] == kept.name
    assert sampled == [str(unet)]
    code, _, error = run(capsys, "quantize", unet, tmp_path, "--calibrate", "--calibration", kept)
    assert code == 1 and "give one of them" in error


def test_a_dry_run_samples_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    code, _, error = run(capsys, "quantize", unet, tmp_path / "x.nfq.safetensors", "--calibrate", "--dry-run")
    assert code == 1 and "--dry-run samples nothing, and there is no " in error
    assert not list(tmp_path.iterdir())


def test_options_without_calibrating_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    code, _, error = run(capsys, "quantize", unet, tmp_path / "x.nfq.safetensors", "--steps", "4")
    assert code == 1 and "--steps says how to sample; add --calibrate, or leave it out" in error


def test_what_is_wrong_is_told_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dense_pipeline, "load_dense_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    unet = tmp_path / "unet.safetensors"
    unet.write_bytes((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    existing = tmp_path / "existing.nfq.safetensors"
    existing.write_bytes(b"old")
    locked = tmp_path / "locked.safetensors"
    locked.symlink_to("/proc/locked.safetensors")
    for arguments, message in (
        (("calibrate", unet, unet, "--force"), "is the source itself; name another target"),
        (("calibrate", unet, tmp_path / "gone" / "x"), "no such folder; create it first, or name another"),
        (("calibrate", unet, tmp_path / "x.ckpt"), "only if its name ends in .safetensors"),
        (("calibrate", unet, locked), "could not be written"),
        (("calibrate", unet, tmp_path / "x", "--prompts", "0"), "prompts must be from 1 to 32"),
        (("quantize", unet, existing, "--calibrate"), "exists already; --force overwrites it"),
        (("quantize", unet, "--calibrate", "--steps", "0"), "steps must be at least 1"),
    ):
        code, _, error = run(capsys, *arguments)
        assert code == 1 and message in one_line(error)
    assert existing.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {unet.name, existing.name, locked.name}


def test_a_full_disk_leaves_the_old_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    target = tmp_path / "sdxl.calibration.safetensors"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nfq_core.files.atomic._flush", full)
    code, _, error = run(capsys, "calibrate", folder, target, "--force", *OPTIONS)
    assert code == 1 and f"could not be written: {os.strerror(errno.ENOSPC)}; nothing was changed" in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == [target.name] and target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (KeyboardInterrupt(), "interrupted; no unfinished file is left"),
        (torch.OutOfMemoryError("out of memory"), "out of memory while sampling; choose a smaller --side"),
    ],
)
def test_a_run_that_ends_early_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch, fault: BaseException, message: str
):
    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("diffusers.EulerDiscreteScheduler.step", fails)
    code, _, error = run(capsys, "calibrate", folder, tmp_path / "x", *OPTIONS)
    assert code == 1 and message in one_line(error)
    assert not list(tmp_path.iterdir())


def test_fingerprints_tell_models_and_settings_apart():
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, 3), "empty": torch.empty(0)}

    def of(tensors: dict[str, torch.Tensor], **facts: object) -> str:
        return fingerprint(tensors, tensors.__getitem__, facts)

    class Adapter:
        def __init__(self, *weights: torch.Tensor) -> None:
            self.weights = weights

    assert of(weights) == of(dict(reversed(weights.items()))) == of({k: t.half() for k, t in weights.items()})
    others = [of(weights | {"a": weights["a"] + 1}), of(weights | {"b": torch.ones(9)}), of(weights, steps=8)]
    others += [of(weights, lora=[(1.0, Adapter(torch.ones(2)))]), of(weights, lora=[(1.0, Adapter(torch.zeros(2)))])]
    assert len({of(weights), *others}) == 6
