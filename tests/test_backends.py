"""Every back-end gives the reference's bits; which one is taken is decided before the call, and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nfq_core import backends, cli, kernels
from nfq_core.formats import FORMATS, format_by_id, scale_table
from nfq_core.quantizer import quantize

TESTS = Path(__file__).resolve().parent

INTERPRETED = """
import sys
import numpy as np
import torch
from nfq_core import triton_kernels
from nfq_core.formats import format_by_id
from reference import FORMAT_IDS, decode
from samples import random_buffer

dtypes = {torch.float16: np.uint16, torch.float32: np.uint32}
checked = 0
for format_id in FORMAT_IDS:
    fmt = format_by_id(format_id)
    for weights in (1, 63, 64, 65, 1000, 64 * 24 + 1, 64 * 32 * 3, 64 * 300 + 17):
        data = random_buffer(format_id, weights, seed=weights)
        wanted = decode(data.numpy(), format_id, weights)
        for dtype, bits in dtypes.items():
            out = torch.full((weights,), torch.nan, dtype=dtype)
            triton_kernels.dequantize_into(out, data, fmt)
            expected = torch.from_numpy(wanted).to(dtype).numpy()
            assert (out.numpy().view(bits) == expected.view(bits)).all(), (format_id, weights, dtype)
            checked += 1
    damaged = torch.full((fmt.packed_bytes(1000),), 255, dtype=torch.uint8)
    triton_kernels.dequantize_into(torch.empty(1000, dtype=torch.float16), damaged, fmt)
print(checked)
"""


def test_triton_equals_the_reference_bit_for_bit() -> None:
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed; it is for Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(FORMATS) * 8 * 2


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_damaged_buffer_decodes_to_something(format_id: str) -> None:
    """To wrong weights, never from beyond the table of levels."""
    fmt = format_by_id(format_id)
    data = torch.full((fmt.packed_bytes(1000),), 255, dtype=torch.uint8)
    levels = torch.arange(1, fmt.levels + 1).half()
    data[: 2 * fmt.levels] = levels.view(torch.uint8)
    if format_id.startswith("nf"):
        # Exponent 0, stride 1; the last scale code names about -2 ** (126 / 16).
        data[2 * fmt.levels : 2 * fmt.levels + 2] = torch.tensor([0, 1], dtype=torch.uint8)
        out = torch.empty(1000, dtype=torch.float16)
        kernels.dequantize_into(out, data, fmt)
        scale = scale_table(0, 1)[255]
        assert set((out / scale).round().tolist()) <= set(levels.tolist())


@pytest.fixture
def asked():
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("missing", "capability", "asks", "name", "reason"),
    [
        (False, (7, 5), "", "triton", "one launch"),
        (False, (6, 1), "", "torch", "Triton needs compute capability 7.0, this device has 6.1"),
        (True, (9, 0), "", "torch", "Triton is not installed"),
        (False, (9, 0), "torch", "torch", "NFQ_BACKEND=torch asks for it"),
    ],
)
def test_what_is_taken_on_a_gpu(asked, monkeypatch, caplog, missing, capability, asks, name, reason) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed; it is for Linux only")
    monkeypatch.setattr(backends, "find_spec", lambda _: None if missing else triton.__spec__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setenv("NFQ_BACKEND", asks)
    backend = backends.choose(CUDA)
    assert backend.name == name and reason in backend.reason
    backends.choose(CUDA)
    assert [reason in record.message for record in caplog.records] == [True] * (name == "torch")


def test_cpus_are_served_by_torch_and_nothing_is_logged(asked, caplog) -> None:
    assert backends.choose(torch.device("cpu")).name == "torch" and not caplog.records


def test_what_is_too_large_for_the_kernel_goes_to_torch(monkeypatch) -> None:
    taken = []

    def never(*_: object) -> None:
        taken.append("triton")

    monkeypatch.setattr(backends, "choose", lambda device: backends.Backend("triton", "", never))
    tensor = quantize(torch.randn(64, 64))
    tensor.dequantize()
    assert taken == ["triton"]
    monkeypatch.setattr(backends, "MAX_WEIGHTS", 64 * 64 - 1)
    assert torch.equal(tensor.dequantize().isfinite(), torch.ones(64, 64, dtype=bool)) and taken == ["triton"]


def test_the_command_tells(capsys, asked) -> None:
    assert cli.main(["backends", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cpu"] == {"backend": "torch", "reason": "plain torch serves cpu devices"}
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out.startswith("cpu      torch   plain torch")
