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

from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.files.container import NFQFile
from nfq_core.files.safetensors_io import aligned_entries, header_bytes, tensor_bytes
from nfq_core.models.unet_keys import tensor_shapes

ROOT = Path(__file__).resolve().parent.parent.parent

PROGRAMS = {"webui": ("WEBUI_PATH", "WEBUI_PYTHON"), "forge": ("FORGE_PATH", "FORGE_PYTHON")}

COMPANIONS = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (64, 48),
    "conditioner.embedders.1.model.ln_final.weight": (48,),
    "first_stage_model.decoder.conv_in.weight": (32, 4, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (32, 3, 3, 3),
}
"""Tensors of a text encoder and a VAE, which make a checkpoint count as whole."""


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = aligned_entries({name: ("F16", tuple(tensor.shape)) for name, tensor in tensors.items()})
    data = b"".join(bytes(tensor_bytes(tensors[name])) for name in entries)
    path.write_bytes(header_bytes(entries, {"format": "pt"}) + data)


def make_checkpoints(folder: Path) -> None:
    """Checkpoints of a tiny UNet with SDXL's names: valid, damaged, newer, foreign, renamed, and a UNet alone."""
    folder.mkdir(parents=True)
    unet = {
        name: random_half(*shape, seed=seed) / 16
        for seed, (name, shape) in enumerate(tensor_shapes(TINY, "prefixed").items())
    }
    companions = {name: random_half(*shape, seed=seed) for seed, (name, shape) in enumerate(COMPANIONS.items())}
    write(folder / "source.tmp", unet | companions)
    tiny = folder / "tiny.nfq.safetensors"
    quantize_file(folder / "source.tmp", tiny)
    dequantize_file(tiny, folder / "dequantised.safetensors", torch.float16)
    write(folder / "source.tmp", {name.removeprefix("model.diffusion_model."): value for name, value in unet.items()})
    quantize_file(folder / "source.tmp", folder / "unet.nfq.safetensors")
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


@pytest.fixture
def ask(program: str, tmp_path: Path) -> Callable[[str], dict]:
    """Run a check of `driver.py` in a program; `tmp_path` is its data folder with the extension and the checkpoints."""
    make_checkpoints(tmp_path / "models" / "Stable-diffusion")
    (tmp_path / "extensions").mkdir()
    (tmp_path / "extensions" / "ComfyUI-NFQ").symlink_to(ROOT)
    path, python = (os.environ.get(name) for name in PROGRAMS[program])

    def ask(check: str) -> dict:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PROGRAM": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [python or sys.executable, str(Path(__file__).parent / "driver.py"), check, str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert result.returncode == 0, result.stderr[-6000:]
        return json.loads(result.stdout.splitlines()[-1]) | {"log": result.stderr}

    return ask
