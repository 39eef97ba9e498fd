"""Finding model files below folders, and naming what becomes of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from systems import link, words

from nfq_core import Settings
from nfq_core.checkpoints.library import ModelFile, find_models, target_for
from nfq_core.checkpoints.targets import settings_tag
from nfq_core.errors import NFQError
from nfq_core.planning.settings import BitsPerWeight, FileSize, Formats


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def paths(folder: Path, *folders: Path, out: Path | None = None) -> list[str]:
    found = find_models(folders or [folder], out or folder / "absent")
    return [item.path.relative_to(folder).as_posix() for item in found]


def test_what_counts_as_a_model(tmp_path):
    make(tmp_path, "b.safetensors", "a.ckpt", "sub/deep/c.SafeTensors", "d.pt", "e.pth", "f.bin", "g.gguf")
    make(tmp_path, "m.safetensors.index.json")
    make(tmp_path, "readme.md", "._b.safetensors", ".git/x.safetensors", "h.part")
    found = list(find_models([tmp_path], tmp_path / "out"))
    assert [item.path.relative_to(tmp_path).as_posix() for item in found] == [
        "a.ckpt",
        "b.safetensors",
        "d.pt",
        "e.pth",
        "f.bin",
        "g.gguf",
        "m.safetensors.index.json",
        "sub/deep/c.SafeTensors",
    ]
    assert [bool(item.other_format) for item in found] == [True, False, True, True, True, True, False, False]


def test_several_folders_that_overlap(tmp_path):
    make(tmp_path, "a/x.safetensors", "b/y.safetensors")
    assert paths(tmp_path, tmp_path / "b", tmp_path, tmp_path / "a") == ["b/y.safetensors", "a/x.safetensors"]


def test_a_file_stands_for_itself(tmp_path):
    make(tmp_path, "a.safetensors", "b.safetensors")
    assert paths(tmp_path, tmp_path / "b.safetensors") == ["b.safetensors"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(NFQError, match="absent: no such folder"):
        list(find_models([tmp_path, tmp_path / "absent"], tmp_path))


def test_the_results_folder_inside_the_source(tmp_path):
    make(tmp_path, "a.safetensors", "out/b.safetensors")
    assert paths(tmp_path, out=tmp_path / "out") == ["a.safetensors"]
    assert paths(tmp_path, tmp_path, tmp_path / "out", out=tmp_path / "out") == ["a.safetensors", "out/b.safetensors"]
    assert paths(tmp_path, out=tmp_path) == ["a.safetensors", "out/b.safetensors"]


def test_links(tmp_path):
    make(tmp_path, "m/a.safetensors", "far/f.safetensors")
    link(tmp_path / "m" / "loop", tmp_path / "m")
    link(tmp_path / "m" / "to-far", tmp_path / "far")
    link(tmp_path / "m" / "again", tmp_path / "far")
    link(tmp_path / "m" / "b.safetensors", "a.safetensors")
    link(tmp_path / "m" / "c.safetensors", "nowhere")
    os.link(tmp_path / "m" / "a.safetensors", tmp_path / "m" / "d.safetensors")
    found = {item.path.name: item for item in find_models([tmp_path / "m"], tmp_path / "out")}
    assert list(found) == ["a.safetensors", "f.safetensors", "b.safetensors", "c.safetensors", "d.safetensors"]
    assert found["f.safetensors"].path.parent.name == "again"
    assert found["a.safetensors"].same_as is None
    assert found["b.safetensors"].same_as == found["d.safetensors"].same_as == tmp_path / "m" / "a.safetensors"
    reason = words(lambda: os.stat(tmp_path / "m" / "c.safetensors"))
    assert found["c.safetensors"].fault == f"it cannot be read: {reason}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    assert [item.fault for item in find_models([tmp_path], tmp_path / "out")] == ["it is not a regular file"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """Root reads everything, so the refusal is played."""
    make(tmp_path, "a.safetensors", "locked/b.safetensors", "z.safetensors")
    listed = os.listdir

    def refuse(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    found = [(item.path.name, item.fault) for item in find_models([tmp_path], tmp_path / "out")]
    locked = ("locked", "the folder cannot be read: Permission denied")
    assert found == [("a.safetensors", ""), locked, ("z.safetensors", "")]


TARGETS = {
    "a.safetensors": "a-balanced.nfq.safetensors",
    "sub/a.b.v1.0.SAFETENSORS": "sub/a.b.v1.0-balanced.nfq.safetensors",
    "pipe/unet/diffusion_pytorch_model.safetensors": "pipe-balanced.nfq.safetensors",
    "pipe/unet/diffusion_pytorch_model.fp16.safetensors": "pipe.fp16-balanced.nfq.safetensors",
    "x/pipe/vae/diffusion_pytorch_model.safetensors": "x/pipe/vae-balanced.nfq.safetensors",
    "x/pipe/unet/mine.safetensors": "x/pipe/unet/mine-balanced.nfq.safetensors",
    "hub/models--me--xl-1/snapshots/0123/unet/diffusion_pytorch_model.safetensors": "hub/xl-1-balanced.nfq.safetensors",
    "blobs/0a1b": "blobs/0a1b-balanced.nfq.safetensors",
    "diffusion_pytorch_model.safetensors": "models-balanced.nfq.safetensors",
    "unet/diffusion_pytorch_model.safetensors": "models-balanced.nfq.safetensors",
}


@pytest.mark.parametrize("source", TARGETS)
def test_names(source):
    root = Path("lib", "models")
    assert target_for(ModelFile(root / source, root), "out", Settings()) == Path("out", TARGETS[source])


def test_the_name_of_a_pipeline_whose_unet_folder_is_given():
    source = Path("lib", "pipe", "unet", "diffusion_pytorch_model.safetensors")
    assert target_for(ModelFile(source, source.parent), "out", Settings()) == Path(
        "out", "pipe-balanced.nfq.safetensors"
    )


TAGS = {
    "balanced": Settings(),
    "small": Settings.of(preset="small", effort="best"),
    "NF16": Settings(Formats()),
    "NF12": Settings(Formats.of(12)),
    "NF12-NF24": Settings(Formats.of(12, 24)),
    "T4W8": Settings(Formats.of(format="t4w8_b64")),
    "T4W8-T3W8": Settings(Formats.of(format="t4w8_b64", conv_format="t3w8_b64")),
    "3.4bpw": Settings(BitsPerWeight(3.4)),
    "1.2GB": Settings(FileSize(1200000000)),
}


@pytest.mark.parametrize("name", TAGS)
def test_tags(name):
    assert settings_tag(TAGS[name]) == name
