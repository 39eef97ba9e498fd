"""`--text-encoders` and what the commands print about a file of several models."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import as_json, run
from safetensors.torch import save_file
from samples import TINY as TINY_UNET
from text_models import SMALL_L, random_tensors

from benchmarks.checkpoint_shapes import clip
from nfq_core.models.unet_keys import tensor_shapes

PREFIX = "conditioner.embedders.0.transformer."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "model.safetensors"
    save_file(random_tensors(tensor_shapes(TINY_UNET, "prefixed") | clip(SMALL_L, PREFIX)), path)
    return path


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ([], {"nf256_b64"}),
        (["--preset", "small"], {"nf32_b64", "nf256_b64"}),
        (["--levels", 16, "--text-encoders", "5bit"], {"nf32_b64", "nf256_b64"}),
        (["--text-encoders", "keep"], set()),
    ],
)
def test_formats_of_text_encoders(capsys, checkpoint, options, formats):
    found = as_json(capsys, "quantize", checkpoint, "--dry-run", *options)
    assert {layer["format"] for layer in found["layers"] if layer["name"].startswith(PREFIX)} == formats
    assert [each["name"] for each in found["components"]] == ["diffusion model", "CLIP-L"]
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_an_unknown_choice_is_wrong_usage(capsys, checkpoint):
    code, _, error = run(capsys, "quantize", checkpoint, "--text-encoders", "6bit")
    assert code == 2 and "invalid choice: '6bit'" in error


def test_lines_about_each_model(capsys, checkpoint, tmp_path):
    target = tmp_path / "a.nfq.safetensors"
    run(capsys, "quantize", checkpoint, target)
    _, out, _ = run(capsys, "info", target)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "packed" in lines["CLIP-L"] and "packed" in lines["diffusion"] and "text_encoders 8bit" in lines["settings"]
    _, out, _ = run(capsys, "compare", checkpoint, target)
    assert [line.split(":")[0] for line in out.splitlines()[1:4]] == [
        "all 78 layers together",
        "diffusion model",
        "CLIP-L",
    ]
