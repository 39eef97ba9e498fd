"""What is no model is named for what it is, with what to do, wherever it is given."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import pytest
import torch
from commands import one_line, run
from safetensors.torch import save_file
from samples import SMALL_MODEL

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.errors import UnsupportedFileError
from nfq_core.files.container import NFQFile
from nfq_core.files.safetensors_io import SafetensorsFile

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 6938078334\n"
INDEX = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "m-00001-of-00002.safetensors"}}).encode()


def torch_saved(**options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(3)}}, buffer, **options)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("model.safetensors", b"\0" * 100)
    return buffer.getvalue()


PICKLED = ("a PyTorch pickle", "refused for safety; convert it first", "Save Checkpoint")

FOREIGN = {
    "Git LFS pointer": ("m.safetensors", LFS, ("a Git LFS pointer", "git lfs pull")),
    "web page": ("m.safetensors", b"<!DOCTYPE html>\n<html><head>", ("a web page", "download or copy the model again")),
    "web page after blanks": ("m.safetensors", b"\xef\xbb\xbf\r\n <html lang='en'>", ("a web page",)),
    "web page after a comment": ("m.safetensors", b"<!-- a\nb --><HTML>", ("a web page",)),
    "XML error": ("m.safetensors", b"<?xml version='1.0'?><Error>AccessDenied</Error>", ("a web page",)),
    "JSON": ("m.safetensors", b'{"error": "Invalid credentials"}', ("JSON", "a server's error")),
    "list in JSON": ("m.json", b' [1, 2, "three"]', ("JSON",)),
    "index by its name": (
        "m.safetensors.index.json",
        b'{"a": 1, "b": 2}',
        ("index of a sharded model", "nfq quantize"),
    ),
    "index by its text": ("m.safetensors", INDEX, ("index of a sharded model", "nfq quantize")),
    "pickle of torch": ("m.safetensors", torch_saved(), PICKLED),
    "old pickle of torch": ("m.safetensors", torch_saved(_use_new_zipfile_serialization=False), PICKLED),
    "pickle": ("m", pickle.dumps({"a": 1}, 4), PICKLED),
    "zip called a pickle": ("m.ckpt", b"PK\x03\x04" + bytes(60), PICKLED),
    "unknown bytes called a pickle": ("m.PT", b"\x17" * 60, PICKLED),
    "GGUF": ("m.gguf", b"GGUF\x03\0\0\0" + bytes(60), ("a GGUF file", "original model in safetensors")),
    "zip": ("m.safetensors", zipped(), ("a zip archive", "unpack it")),
    "7z": ("m.safetensors", b"7z\xbc\xaf\x27\x1c" + bytes(60), ("a 7z archive", "unpack it")),
    "gzip": ("m.safetensors", b"\x1f\x8b\x08" + bytes(60), ("a gzip archive", "unpack it")),
    "picture": ("m.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(60), ("a PNG picture",)),
    "empty": ("m.safetensors", b"", ("empty", "download or copy the model again")),
    "zeros": ("m.safetensors", bytes(9000), ("unfinished download", "download or copy the model again")),
    "few bytes": ("m.safetensors", b"abc", ("3 bytes long", "download or copy the model again")),
    "anything else": ("m.safetensors", b"\x17" * 60, ("it is damaged, or of another kind", "fetch it again")),
}


@pytest.mark.parametrize(("name", "data", "words"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    told = []
    for reader in (SafetensorsFile, NFQFile):
        with pytest.raises(UnsupportedFileError) as caught:
            reader(tmp_path / name)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert told[0].startswith(f"{tmp_path / name} is not a safetensors file: it ")
    assert all(word in told[0] for word in words)
    assert "\n" not in told[0]


def test_a_model_is_not_taken_for_something_else(tmp_path):
    """A header's length may begin like a pickle or an archive does."""
    for length in (0x0280, 0x8B1F, 0x5A37):
        text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        (tmp_path / "m").write_bytes(length.to_bytes(8, "little") + text.ljust(length) + b"!")
        with SafetensorsFile(tmp_path / "m") as file:
            assert file.read("a") == b"!"


def test_a_download_cut_short(tmp_path):
    save_file(SMALL_MODEL, tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m").write_bytes(whole[:size])
        with pytest.raises(Exception, match=rf"m is cut short: it has {size:,} bytes, .* fetch it again"):
            SafetensorsFile(tmp_path / "m")


PLACES = {
    "quantize": ["quantize", "BAD", "out"],
    "calibration": ["quantize", "model", "out", "--calibration", "BAD"],
    "info": ["info", "BAD"],
    "verify": ["verify", "BAD"],
    "compare, original": ["compare", "BAD", "nfq"],
    "compare": ["compare", "model", "BAD"],
    "dequantize": ["dequantize", "BAD", "out"],
    "import-article": ["import-article", "BAD", "out"],
    "report, original": ["report", "BAD", "nfq", "--out", "out"],
    "report": ["report", "model", "BAD", "--out", "out"],
    "card": ["card", "BAD"],
    "card, original": ["card", "nfq", "--original", "BAD"],
    "merge-calibrations": ["merge-calibrations", "BAD", "BAD", "out"],
    "batch": ["batch", "BAD", "--out", "out"],
}


@pytest.mark.parametrize("data", [LFS, torch_saved(), b""], ids=["pointer", "pickle", "empty"])
@pytest.mark.parametrize("arguments", PLACES.values(), ids=PLACES)
def test_every_command_says_the_same(tmp_path, capsys, arguments, data):
    save_file(SMALL_MODEL, tmp_path / "model")
    quantize_file(tmp_path / "model", tmp_path / "nfq")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    with pytest.raises(UnsupportedFileError) as caught:
        SafetensorsFile(bad)
    places = {name: tmp_path / name for name in ("model", "nfq", "out")} | {"BAD": bad}
    code, out, error = run(capsys, *[places.get(argument, argument) for argument in arguments])
    assert code == 1
    words = str(caught.value).removeprefix(f"{bad} ")
    assert words in (out if arguments[0] == "batch" else one_line(error))
