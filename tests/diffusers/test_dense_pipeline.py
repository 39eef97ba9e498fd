"""Loading a pipeline to sample: single-file checkpoints and diffusers folders, and the files that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from commands import run
from samples import TINY
from sdxl_folder import checkpoint_tensors, make_folder

from nfq_core import Calibration, NFQError, NFQFile
from nfq_core.diffusers import calibrate
from nfq_core.diffusers.dense_pipeline import load_dense_pipeline
from nfq_core.models.unet import detect, diffusers_names

TENSORS = checkpoint_tensors()

UNET = {key: tensor for key, tensor in TENSORS.items() if key.startswith("model.diffusion_model.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def settings(folder: Path) -> Path:
    """The folder without any weights, as a download of its settings alone has it."""
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "sdxl.safetensors")
    return tmp_path / "sdxl.safetensors"


def test_a_checkpoint_is_loaded_with_all_its_weights(checkpoint: Path, settings: Path) -> None:
    pipeline = load_dense_pipeline(checkpoint, "cpu", str(settings))
    names = diffusers_names(detect({key: tensor.shape for key, tensor in UNET.items()}), UNET)
    found = pipeline.unet.state_dict()
    assert found.keys() == set(names.values())
    assert all(torch.equal(found[name], UNET[key].float().view(found[name].shape)) for key, name in names.items())
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    for encoder, key in (
        (pipeline.text_encoder, f"{first}text_model.embeddings.token_embedding.weight"),
        (pipeline.text_encoder_2, f"{second}token_embedding.weight"),
    ):
        assert torch.equal(encoder.get_input_embeddings().weight, TENSORS[key].float())
    projection = pipeline.text_encoder_2.text_projection.weight
    assert torch.equal(projection, TENSORS[f"{second}text_projection"].float().T)
    assert pipeline.vae is None and pipeline.scheduler.config.prediction_type == "epsilon"


def test_a_checkpoint_is_calibrated_and_quantised_by_one_command(
    checkpoint: Path, settings: Path, capsys: pytest.CaptureFixture
) -> None:
    how = ("--config", settings, "--prompts", "2", "--steps", "2", "--side", "64", "--device", "cpu")
    code, out, error = run(capsys, "quantize", checkpoint, "--calibrate", *how)
    assert code == 0, error
    assert " dB by the calibration; predicted)" in out
    (kept,) = checkpoint.parent.glob("*.calibration.safetensors")
    found = Calibration.load(kept)
    # Each layer was called under the name that it has in the file.
    assert {f"model.diffusion_model.{name}" for name in found.inputs | found.faults} < UNET.keys()
    with NFQFile(checkpoint.with_name("sdxl-balanced.nfq.safetensors")) as file:
        assert file.facts.settings["calibration"] == kept.name


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_or_the_unet_in_it(tmp_path: Path, variant: str | None) -> None:
    whole = make_folder(tmp_path / "sdxl", variant)
    (weights,) = (whole / "unet").glob("*.safetensors")
    for source in (whole, whole / "unet", weights):
        assert load_dense_pipeline(source, "cpu").text_encoder is not None


@pytest.mark.parametrize(
    ("markers", "asked", "prediction", "zero_terminal_snr"),
    [
        ((), False, "epsilon", False),
        ((), True, "v_prediction", False),
        (("v_pred",), False, "v_prediction", False),
        (("v_pred", "ztsnr"), False, "v_prediction", True),
    ],
)
def test_models_that_predict_v(
    tmp_path: Path, settings: Path, markers: tuple[str, ...], asked: bool, prediction: str, zero_terminal_snr: bool
) -> None:
    save_file(TENSORS | {name: torch.empty(0) for name in markers}, tmp_path / "v.safetensors")
    pipeline = load_dense_pipeline(tmp_path / "v.safetensors", "cpu", str(settings), v_prediction=asked)
    config = pipeline.scheduler.config
    assert config.prediction_type == prediction and bool(config.rescale_betas_zero_snr) == zero_terminal_snr
    assert calibrate(pipeline, 1, steps=2, side=64, sensitivities=False).inputs


def test_settings_that_cannot_be_fetched(checkpoint: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("diffusers.loaders.single_file._download_diffusers_model_config_from_hub", offline)
    monkeypatch.setattr("nfq_core.diffusers.dense_pipeline.SDXL_BASE", replace(TINY, name="unknown"))
    with pytest.raises(NFQError, match="cannot be fetched; go online once, or name a diffusers folder"):
        load_dense_pipeline(checkpoint, "cpu")


OTHERS = {
    "a UNet alone": (UNET, "lacks SDXL's text encoders, which prompts need; give the whole checkpoint"),
    "text encoders alone": (
        {key: tensor for key, tensor in TENSORS.items() if key not in UNET},
        r"a calibration needs a whole SDXL checkpoint, this is: text encoder \(CLIP, CLIP\)",
    ),
    "a LoRA": (
        {"lora_unet_x.lora_up.weight": torch.ones(4, 4), "lora_unet_x.lora_down.weight": torch.ones(4, 4)},
        "a calibration needs a whole SDXL checkpoint, this is: LoRA",
    ),
    "an inpainting model": (
        checkpoint_tensors(replace(TINY, in_channels=9)),
        "its UNet needs a picture besides the prompt",
    ),
    "another architecture": (
        checkpoint_tensors(replace(TINY, channels=(32, 32))),
        r"its UNet \(unknown\) differs from that of .*; name a diffusers folder of the same kind",
    ),
    "a Stable Diffusion 1 model": (
        {
            key: tensor
            for key, tensor in checkpoint_tensors(replace(TINY, context_width=768, added_width=0)).items()
            if ".label_emb." not in key
        },
        "a calibration needs a whole SDXL checkpoint, this is: Stable Diffusion 1 model",
    ),
    "an incomplete one": (
        {key: tensor for key, tensor in TENSORS.items() if not key.endswith("to_q.weight")},
        "a calibration needs a whole SDXL checkpoint, this is: ",
    ),
    "scaled fp8": (
        {key: tensor.to(torch.float8_e4m3fn) if "to_q.weight" in key else tensor for key, tensor in TENSORS.items()}
        | {key.replace("to_q.weight", "to_q.scale_weight"): torch.ones(1) for key in UNET if "to_q.weight" in key}
        | {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        "is quantised already; calibrate the model that it was made from",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused(tmp_path: Path, settings: Path, kind: str) -> None:
    tensors, message = OTHERS[kind]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(NFQError, match=f"other.safetensors.*{message}"):
        load_dense_pipeline(tmp_path / "other.safetensors", "cpu", str(settings))


def test_a_cut_file_is_refused(checkpoint: Path, settings: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(NFQError, match="is cut short"):
        load_dense_pipeline(checkpoint, "cpu", str(settings))


def test_settings_that_are_none_are_refused(checkpoint: Path, settings: Path, tmp_path: Path) -> None:
    for config in (tmp_path / "gone", checkpoint, settings / "unet"):
        with pytest.raises(NFQError, match=r"is not a diffusers folder: its .* cannot be read"):
            load_dense_pipeline(checkpoint, "cpu", str(config))
    with pytest.raises(NFQError, match="device 'tpu' cannot be used here"):
        load_dense_pipeline(checkpoint, "tpu", str(settings))
