"""Every back-end gives the reference's bits; which one is taken is decided before the call, and says why."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
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
from nfq_core.packed import backends, triton_decode
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
        backends.via_fp16(triton_decode.dequantize_into)(out, data, fmt)
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
    caches = (backends._choose, backends._tested, backends._warn_once)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


CUDA, ROCM, XPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("xpu:0")


def stub_gpus(
    monkeypatch, fails: tuple[torch.dtype, ...] = (), triton: bool = True, failing: tuple[str, ...] = ("cuda", "triton")
) -> dict:
    """An NVIDIA, an AMD and an Intel GPU; kernels in `failing` fail with some dtypes; returns the decodes by name."""
    decodes = {"cuda": lambda *_: None, "triton": lambda *_: None}

    def tested(name: str, load, device: torch.device, dtype: torch.dtype):
        assert load is {"cuda": backends._load_cuda, "triton": backends._load_triton}[name]
        assert name == "triton" or device == CUDA
        failed = dtype in fails and name in failing
        return (None, f"{name} fails") if failed else (decodes[name], "one launch per weight")

    monkeypatch.setattr(backends, "_is_nvidia", lambda device: device == CUDA)
    monkeypatch.setattr(backends, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(backends, "_tested", tested)
    monkeypatch.delenv("NFQ_BACKEND", raising=False)
    return decodes


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("asks", ["", "torch"])
@pytest.mark.parametrize("fails", [(), (torch.float16,)])
@pytest.mark.parametrize("device", [CUDA, ROCM, XPU], ids=["nvidia", "amd", "intel"])
def test_what_is_taken_on_a_gpu(asked, monkeypatch, caplog, device, fails, asks, triton) -> None:
    decodes = stub_gpus(monkeypatch, fails, triton)
    monkeypatch.setenv("NFQ_BACKEND", asks)
    name = "cuda" if device == CUDA else "triton"
    obstacle = "requested by NFQ_BACKEND=torch" if asks else f"{name} fails" if fails else ""
    if device == CUDA and triton and fails and not asks:
        obstacle = "cuda fails; triton fails"
    if device != CUDA and not triton and not asks:
        obstacle = "Triton is not installed"
    backend = backends.backend_for(device)
    if obstacle:
        assert (backend.name, backend.reason) == ("torch", obstacle)
        assert backend.dequantize_into is torch_decode.dequantize_into
    else:
        assert (backend.name, backend.reason) == (name, "one launch per weight")
        assert backend.dequantize_into is decodes[name]
    backends.backend_for(device)
    backends.backend_for(device, torch.bfloat16)
    assert [obstacle in record.message for record in caplog.records] == [True] * bool(obstacle)


def test_an_nvidia_gpu_whose_cuda_kernel_fails_uses_triton(asked, monkeypatch, caplog, capsys) -> None:
    """For example where NVRTC is missing or broken: Triton brings its own compiler."""
    decodes = stub_gpus(monkeypatch, (torch.float16,), failing=("cuda",))
    for dtype in (torch.float16, torch.bfloat16):
        backend = backends.backend_for(CUDA, dtype)
        assert (backend.name, backend.reason) == ("triton", "one launch per weight; cuda fails")
        assert backend.dequantize_into is decodes["triton"]
    assert not caplog.records
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "cuda:0   triton  one launch per weight; cuda fails"


def test_a_kernel_is_logged_as_information(asked, monkeypatch, caplog) -> None:
    """The console of a host shows it, for users without the command."""
    stub_gpus(monkeypatch)
    with caplog.at_level(logging.INFO, "nfq"):
        for _ in range(2):
            backends.backend_for(CUDA)
    (record,) = caplog.records
    assert record.getMessage() == "weights on cuda:0 are decoded to float16 by the cuda kernel: one launch per weight"


def test_one_gpu_that_fails_leaves_the_others_alone(asked, monkeypatch, caplog) -> None:
    stub_gpus(monkeypatch, (torch.float16,), failing=("triton",))
    assert [backends.backend_for(device).name for device in (CUDA, ROCM, XPU)] == ["cuda", "torch", "torch"]
    assert [str(record.args[0]) for record in caplog.records] == [str(ROCM), str(XPU)]


def test_warming_up_chooses_in_a_thread_of_its_own(asked, monkeypatch) -> None:
    """The caller goes on at once; the first decode waits for the choice that has begun."""
    stub_gpus(monkeypatch)
    tested, compiling, seen = backends._tested, threading.Event(), []

    def slow(name: str, load, device: torch.device, dtype: torch.dtype):
        assert compiling.wait(10)
        seen.append((threading.current_thread().name, device, dtype))
        return tested(name, load, device, dtype)

    monkeypatch.setattr(backends, "_tested", slow)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    backends.warm_up(torch.device("cuda"), torch.bfloat16)
    compiling.set()
    for thread in threading.enumerate():
        if thread.name == "nfq warm-up":
            thread.join(10)
    assert backends.backend_for(CUDA, torch.bfloat16).name == "cuda"
    assert seen == [("nfq warm-up", CUDA, torch.float16), ("nfq warm-up", CUDA, torch.bfloat16)]


def test_warming_up_leaves_errors_to_the_first_decode(asked, monkeypatch, recwarn) -> None:
    def fails(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    stub_gpus(monkeypatch)
    monkeypatch.setattr(backends, "_tested", fails)
    backends.warm_up(CUDA, torch.float16)
    for thread in threading.enumerate():
        if thread.name == "nfq warm-up":
            thread.join(10)
    assert not recwarn
    with pytest.raises(torch.cuda.OutOfMemoryError):
        backends.backend_for(CUDA)


def test_warming_up_does_nothing_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(threading, "Thread", lambda **_: pytest.fail("a thread was started"))
    backends.warm_up(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_dtype_that_fails_is_cast_from_fp16(asked, monkeypatch, caplog, dtype) -> None:
    decodes = stub_gpus(monkeypatch, (dtype,))

    def decode(out: torch.Tensor, data: torch.Tensor, fmt) -> None:
        assert out.dtype == torch.float16
        torch_decode.dequantize_into(out, data, fmt)

    decodes["cuda"] = decode
    backend = backends.backend_for(CUDA, dtype)
    assert (backend.name, backend.reason) == ("cuda", f"{str(dtype)[6:]} is cast from fp16: cuda fails")
    tensor = quantize(torch.randn(64, 63))
    out = torch.empty(64, 63, dtype=dtype)
    place = out.data_ptr()
    backend.dequantize_into(out, tensor.data, tensor.format)
    assert torch.equal(out, tensor.dequantize(dtype)) and out.data_ptr() == place and not caplog.records


def test_a_device_without_a_number_is_the_current_one(asked, monkeypatch) -> None:
    stub_gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert backends.backend_for(torch.device("cuda")) is backends.backend_for(CUDA)


@pytest.mark.parametrize("fails", [(torch.bfloat16,), ()])
def test_the_command_tells_how_bf16_is_made(asked, monkeypatch, capsys, fails) -> None:
    stub_gpus(monkeypatch, fails)
    assert cli.main(["backends"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    reason = "; bfloat16 is cast from fp16: cuda fails" if fails else ""
    assert line == f"cuda:0   cuda    one launch per weight{reason}"


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
    # The interpreter is slow.
    code = "import torch\nfrom nfq_core.packed import backends as b\nb.PROBE_WEIGHTS = 64 * 40 + 8\n"
    code += "print(*b._tested('triton', b._load_triton, torch.device('cpu'), torch.float16))"
    told = run_apart(code, TRITON_INTERPRET=str(int(works)))
    assert told.endswith("one launch per weight" if works else ")")
    assert works or told.startswith("None the triton kernel fails on this device (")


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
