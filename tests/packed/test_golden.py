"""Golden files: files of every format id, written once, read back to the bit for ever.

A change that breaks one of these tests breaks files that people have: it needs a new format id or container version.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from golden.make import FOLDER, NAMES, OWN, paths
from independent_reader import Kept, common_levels, document, read

import nfq_core
from nfq_core.packed import layout
from nfq_core.packed.formats import FORMATS
from nfq_core.packed.scales import SCALE_MANTISSAS


def bits(values: np.ndarray) -> np.ndarray:
    """The bit patterns of fp16 values, so that -0 differs from 0."""
    assert values.dtype == np.float16
    return values.view(np.uint16)


def test_there_is_a_file_for_each_format_and_no_other():
    expected = {path.name for name in NAMES for path in paths(name)} | {"make.py"}
    assert {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"} == expected


@pytest.mark.parametrize("name", NAMES)
def test_golden_file_is_read_to_the_bit(name):
    container, values = paths(name)
    expected = np.load(values)
    assert expected.size % 64, "the last block should be short"
    tensors = nfq_core.load(container)
    assert sorted(tensors) == ["bias", "weight"]
    fmt = tensors["weight"].format
    assert fmt.id == name.removesuffix(OWN)
    assert bool(tensors["weight"].sections.coarse) == (name.endswith(OWN) or not fmt.has_common_levels)
    assert tensors["weight"].shape == expected.shape
    assert (bits(tensors["weight"].dequantize().numpy()) == bits(expected)).all()
    assert torch.equal(tensors["bias"], torch.tensor([0.5, -2.0, 0.0], dtype=torch.bfloat16))
    with nfq_core.NFQFile(container) as file:
        file.verify("weight")
        file.verify("bias")


@pytest.mark.parametrize("name", NAMES)
def test_a_second_implementation_reads_the_golden_file(name):
    container, values = paths(name)
    tensors = read(container)
    assert list(tensors) == ["bias", "weight"]
    assert (bits(tensors["weight"]) == bits(np.load(values))).all()
    assert tensors["bias"] == Kept("BF16", (3,), bytes.fromhex("003f 00c0 0000"))


def test_the_document_tells_of_every_format():
    formats, mantissas = document()
    assert formats.keys() == FORMATS.keys()
    assert tuple(mantissas) == SCALE_MANTISSAS


def test_the_document_lists_the_common_levels():
    tables = common_levels()
    assert tables.keys() == {fmt.id for fmt in FORMATS.values() if fmt.has_common_levels}
    for name, levels in tables.items():
        assert (bits(levels) == bits(layout.common_levels(name, torch.device("cpu")).numpy())).all()


def test_the_script_never_replaces_a_file():
    before = {path: path.read_bytes() for path in paths("nf16_b64")}
    result = subprocess.run([sys.executable, FOLDER / "make.py", "nf16_b64"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "never replaced: nf16_b64.nfq.safetensors, nf16_b64.npy" in result.stderr
    assert {path: path.read_bytes() for path in before} == before
