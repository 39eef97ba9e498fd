"""The names under which ComfyUI gets the tensors of a file's diffusion model, and which files have none."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import COMFYUI, random_tensors
from samples import TINY
from text_models import SMALL_L

from benchmarks.checkpoint_shapes import clip
from nfq_core import NFQFile, UnsupportedFileError, quantize_state_dict, save
from nfq_core.checkpoints.whole_checkpoint import host_names
from nfq_core.models.unet_keys import tensor_shapes

WAN = COMFYUI["Wan"][0] | COMFYUI["Wan"][1]
VAE = {"vae.decoder.conv_in.weight": (64, 4, 3, 3)}
UNKNOWN = {f"stages.{number}.mix.weight": (64, 64) for number in range(4)}


def names_of(shapes: dict, folder: Path) -> dict[str, str]:
    path = folder / "model.nfq.safetensors"
    save(quantize_state_dict(random_tensors(shapes), 16), path, overwrite=True)
    with NFQFile(path) as file:
        return host_names(file)


def prefixed(shapes: dict, prefix: str) -> dict:
    return {prefix + key: shape for key, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "net."])
def test_a_familys_names_without_their_prefix(prefix: str, tmp_path: Path) -> None:
    """Text encoders and VAE next to the model are left out."""
    encoder = prefixed(clip(SMALL_L), "text_encoders.clip_l.transformer.")
    names = names_of(prefixed(WAN, prefix) | encoder | VAE, tmp_path)
    assert names == {prefix + key: key for key in WAN}


def test_an_unknown_models_names(tmp_path: Path) -> None:
    assert names_of(UNKNOWN, tmp_path) == {key: key for key in UNKNOWN}
    names = names_of(prefixed(UNKNOWN, "model.diffusion_model.") | VAE, tmp_path)
    assert names == {f"model.diffusion_model.{key}": key for key in UNKNOWN}


def test_a_unets_names_are_ldms(tmp_path: Path) -> None:
    names = names_of(tensor_shapes(TINY, "diffusers"), tmp_path)
    assert set(names.values()) == set(tensor_shapes(TINY, "ldm"))


def test_refused_files(tmp_path: Path) -> None:
    lost = "blocks.3.ffn.0.weight"
    for shapes, message in (
        ({key: shape for key, shape in WAN.items() if key != lost}, f"tensor '{lost}' of Wan is missing"),
        (clip(SMALL_L), r"is a text encoder \(CLIP-L\), not a diffusion model"),
        ({"norm.weight": (64,)}, "has no diffusion model; choose a quantised diffusion model"),
    ):
        with pytest.raises(UnsupportedFileError, match=message) as error:
            names_of(shapes, tmp_path)
        assert "\n" not in str(error.value)
