"""The second reader is one: it takes nothing from the core, and refuses what the document calls unsound."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import independent_reader
import pytest
from forging import forge, replaced
from golden.make import paths
from independent_reader import UnsoundError, read

SMALL = paths("nf16_b64")[0]


def test_it_needs_numpy_zstandard_and_the_standard_library_alone():
    tree = ast.parse(Path(independent_reader.__file__).read_text(encoding="utf-8"))
    named = [node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)]
    named += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in named} - sys.stdlib_module_names == {"numpy", "zstandard"}


def test_it_notices_every_changed_byte(tmp_path):
    data = SMALL.read_bytes()
    for position in range(len(data)):
        (tmp_path / "a").write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        # It refuses with whatever error comes: of JSON, of a missing field, of zstd, or its own.
        with pytest.raises(Exception):  # noqa: B017
            read(tmp_path / "a")


def test_a_sound_copy_is_read(tmp_path):
    wanted = read(SMALL)["weight"]
    for path in (
        forge(SMALL, tmp_path / "a", lambda header, facts: None),
        replaced(SMALL, tmp_path / "b", "weight", lambda frames: frames),
    ):
        assert (read(path)["weight"] == wanted).all()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda header, facts: facts | {"container_version": 2}, "container version"),
        (lambda header, facts: facts | {"kept": {}}, "names of the tensors"),
        (lambda header, facts: facts["kept"].update(bias="00000000"), "CRC-32 of bias"),
        (lambda header, facts: facts["quantized"]["weight"].update(shape=[24, 29, 2]), "number of frames|a frame's"),
        (lambda header, facts: facts["quantized"]["weight"].update(shape=[0]), "without elements"),
        (lambda header, facts: facts["quantized"]["weight"].update(shape=[1 << 62, 2]), "a shape's size"),
        (lambda header, facts: facts["quantized"]["weight"].update(dtype="I64"), "former dtype"),
        (lambda header, facts: header["nfq.weight"].update(dtype="I8"), "dtype of weight"),
        (lambda header, facts: header["bias"].update(data_offsets=[1, 7]), "holes or overlaps"),
    ],
)
def test_it_refuses_what_is_unsound(tmp_path, change, what):
    with pytest.raises(UnsoundError, match=what):
        read(forge(SMALL, tmp_path / "a", change))
