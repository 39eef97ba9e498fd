"""Safetensors files read without mapping them: what the library writes, and one malformed file per refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forging import plain
from safetensors.torch import save_file
from systems import WINDOWS, replaces_open_files

from nfq_core.errors import CorruptFileError, NFQError, UnsupportedFileError, printable
from nfq_core.files.safetensors_io import (
    COPY_BYTES,
    TORCH_DTYPES,
    Entry,
    SafetensorsFile,
    dtype_bytes,
    header_bytes,
    tensor_bytes,
    tensor_from_bytes,
)

GOOD = {"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}


def field(**changes: object) -> dict:
    return {"a": GOOD["a"] | changes}


def library_writes(dtype: torch.dtype) -> bool:
    """Whether the installed version of the library knows the dtype; older ones know fewer."""
    try:
        return bool(safetensors.torch.save({"a": torch.zeros(1, dtype=dtype)}))
    except KeyError:
        return False


def test_reads_what_the_library_writes(tmp_path):
    bits = torch.randint(0, 256, (1024,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensors = {
        name: (bits > 127 if dtype is torch.bool else bits.clone().view(dtype)).view(2, -1)
        for name, dtype in TORCH_DTYPES.items()
        if library_writes(dtype)
    }
    assert len(tensors) >= 12
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4, dtype=torch.int16)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ä": "b\n"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"ä": "b\n"}
        assert file.file_bytes == (tmp_path / "a.safetensors").stat().st_size
        assert file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = file.tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bytes(tensor_bytes(found)) == bytes(tensor_bytes(tensor)) == bytes(file.read(name))
            assert b"".join(map(bytes, file.read_chunks(name))) == file.read(name)


def test_copies_large_tensors_piece_by_piece(tmp_path):
    data = bytes(range(256)) * (COPY_BYTES // 256) + b"rest"
    (tmp_path / "a").write_bytes(plain(field(dtype="U8", shape=[len(data)], data_offsets=[0, len(data)]), data))
    with SafetensorsFile(tmp_path / "a") as file:
        pieces = [bytes(piece) for piece in file.read_chunks("a")]
    assert [len(piece) for piece in pieces] == [COPY_BYTES, 4]
    assert b"".join(pieces) == data


@replaces_open_files
def test_a_file_replaced_while_open_is_not_mixed_with_its_successor(tmp_path):
    (tmp_path / "a").write_bytes(plain(GOOD, b"x" * 12))
    (tmp_path / "b").write_bytes(plain(GOOD, b"y" * 12))
    with SafetensorsFile(tmp_path / "a") as file:
        (tmp_path / "b").replace(tmp_path / "a")
        assert file.read("a") == b"x" * 12


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(plain(GOOD, bytes(12)))
    with SafetensorsFile(tmp_path / "a") as file:
        (tmp_path / "a").write_bytes(plain(GOOD, bytes(3)))
        with pytest.raises(CorruptFileError, match="became shorter"):
            file.read("a")


def test_a_dtype_that_torch_lacks_can_be_copied_but_not_made_a_tensor(tmp_path):
    (tmp_path / "a").write_bytes(plain(field(dtype="F8_E3M4", shape=[4], data_offsets=[0, 4]), b"abcd"))
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.read("a") == b"abcd"
        with pytest.raises(UnsupportedFileError, match=r"'a' has dtype F8_E3M4, which torch lacks"):
            file.tensor("a")


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("F64", 8), ("BF16", 2), ("F8_E4M3", 1), ("BOOL", 1), ("C128", 16), ("U8", 1), ("F8_E5M2", 1), ("C64", 8)],
)
def test_sizes_of_dtypes(dtype, wanted):
    assert dtype_bytes(dtype) == wanted


@pytest.mark.parametrize("dtype", ["F4", "", "F", "F16x", "F8.5", "I0", "F-8", "F016", "²", "F٨", "F" + "9" * 5000])
def test_unknown_dtypes(dtype):
    with pytest.raises(UnsupportedFileError) as caught:
        dtype_bytes(dtype)
    assert str(caught.value) == printable(f"dtype {dtype!r} is unknown to this version; update the plugin")


def test_header_is_padded_and_prefixed():
    entries = {"a": Entry("F16", (2, 3), 0, 12)}
    text = header_bytes(entries, {"k": "v"})
    assert int.from_bytes(text[:8], "little") == len(text) - 8
    assert len(text) % 8 == 0
    assert json.loads(text[8:]) == {"__metadata__": {"k": "v"}} | GOOD
    assert len(header_bytes(entries, {}, 400)) == 400
    assert "__metadata__" not in json.loads(header_bytes(entries, {})[8:])


def test_bytes_and_tensors_are_inverse():
    tensor = torch.arange(6, dtype=torch.int16).view(2, 3)
    assert bytes(tensor_bytes(tensor.T)) == bytes([0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0])
    assert torch.equal(tensor_from_bytes(bytearray(tensor_bytes(tensor)), "I16", (2, 3)), tensor)


def test_a_file_that_changes_while_it_is_open(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(plain(GOOD, bytes(12)))
    with SafetensorsFile(path) as file:
        file.refuse_changed()
        os.utime(path, (1, 1))
        with pytest.raises(NFQError, match="a changed while it was read; nothing was written, try again"):
            file.refuse_changed()


def test_a_network_disk_that_renumbers_its_files(tmp_path, monkeypatch):
    """Its inodes and devices change while nobody touches the file; size and time still count."""
    path = tmp_path / "a"
    path.write_bytes(plain(GOOD, bytes(12)))
    real, size = os.stat, [0]

    def renumbered(*arguments: object, **named: object) -> os.stat_result:
        status = list(real(*arguments, **named))
        named = {name: getattr(real(*arguments), name) for name in ("st_mtime_ns", "st_atime_ns", "st_ctime_ns")}
        status[1:3] = [status[1] + 1, status[2] + 1]
        status[6] += size[0]
        return os.stat_result(status, named)

    with SafetensorsFile(path) as file:
        monkeypatch.setattr(os, "stat", renumbered)
        file.refuse_changed()
        size[0] = 1
        with pytest.raises(NFQError, match="changed while it was read"):
            file.refuse_changed()


@replaces_open_files
def test_a_file_that_is_replaced_or_removed_while_it_is_open(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(plain(GOOD, bytes(12)))
    with SafetensorsFile(path) as file:
        (tmp_path / "b").write_bytes(path.read_bytes())
        os.utime(tmp_path / "b", (1, 1))
        os.replace(tmp_path / "b", path)
        with pytest.raises(NFQError, match="changed while it was read"):
            file.refuse_changed()
    with SafetensorsFile(path) as file:
        path.unlink()
        file.refuse_changed()


def refusal(path, error):
    with pytest.raises(error) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert type(caught.value) is error
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent", NFQError)


def test_directory(tmp_path):
    assert "is a directory" in refusal(tmp_path, NFQError)


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(NFQError, match="cannot be opened"):
        SafetensorsFile(str(tmp_path / "a\0b"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    assert "is not a regular file" in refusal(tmp_path / "a", NFQError)


def test_a_file_that_may_not_be_looked_at(tmp_path, monkeypatch):
    """In a folder without permission even the question what it is fails; root may do everything, so it is played."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(os, "stat", refuse)
        message = refusal(tmp_path / "a", NFQError)
    assert "cannot be read (permission denied)" in message


def test_file_below_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert ("no such file" if WINDOWS else "cannot be opened") in refusal(tmp_path / "a" / "b", NFQError)


FOREIGN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "eight bytes": bytes(8),
    "text": b"hello, this is no model",
    "pickle": b"PK\x03\x04" + bytes(100),
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(100),
    "a header beyond the limit": (100_000_001).to_bytes(8, "little") + b"{",
    "a header that is a list": plain("[1,2]"),
    "an endless header": b"\xff" * 8 + b"{",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert "is not a safetensors file" in refusal(tmp_path / "a", UnsupportedFileError)


def test_metadata_of_nothing(tmp_path):
    """As some writers leave it: the library reads such a file, too."""
    (tmp_path / "a").write_bytes(plain({"__metadata__": None} | GOOD, bytes(12)))
    with SafetensorsFile(tmp_path / "a") as file:
        assert (file.metadata, file.tensor("a").shape) == ({}, (2, 3))
    with safetensors.safe_open(tmp_path / "a", "pt") as opened:
        assert not opened.metadata() and [*opened.keys()] == ["a"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (plain({"__metadata__": []}), "__metadata__ holds something other than text"),
        (plain({"__metadata__": 0}), "__metadata__ holds something other than text"),
        (plain('{"a":'), "it is not valid JSON from character 5 on"),
        (plain('{"a":{}}'), "tensor 'a' lacks dtype, shape or data_offsets"),
        (plain({"a": []}), "tensor 'a' lacks dtype, shape or data_offsets"),
        ((8).to_bytes(8, "little") + b'{"\xff\xfe":1}', "it is not UTF-8 text"),
        (plain('{"a":' + "[" * 100_000), "it is nested too deep"),
    ],
)
def test_damage_is_told_in_words(tmp_path, data, words):
    (tmp_path / "a").write_bytes(data)
    told = refusal(tmp_path / "a", CorruptFileError)
    assert f"its header is damaged ({words}" in told and not re.search("object has|codec|NoneType|char ", told)


DAMAGED = {
    "cut in the header": (plain(GOOD, bytes(12))[:30], "is cut short: it has 30 bytes"),
    "cut in the data": (plain(GOOD, bytes(11)), "is cut short"),
    "a byte more": (plain(GOOD, bytes(13)), "1 bytes more than its header describes"),
    "no JSON": (plain('{"a":'), "its header is damaged"),
    "no UTF-8": ((8).to_bytes(8, "little") + b'{"\xff\xfe":1}', "its header is damaged"),
    "a name half of a surrogate pair": (plain('{"\\ud800":' + json.dumps(GOOD["a"]) + "}", bytes(12)), "damaged"),
    "metadata half of a surrogate pair": (plain('{"__metadata__":{"a":"\\udcff"}}'), "damaged"),
    "JSON nested without end": (plain('{"a":' + "[" * 100_000), "its header is damaged"),
    "a duplicate tensor": (
        plain(f'{{"a":{json.dumps(GOOD["a"])},"a":{json.dumps(GOOD["a"])}}}'),
        "a name occurs twice",
    ),
    "a duplicate field": (plain('{"a":{"dtype":"F16","dtype":"F16","shape":[],"data_offsets":[0,2]}}'), "twice"),
    "metadata that is no text": (plain({"__metadata__": {"a": 1}}), "something other than text"),
    "metadata that is no object": (plain({"__metadata__": []}), "damaged"),
    "a tensor that is no object": (plain({"a": 1}), "damaged"),
    "no dtype": (plain({"a": {"shape": [1], "data_offsets": [0, 2]}}), "'a' lacks dtype"),
    "no offsets": (plain({"a": {"shape": [1], "dtype": "F16"}}), "'a' lacks"),
    "one offset": (plain(field(data_offsets=[0]), bytes(12)), "'a' has impossible sizes"),
    "a negative size": (plain(field(shape=[-2, -3]), bytes(12)), "impossible sizes"),
    "a fractional size": (plain(field(shape=[2.0, 3]), bytes(12)), "impossible sizes"),
    "a size that is true": (plain(field(shape=[True, 6]), bytes(12)), "impossible sizes"),
    "an infinite size": (
        plain('{"a":{"dtype":"F16","shape":[Infinity],"data_offsets":[0,2]}}'),
        "Infinity is not a JSON number",
    ),
    "a size beyond all floats": (
        plain('{"a":{"dtype":"F16","shape":[1e999],"data_offsets":[0,2]}}'),
        "1e999 is out of the range of fp64",
    ),
    "a size beyond 63 bits": (plain(field(shape=[1 << 63, 0], data_offsets=[0, 0])), "impossible sizes"),
    "a size of many digits": (
        plain('{"a":{"dtype":"F16","shape":[' + "9" * 5000 + '],"data_offsets":[0,2]}}'),
        "damaged",
    ),
    "an overflow that would wrap to the right size": (
        plain(field(shape=[1 << 62, 16, 6], data_offsets=[0, 12]), bytes(12)),
        "needs more memory than there can be",
    ),
    "the wrong length": (plain(field(shape=[7]), bytes(12)), "'a' of F16 [7] does not fit its 12 bytes"),
    "reversed offsets": (plain(field(data_offsets=[12, 0]), bytes(12)), "does not fit its -12 bytes"),
    "a hole": (plain(field(data_offsets=[4, 16]), bytes(16)), "'a' starts at 4, expected 0"),
    "an overlap": (
        plain(GOOD | {"b": GOOD["a"] | {"data_offsets": [6, 18]}}, bytes(18)),
        "'b' starts at 6, expected 12",
    ),
}


@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path, data, reason):
    (tmp_path / "a").write_bytes(data)
    assert reason in refusal(tmp_path / "a", CorruptFileError)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F17", "F²"])
def test_a_dtype_that_this_version_lacks(tmp_path, dtype):
    (tmp_path / "a").write_bytes(plain(field(dtype=dtype), bytes(12)))
    told = refusal(tmp_path / "a", UnsupportedFileError)
    assert f"dtype '{dtype}' is unknown to this version; update the plugin" in told and "damaged" not in told


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch lacks F8_E8M0")
def test_scales_of_eight_bits(tmp_path):
    save_file({"a": torch.ones(4, dtype=torch.float8_e8m0fnu)}, tmp_path / "a")
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.tensor("a").dtype == torch.float8_e8m0fnu


def test_a_torch_without_wide_unsigned_integers_will_do() -> None:
    """Such as 2.1, which Automatic1111's web UI pins."""
    run = "import torch; del torch.uint16, torch.uint32, torch.uint64\n"
    run += "import nfq_core.files.safetensors_io as s; print(*s.TORCH_DTYPES)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", run], cwd=root, capture_output=True, text=True, check=True)
    assert {"U8", "F16"} <= {*result.stdout.split()} and "U64" not in result.stdout
