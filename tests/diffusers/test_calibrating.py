"""Calibrating a pipeline: the prompts, the function, and the two commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from sdxl_folder import make_folder

from nfq_core import Calibration, NFQError, NFQFile
from nfq_core.calibration.fingerprint import fingerprint
from nfq_core.calibration.prompts import PROMPTS, Prompt
from nfq_core.diffusers import calibrate
from nfq_core.diffusers import calibrating as module

FAST = {"steps": 2, "side": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture
def pipeline(folder: Path):
    return module.load_pipeline(folder, "cpu")


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


def test_a_size_that_does_not_fit_is_told(pipeline):
    with pytest.raises(
        NFQError, match="the pipeline cannot sample this: `height` and `width` have to be divisible by 8"
    ):
        calibrate(pipeline, 1, steps=1, side=65)


def test_nan_is_told(pipeline):
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(float("nan"))
    with pytest.raises(NFQError, match="prompt 1 gave NaN or infinity in float32; load the model in bfloat16"):
        calibrate(pipeline, 1, **FAST)


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
    """The UNet's file holds no text encoders, so the whole folder stands in for a checkpoint here."""
    sampled, load = [], module.load_pipeline
    monkeypatch.setattr(module, "load_pipeline", lambda source, *_, **__: sampled.append(source) or load(folder, "cpu"))
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


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_models_that_predict_v(pipeline, zero_terminal_snr: bool):
    module.predict_v(pipeline, zero_terminal_snr)
    config = pipeline.scheduler.config
    assert config.prediction_type == "v_prediction" and bool(config.rescale_betas_zero_snr) == zero_terminal_snr
    assert calibrate(pipeline, 1, **FAST, sensitivities=False).inputs


def test_a_file_without_text_encoders_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    code, _, error = run(capsys, "quantize", unet, tmp_path / "x.nfq.safetensors", "--calibrate", *OPTIONS)
    assert code == 1 and "holds no text encoders, which prompts need; give the whole checkpoint" in error
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
