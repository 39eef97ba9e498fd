"""NFQualityReport in a stub of the host: the files it lists, its outputs, its errors."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from samples import SMALL_MODEL

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import compare_files
from nfq_core.planning.settings import Formats, Settings


@pytest.fixture
def node(plugin: ModuleType) -> type:
    extension = asyncio.run(plugin.comfy_entrypoint())
    (found,) = [node for node in asyncio.run(extension.get_node_list()) if node.__name__ == "NFQualityReport"]
    return found


@pytest.fixture
def models(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    (models / "checkpoints" / "deep").mkdir(parents=True, exist_ok=True)
    save_file(SMALL_MODEL, models / "checkpoints" / "deep" / "a.safetensors")
    for levels in (16, 7):
        target = models / "diffusion_models" / f"a{levels}.nfq.safetensors"
        quantize_file(models / "checkpoints" / "deep" / "a.safetensors", target, Settings(Formats.of(levels)))
    return models


ORIGINAL, LARGE, SMALL = (
    "checkpoints/deep/a.safetensors",
    "diffusion_models/a16.nfq.safetensors",
    "diffusion_models/a7.nfq.safetensors",
)


def test_lists_what_the_host_lists(node: type, models: Path) -> None:
    inputs = {each.id: each.options for each in node.define_schema().inputs}
    assert inputs["original_name"]["options"] == [ORIGINAL]
    assert inputs["file_name"]["options"] == [LARGE, SMALL]
    assert inputs["file_name_2"]["options"] == ["(none)", LARGE, SMALL]


def test_plots_and_tables(node: type, models: Path) -> None:
    output = node.execute(ORIGINAL, SMALL, file_name_2="(none)", file_name_4=LARGE)
    plots, text = output.result
    assert plots.shape[0] == 1 and plots.shape[2:] == (1500, 3) and plots.dtype == torch.float32
    assert plots.min() >= 0 and plots.max() == 1
    for name in (SMALL, LARGE):
        assert f"{compare_files(models / ORIGINAL, models / name)['sqnr_db']:.2f}" in text
    assert text.index("a16") < text.index("a7") and "![" not in text
    assert output.ui["text"] == (text,)


def test_changed_files_are_measured_again(node: type, models: Path) -> None:
    names = {"original_name": ORIGINAL, "file_name": SMALL, "file_name_2": "(none)"}
    before = node.fingerprint_inputs(**names)
    assert before == node.fingerprint_inputs(**names)
    assert str(models / ORIGINAL) in before and str(models / SMALL) in before
    os.utime(models / ORIGINAL, ns=(1, 1))
    assert node.fingerprint_inputs(**names) != before


@pytest.mark.parametrize(
    ("original", "file", "message"),
    [
        (
            LARGE,
            SMALL,
            "'a16.nfq.safetensors' is not in models/diffusion_models, or its name does not end in .safetensors; ",
        ),
        (
            ORIGINAL,
            ORIGINAL,
            "'deep/a.safetensors' is not in models/checkpoints, or its name does not end in .nfq.safetensors; ",
        ),
        (
            ORIGINAL,
            "loras/a",
            "'loras/a' is not in models/diffusion_models, or its name does not end in .nfq.safetensors; ",
        ),
    ],
)
def test_refuses_other_files(node: type, models: Path, original: str, file: str, message: str) -> None:
    with pytest.raises(Exception, match="put it there, or choose another") as error:
        node.execute(original, file)
    assert type(error.value).__name__ == "NFQError" and message in str(error.value)


def test_missing_matplotlib_is_named(node: type, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plots need matplotlib"):
        node.execute(ORIGINAL, SMALL)
