"""Names of files to write: completed, made up or refused, such that programs list them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from commands import as_json, one_line, run
from safetensors.torch import load_file, save_file
from samples import SMALL_MODEL

from nfq_core.checkpoints.article_import import import_article
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.targets import PLAIN_SUFFIX, container_name, dense_name, refuse_name, target_path
from nfq_core.errors import NFQError
from nfq_core.files.article import write_article_file
from nfq_core.planning.settings import Formats, Settings

MADE = "m-NF16.nfq.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a model, its container and an empty folder."""
    save_file(SMALL_MODEL, tmp_path / "m.safetensors")
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.nfq.safetensors")
    write_article_file(tmp_path / "article.safetensors", SMALL_MODEL, 16, 32)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUANTIZED = {
    None: MADE,
    "out": "out.nfq.safetensors",
    "out.nfq.safetensors": "out.nfq.safetensors",
    "OUT.NFQ.Safetensors": "OUT.NFQ.Safetensors",
    "sdxl_v1.0": "sdxl_v1.0.nfq.safetensors",
    "sdxl_v1.0-NF16": "sdxl_v1.0-NF16.nfq.safetensors",
    ".hidden": ".hidden.nfq.safetensors",
    "a b ü": "a b ü.nfq.safetensors",
    "sub": f"sub/{MADE}",
    "sub/": f"sub/{MADE}",
    ".": MADE,
    "sub/x": "sub/x.nfq.safetensors",
}


@pytest.mark.parametrize("given", QUANTIZED)
def test_quantize(folder, capsys, given):
    result = as_json(capsys, "quantize", "m.safetensors", *([] if given is None else [given]), "--levels", 16)
    assert Path(result["target"]) == Path(QUANTIZED[given])
    assert as_json(capsys, "verify", QUANTIZED[given])["ok"]


def test_a_name_that_begins_with_a_dash(folder, capsys):
    code, _, error = run(capsys, "quantize", "--levels", 16, "--", "m.safetensors", "-x")
    assert (code, error) == (0, "")
    assert run(capsys, "verify", "--", "-x.nfq.safetensors")[0] == 0


def test_the_source_is_written_beside_wherever_it_is(folder, capsys):
    os.rename("m.safetensors", "sub/m.safetensors")
    assert as_json(capsys, "quantize", "sub/m.safetensors", "--levels", 12)["target"] == str(
        Path("sub/m-NF12.nfq.safetensors")
    )
    code, _, error = run(capsys, "quantize", "sub/m.safetensors", "--levels", 12)
    assert code == 1
    assert "m-NF12.nfq.safetensors exists already; --force overwrites it" in one_line(error)


WRONG = {
    ("quantize", "m.safetensors", "out.safetensors"): "call it out.nfq.safetensors",
    ("quantize", "m.safetensors", "out.nfq"): "call it out.nfq.safetensors",
    ("quantize", "m.safetensors", "out.ckpt"): "call it out.nfq.safetensors",
    ("quantize", "m.safetensors", "out.SFT"): "call it out.nfq.safetensors",
    ("quantize", "m.safetensors", "out.txt"): "call it out.txt.nfq.safetensors",
    ("quantize", "m.safetensors", "sub/out.gguf"): "call it out.nfq.safetensors",
    ("quantize", "m.safetensors", ""): "DST is empty",
    ("quantize", "m.safetensors", "no/"): "no: no such folder; create it first",
    ("quantize", "m.safetensors", "no/out"): "no: no such folder; create it first",
    ("quantize", "m.safetensors", "q.nfq.safetensors/"): "q.nfq.safetensors is a file, not a folder",
    ("import-article", "article.safetensors", "out.safetensors"): "call it out.nfq.safetensors",
    ("dequantize", "q.nfq.safetensors", "out.nfq.safetensors"): "call it out.safetensors",
    ("dequantize", "q.nfq.safetensors", "out.nfq"): "call it out.safetensors",
    ("dequantize", "q.nfq.safetensors", "out.ckpt"): "call it out.safetensors",
    ("dequantize", "q.nfq.safetensors", "out.pt"): "call it out.safetensors",
    ("dequantize", "q.nfq.safetensors", "out.bin"): "call it out.safetensors",
    ("dequantize", "q.nfq.safetensors", "no/out"): "no: no such folder; create it first",
    ("merge-calibrations", "a", "b", "out.ckpt"): "call it out.safetensors",
    ("merge-calibrations", "a", "b", "out.nfq.safetensors"): "call it out.safetensors",
    ("calibrate-demo", "out.pt"): "call it out.safetensors",
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.items(), ids=map(" ".join, WRONG))
def test_wrong_names(folder, capsys, arguments, words):
    before = sorted(folder.rglob("*"))
    code, out, error = run(capsys, *arguments, "--force")
    assert (code, out) == (1, "")
    assert words in one_line(error)
    assert sorted(folder.rglob("*")) == before


DENSE = {
    (): "q-fp16.safetensors",
    ("--dtype", "bf16"): "q-bf16.safetensors",
    ("out",): "out.safetensors",
    ("out.safetensors",): "out.safetensors",
    ("out.sft",): "out.sft",
    ("sub/",): "sub/q-fp16.safetensors",
    ("sub", "--dtype", "fp32"): "sub/q-fp32.safetensors",
}


@pytest.mark.parametrize("arguments", DENSE)
def test_dequantize(folder, capsys, arguments):
    result = as_json(capsys, "dequantize", "q.nfq.safetensors", *arguments)
    assert Path(result["target"]) == Path(DENSE[arguments])
    assert load_file(DENSE[arguments]).keys() == SMALL_MODEL.keys()


def test_import_into_a_folder(folder, capsys):
    assert Path(as_json(capsys, "import-article", "article.safetensors", "sub/")["target"]) == Path(
        "sub/article.nfq.safetensors"
    )


def test_the_dtype_of_most_weights_names_the_file(tmp_path):
    few, many = torch.ones(64, 64, dtype=torch.float32), torch.ones(128, 128, dtype=torch.bfloat16)
    save_file({"a.weight": many, "b.weight": many.clone(), "c.weight": few}, tmp_path / "m")
    quantize_file(tmp_path / "m", tmp_path / "x.nfq.safetensors")
    assert dense_name(tmp_path / "x.nfq.safetensors") == "x-bf16.safetensors"
    save_file({"a": torch.ones(3)}, tmp_path / "n")
    quantize_file(tmp_path / "n", tmp_path / "y")
    assert dense_name(tmp_path / "y") == "y-dense.safetensors"


@pytest.mark.parametrize("name", ["m.safetensors.index.json", "m.safetensors", "m.nfq.safetensors"])
def test_names_of_models(tmp_path, name):
    assert container_name(tmp_path / name, Settings(Formats.of(7))) == "m-NF7.nfq.safetensors"


def test_a_folder_is_called_by_its_model(tmp_path):
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    for source in (tmp_path / "pipe", tmp_path / "pipe" / "unet"):
        assert container_name(source, Settings()) == "pipe-balanced.nfq.safetensors"
    assert target_path(None, tmp_path / "pipe", "x") == tmp_path / "x"


def test_python_refuses_names_of_other_kinds(folder):
    for call in (
        lambda name: quantize_file("m.safetensors", name),
        lambda name: import_article("article.safetensors", name),
    ):
        for name in ("x.safetensors", "x.ckpt", "x.nfq"):
            with pytest.raises(NFQError, match=r"ends in .nfq.safetensors; call it x.nfq.safetensors"):
                call(name)
    for name in ("x.nfq.safetensors", "x.ckpt", "x.pt", "x.bin"):
        with pytest.raises(NFQError, match=r"ends in .safetensors; call it x.safetensors"):
            dequantize_file("q.nfq.safetensors", name)
    # Without an ending nothing is promised; Python writes to the very name that it is given.
    quantize_file("m.safetensors", "bare")
    refuse_name("bare", PLAIN_SUFFIX)
    assert os.path.exists("bare")
