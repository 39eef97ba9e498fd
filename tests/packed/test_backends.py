"""Every back-end gives the reference's bits; which one is taken is decided before the call, and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import COMMON_IDS

from nfq_core.cli import commands as cli
from nfq_core.fitting.quantizer import quantize
from nfq_core.packed import backends, torch_decode
from nfq_core.packed.article import ArticleFormat
from nfq_core.packed.formats import FORMATS, WRITABLE_IDS, format_by_id
from nfq_core.packed.scales import scale_table

TESTS = Path(__file__).resolve().parents[1]

INTERPRETED = """
import sys
import torch
from nfq_core.packed import triton_decode
from nfq_core.packed.formats import format_by_id
from independent_reader import common_levels
from reference import ARTICLE_IDS, COMMON_IDS, FORMAT_IDS, decode
from samples import random_buffer

# The interpreter, unlike the compiler, does not round to bf16.
bits = {torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
checked = 0
cases = [(id, None) for id in FORMAT_IDS if id not in ARTICLE_IDS] + [(id, common_levels()[id]) for id in COMMON_IDS]
for format_id, common in cases:
    fmt = format_by_id(format_id)
    for weights in (1, 63, 64, 65, 1000, 64 * 24 + 1, 64 * 32 * 3, 64 * 300 + 17):
        data = random_buffer(format_id, weights, seed=weights, own_levels=common is None)
        wanted = torch.from_numpy(decode(data.numpy(), format_id, weights, common))
        for dtype, integers in bits.items():
            out = torch.full((weights,), torch.nan, dtype=dtype)
            triton_decode.dequantize_into(out, data, fmt)
            assert torch.equal(out.view(integers), wanted.to(dtype).view(integers)), (format_id, weights, dtype)
            checked += 1
        # By way of fp16 torch rounds to bf16.
        out = torch.full((weights,), torch.nan, dtype=torch.bfloat16)
        place = out.data_ptr()
        triton_decode.dequantize_via_fp16(out, data, fmt)
        assert torch.equal(out.view(torch.int16), wanted.to(torch.bfloat16).view(torch.int16)), (format_id, weights)
        assert out.data_ptr() == place
        checked += 1
print(checked)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nfq_core.packed import triton_decode
from nfq_core.packed.formats import FORMATS

POINTERS = {"data": "*u8", "levels": "*fp16", "mantissas": "*i32"}
NUMBERS = ("weights", "groups", "coarse", "fine", "scales")

def compiled(fmt, out, capability):
    constants = triton_decode.constants(fmt)
    signature = {**POINTERS, "out": out, **dict.fromkeys(NUMBERS, "i32"), **dict.fromkeys(constants, "constexpr")}
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(ASTSource(triton_decode._decode, signature, constants), target=target)
    assert made.asm["cubin"]

for fmt in FORMATS.values():
    if fmt.has_kernel:
        compiled(fmt, "*fp16", 80)
for out in ("*bf16", "*fp32", "*fp64"):
    compiled(FORMATS["nf24_b64"], out, 80)
for capability in (70, 75, 89, 90):
    for out in ("*fp16", "*fp32", "*fp64"):
        compiled(FORMATS["nf32_b64"], out, capability)
print("compiled")
"""


def run_apart(code: str, **environment: str) -> str:
    """What code prints in a Python of its own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed; it is for Linux only")
    path = os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_triton_equals_the_reference_bit_for_bit() -> None:
    assert int(run_apart(INTERPRETED, TRITON_INTERPRET="1")) == (len(WRITABLE_IDS) + len(COMMON_IDS)) * 8 * 4


def test_triton_compiles_for_gpus(tmp_path: Path) -> None:
    """Without a GPU: the interpreter takes what the compiler refuses."""
    assert run_apart(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_damaged_buffer_decodes_to_something(format_id: str) -> None:
    """To wrong weights, never from beyond the table of levels, where other bytes follow."""
    fmt = format_by_id(format_id)
    data = torch.full((fmt.sections(1000).end,), 255, dtype=torch.uint8)
    levels = torch.arange(1, fmt.levels + 1).half()
    data[: 2 * fmt.levels] = levels.view(torch.uint8)
    scale = torch.tensor(1.0)
    if isinstance(fmt, ArticleFormat):
        fmt.split_scales(data, 1000)[0].copy_(scale)
    else:
        # Exponent 0, stride 1.
        data[-2:] = torch.tensor([0, 1], dtype=torch.uint8)
        scale = scale_table(0, 1)[255]
    out = torch.empty(1000, dtype=torch.float16)
    torch_decode.dequantize_into(out, data, fmt)
    assert set(out.tolist()) <= set((levels.float() * scale.float()).half().tolist())


@pytest.fixture
def asked():
    caches = (backends.backend_for, backends._without_triton)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("missing", "capability", "asks", "fails", "name", "reason"),
    [
        (False, (7, 5), "", "", "triton", "one launch"),
        (False, (6, 1), "", "", "torch", "Triton needs compute capability 7.0, this device has 6.1"),
        (True, (9, 0), "", "", "torch", "Triton is not installed"),
        (False, (9, 0), "torch", "", "torch", "requested by NFQ_BACKEND=torch"),
        (False, (9, 0), "", "no compiler", "torch", "no compiler"),
    ],
)
def test_what_is_taken_on_a_gpu(asked, monkeypatch, caplog, missing, capability, asks, fails, name, reason) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed; it is for Linux only")
    monkeypatch.setattr(backends, "find_spec", lambda _: None if missing else triton.__spec__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(backends, "_fails", lambda *_: fails)
    monkeypatch.setenv("NFQ_BACKEND", asks)
    backend = backends.backend_for(CUDA)
    assert backend.name == name and reason in backend.reason
    backends.backend_for(CUDA)
    assert [reason in record.message for record in caplog.records] == [True] * (name == "torch")


@pytest.mark.parametrize(
    ("capability", "dtype", "fails", "wanted"),
    [
        ((7, 5), torch.bfloat16, (), "dequantize_via_fp16"),
        ((7, 0), torch.bfloat16, (), "dequantize_via_fp16"),
        ((7, 5), torch.float16, (), "dequantize_into"),
        ((7, 5), torch.float32, (), "dequantize_into"),
        ((8, 0), torch.bfloat16, (), "dequantize_into"),
        # What fails although it should work is found before the call, too.
        ((9, 0), torch.bfloat16, (torch.bfloat16,), "dequantize_via_fp16"),
        ((9, 0), torch.float64, (torch.float64,), "torch"),
    ],
)
def test_what_is_taken_for_a_dtype(asked, monkeypatch, capability, dtype, fails, wanted) -> None:
    triton_decode = stub_gpu(monkeypatch, capability, fails)
    backend = backends.backend_for(CUDA, dtype)
    if wanted == "torch":
        assert backend.name == "torch" and backend.dequantize_into is torch_decode.dequantize_into
    else:
        assert backend.name == "triton" and backend.dequantize_into is getattr(triton_decode, wanted)


def stub_gpu(monkeypatch, capability: tuple[int, int], fails: tuple[torch.dtype, ...] = ()):
    """A CUDA device of a capability, on which Triton fails with some dtypes; returns the module of its kernels."""
    pytest.importorskip("triton", reason="Triton is not installed; it is for Linux only")
    from nfq_core.packed import triton_decode

    def probe(device: torch.device, dtype: torch.dtype = torch.float16) -> str:
        assert capability >= (8, 0) or dtype != torch.bfloat16, "what cannot work is not tried"
        return "Triton fails on this device" if dtype in fails else ""

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(backends, "_fails", probe)
    monkeypatch.delenv("NFQ_BACKEND", raising=False)
    return triton_decode


@pytest.mark.parametrize(("capability", "told"), [((7, 5), True), ((8, 0), False)])
def test_the_command_tells_how_bf16_is_made(asked, monkeypatch, capsys, capability, told) -> None:
    stub_gpu(monkeypatch, capability)
    assert cli.main(["backends"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("cuda:0   triton  one launch per weight")
    reason = "; bf16 is cast from fp16: Triton's bf16 needs compute capability 8.0, this device has 7.5"
    assert line.endswith(reason) == told and ("bf16" in line) == told


def test_the_output_s_dtype_is_what_is_asked_for(monkeypatch) -> None:
    asked = []

    def backend_for(device: torch.device, dtype: torch.dtype) -> backends.Backend:
        asked.append((device.type, dtype))
        return backends.Backend("torch", "", torch_decode.dequantize_into)

    monkeypatch.setattr(backends, "backend_for", backend_for)
    quantize(torch.randn(64, 64)).dequantize(torch.bfloat16)
    assert asked == [("cpu", torch.bfloat16)]


@pytest.mark.parametrize("works", [True, False])
def test_triton_is_tried_before_it_is_taken(works: bool) -> None:
    """In the interpreter; and without it, for then Triton has no driver for a CPU."""
    code = "import torch\nfrom nfq_core.packed import backends\nprint(backends._fails(torch.device('cpu')))"
    told = run_apart(code, TRITON_INTERPRET=str(int(works)))
    assert (told == "") if works else told.startswith("Triton fails on this device (")


def test_cpus_are_served_by_torch_and_nothing_is_logged(asked, caplog) -> None:
    assert backends.backend_for(torch.device("cpu")).name == "torch" and not caplog.records


def test_what_is_too_large_for_the_kernel_goes_to_torch(monkeypatch) -> None:
    taken = []

    def never(*_: object) -> None:
        taken.append("triton")

    monkeypatch.setattr(backends, "backend_for", lambda *_: backends.Backend("triton", "", never))
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
