"""The programs, if the environment names their folders, and a folder of checkpoints for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import TINY, random_half
from text_models import SMALL_G, SMALL_L, random_tensors

from benchmarks.checkpoint_shapes import clip, text_encoders
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.files.container import NFQFile
from nfq_core.files.safetensors_io import aligned_entries, header_bytes, tensor_bytes
from nfq_core.models.unet_keys import tensor_shapes

ROOT = Path(__file__).resolve().parent.parent.parent

PROGRAMS = {
    "webui": ("WEBUI_PATH", "WEBUI_PYTHON"),
    "forge": ("FORGE_PATH", "FORGE_PYTHON"),
    "neo": ("NEO_PATH", "NEO_PYTHON"),
}

VAE = {
    "first_stage_model.decoder.conv_in.weight": (32, 4, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (32, 3, 3, 3),
}
"""Tensors that make a checkpoint count as one with a VAE."""


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = aligned_entries({name: ("F16", tuple(tensor.shape)) for name, tensor in tensors.items()})
    data = b"".join(bytes(tensor_bytes(tensors[name])) for name in entries)
    path.write_bytes(header_bytes(entries, {"format": "pt"}) + data)


def make_checkpoints(folder: Path) -> None:
    """Checkpoints of a tiny UNet with SDXL's names: valid, damaged, newer, foreign, renamed, and its parts alone."""
    folder.mkdir(parents=True)
    unet = {
        name: random_half(*shape, seed=seed) / 16
        for seed, (name, shape) in enumerate(tensor_shapes(TINY, "prefixed").items())
    }
    companions = random_tensors(text_encoders(SMALL_L, SMALL_G) | VAE)
    write(folder / "source.tmp", unet | companions)
    tiny = folder / "tiny.nfq.safetensors"
    quantize_file(folder / "source.tmp", tiny)
    dequantize_file(tiny, folder / "dequantised.safetensors", torch.float16)
    write(folder / "source.tmp", {name.removeprefix("model.diffusion_model."): value for name, value in unet.items()})
    quantize_file(folder / "source.tmp", folder / "unet.nfq.safetensors")
    write(folder / "other.safetensors", {name: value * 2 for name, value in unet.items()} | companions)
    quantize_file(folder / "other.safetensors", folder / "other.nfq.safetensors")
    modules = folder.parent / "modules"
    modules.mkdir()
    write(modules / "companions.safetensors", companions)
    write(folder / "source.tmp", random_tensors(clip(SMALL_L)))
    quantize_file(folder / "source.tmp", modules / "clip_l.nfq.safetensors")
    dequantize_file(modules / "clip_l.nfq.safetensors", modules / "clip_l.safetensors")
    (folder / "source.tmp").unlink()
    shutil.copy(tiny, folder / "renamed.safetensors")
    raw = bytearray(tiny.read_bytes())
    with NFQFile(tiny) as file:
        start = len(file.raw_header) + max(entry.start for entry in file.entries.values())
    raw[start + 20] ^= 255
    (folder / "damaged.nfq.safetensors").write_bytes(raw)
    newer = tiny.read_bytes().replace(b'\\"container_version\\":1', b'\\"container_version\\":9', 1)
    (folder / "newer.nfq.safetensors").write_bytes(newer)
    shutil.copy(folder / "dequantised.safetensors", folder / "foreign.nfq.safetensors")


@pytest.fixture(params=list(PROGRAMS))
def program(request: pytest.FixtureRequest) -> str:
    """Each program whose folder the environment names."""
    variable = PROGRAMS[request.param][0]
    if not os.environ.get(variable):
        pytest.skip(f"set {variable} to the program's folder to run this")
    return request.param


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program's folder of models, made once; nothing changes a file in it."""
    folder = tmp_path_factory.mktemp("made") / "models"
    make_checkpoints(folder / "Stable-diffusion")
    return folder


@pytest.fixture
def ask(program: str, models: Path, tmp_path: Path) -> Callable[[str], dict]:
    """Run a check of `driver.py` in a program; `tmp_path` is its data folder with the extension and the models."""
    shutil.copytree(models, tmp_path / "models", copy_function=os.link)
    (tmp_path / "extensions").mkdir()
    (tmp_path / "extensions" / "ComfyUI-NFQ").symlink_to(ROOT)
    path, python = (os.environ.get(name) for name in PROGRAMS[program])

    def ask(check: str) -> dict:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PROGRAM": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [python or sys.executable, str(Path(__file__).parent / "driver.py"), check, str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
        assert result.returncode == 0, result.stderr[-6000:]
        return json.loads(result.stdout.splitlines()[-1]) | {"log": result.stderr}

    return ask
