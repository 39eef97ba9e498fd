"""Loading and launching the CUDA kernels: the real code, with a stub of the driver and of NVRTC below it.

The stub runs the kernels on the CPU, so that these tests compare bits too.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_source import compiled, need
from samples import random_buffer

from nfq_core.packed import backends, cuda_decode, nvrtc, torch_decode
from nfq_core.packed.cuda_driver import Driver, DriverError, load_driver
from nfq_core.packed.formats import FORMATS, format_by_id
from nfq_core.packed.nvrtc import Nvrtc, NvrtcError

GPU, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
"""Devices that the stub knows as 0 and 1; torch keeps their tensors in the CPU's memory."""

STREAM = 7007


class Stub:
    """The stub library: its counters, and what shall fail."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.fail("", 0)

    def fail(self, function: str, result: int) -> None:
        (ctypes.c_char * 64).in_dll(self.library, "failing").value = function.encode()
        ctypes.c_int.in_dll(self.library, "failure").value = result

    def number(self, name: str) -> int:
        return ctypes.c_uint64.in_dll(self.library, name).value


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    need("-shared", "-fPIC")
    folder = tmp_path_factory.mktemp("stub")
    flags = ("-shared", "-fPIC")
    return {
        dtype: compiled(folder / f"{name}.so", dtype, "stub_cuda.h", *flags)
        for dtype, name in cuda_decode.OUTPUTS.items()
    }


@pytest.fixture
def stub(built, monkeypatch) -> Stub:
    """A machine with two GPUs of compute capability 8.6, whose kernels write fp16."""
    return use(built, monkeypatch, torch.float16)


def use(built, monkeypatch, dtype: torch.dtype) -> Stub:
    stub = Stub(built[dtype])
    forget()
    monkeypatch.setattr(cuda_decode, "load_driver", lambda: Driver(stub.library))
    monkeypatch.setattr(cuda_decode, "load_nvrtc", lambda: Nvrtc(stub.library))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device.index))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(backends, "_is_nvidia", lambda device: True)
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    monkeypatch.delenv("NFQ_BACKEND", raising=False)
    return stub


def forget() -> None:
    for cached in (backends._choose, backends._tested, backends._warn_once, cuda_decode._compiled):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_kept():
    yield
    forget()


def check(decode: backends.Decode, format_id: str, weights: int, dtype: torch.dtype = torch.float16) -> None:
    data, fmt = random_buffer(format_id, weights), format_by_id(format_id)
    expected, found = (torch.full((weights,), torch.nan, dtype=dtype) for _ in range(2))
    torch_decode.dequantize_into(expected, data, fmt)
    decode(found, data, fmt)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), format_id


@pytest.mark.parametrize("dtype", cuda_decode.OUTPUTS, ids=str)
def test_the_kernel_is_chosen_and_right(built, monkeypatch, caplog, dtype) -> None:
    stub = use(built, monkeypatch, dtype)
    decoder, words = cuda_decode.load(GPU, dtype)
    assert words == "compiled by NVRTC 12.4 for sm_86"
    before = stub.number("launches")
    for fmt in cuda_decode.kernel_formats():
        check(decoder.dequantize_into, fmt.id, 64 * 50, dtype)
    assert stub.number("launches") == before + len(cuda_decode.kernel_formats()), "one launch per weight"
    if dtype == torch.float16:
        backend = backends.backend_for(GPU)
        assert (backend.name, backend.reason) == ("cuda", f"one launch per weight, {words}")
        assert not caplog.records


def test_what_is_chosen_is_kept(stub, monkeypatch) -> None:
    backend = backends.backend_for(GPU)
    monkeypatch.setattr(cuda_decode, "load", lambda *_: pytest.fail("loaded again"))
    assert backends.backend_for(torch.device("cpu", 0)) is backend


def test_unaligned_tensors_and_odd_sizes_are_decoded_by_way_of_a_copy(stub) -> None:
    decoder, _ = cuda_decode.load(GPU, torch.float16)
    fmt = format_by_id("t3w8_b64")
    for weights, data_shift, out_shift in ((1000, 4, 0), (1000, 0, 1), (1001, 0, 0), (1003, 4, 3)):
        packed = random_buffer(fmt.id, weights)
        memory = torch.zeros(len(packed) + data_shift, dtype=torch.uint8)
        data = memory[data_shift:].copy_(packed)
        room = torch.full((weights + out_shift + 8,), 5.0, dtype=torch.float16)
        expected = torch.empty(weights, dtype=torch.float16)
        torch_decode.dequantize_into(expected, packed, fmt)
        decoder.dequantize_into(room[out_shift : out_shift + weights], data, fmt)
        assert torch.equal(room[out_shift : out_shift + weights], expected)
        assert (room[:out_shift] == 5).all() and (room[out_shift + weights :] == 5).all()


def test_each_device_has_its_own_context_and_stream(stub) -> None:
    for device in (GPU, SECOND):
        decoder, _ = cuda_decode.load(device, torch.float16)
        check(decoder.dequantize_into, "nf16_b64", 640)
        assert stub.number("launch_stream") == STREAM + device.index
        assert stub.number("launch_context") == 1000 + device.index


def test_a_thread_that_never_used_the_device_can_launch(stub) -> None:
    decoder, _ = cuda_decode.load(GPU, torch.float16)
    errors = []

    def work() -> None:
        try:
            check(decoder.dequantize_into, "nf16_b64", 640)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("function", "result", "reason"),
    [
        ("nvrtcCompileProgram", 6, "NVRTC 12.4 refuses the kernel for sm_86: decode.cu(7): error: unknown word"),
        ("nvrtcCreateProgram", 1, "NVRTC fails (NVRTC_ERROR_INTERNAL_ERROR)"),
        ("cuInit", 100, "cuInit of the NVIDIA driver fails (unknown error)"),
        ("cuModuleLoadData", 700, "cuModuleLoadData of the NVIDIA driver fails (CUDA_ERROR_ILLEGAL_ADDRESS)"),
        ("cuModuleGetFunction", 500, "cuModuleGetFunction of the NVIDIA driver fails (unknown error)"),
        ("cuLaunchKernel", 700, "cuLaunchKernel of the NVIDIA driver fails (CUDA_ERROR_ILLEGAL_ADDRESS)"),
    ],
)
def test_what_fails_before_the_choice_is_a_reason(stub, caplog, function, result, reason) -> None:
    stub.fail(function, result)
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        backend = backends.backend_for(GPU, dtype)
        assert (backend.name, backend.reason) == ("torch", reason)
        assert backend.dequantize_into is torch_decode.dequantize_into
    assert [reason in record.message for record in caplog.records] == [True]


def test_a_machine_without_nvrtc(stub, monkeypatch, caplog) -> None:
    def missing() -> Nvrtc:
        raise NvrtcError("NVRTC is not installed beside torch")

    monkeypatch.setattr(cuda_decode, "load_nvrtc", missing)
    for dtype in (torch.float16, torch.float32):
        backend = backends.backend_for(GPU, dtype)
        assert (backend.name, backend.reason) == ("torch", "NVRTC is not installed beside torch")
        check(backend.dequantize_into, "nf24_b64", 1001, dtype)
    (record,) = caplog.records
    assert record.getMessage().endswith("plain torch, which is slower: NVRTC is not installed beside torch")


def test_a_library_that_is_no_nvrtc(stub, monkeypatch) -> None:
    """A toolkit from before CUDA 11.1 lacks functions."""
    monkeypatch.setattr(cuda_decode, "load_nvrtc", lambda: Nvrtc(Without(stub.library, "nvrtcGetNumSupportedArchs")))
    reason = "the cuda kernel fails on this device (nvrtcGetNumSupportedArchs is missing)"
    assert backends.backend_for(GPU).reason == reason


class Without:
    """A library that lacks a function."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._library, self._name = library, name

    def __getattr__(self, name: str) -> object:
        if name == self._name:
            raise AttributeError(f"{name} is missing")
        return getattr(self._library, name)


def test_a_second_device_that_is_too_old(stub, monkeypatch, caplog) -> None:
    """It decodes in plain torch; the first one keeps its kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1) if device == SECOND else (8, 6))
    assert [backends.backend_for(device).name for device in (GPU, SECOND)] == ["cuda", "torch"]
    assert [record.args[0] for record in caplog.records] == [SECOND]


def test_a_device_too_old_for_nvrtc(stub, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    backend = backends.backend_for(GPU)
    reason = "NVRTC 12.4 compiles for compute capability 7.5 and newer, this device has 6.1"
    assert (backend.name, backend.reason) == ("torch", reason)


@pytest.mark.parametrize(("capability", "target"), [((8, 6), "sm_86"), ((8, 9), "compute_86"), ((12, 0), "compute_86")])
def test_a_device_newer_than_nvrtc_gets_ptx(stub, monkeypatch, capability, target) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert backends.backend_for(GPU).reason.endswith(target)


def test_the_test_of_a_kernel_needs_several_programs_of_every_format(stub) -> None:
    for fmt in cuda_decode.kernel_formats():
        assert cuda_decode.programs(fmt, backends.PROBE_WEIGHTS) > 1


def test_a_kernel_that_computes_wrong_weights_is_not_used(stub, monkeypatch) -> None:
    launch = Driver.launch

    def wrong(self, context, function, programs, threads, stream, arguments) -> None:
        launch(self, context, function, programs, threads, stream, arguments)
        # One bit of the last weight.
        last = arguments.out + 2 * (backends.PROBE_WEIGHTS - 1)
        ctypes.c_uint8.from_address(last).value ^= 1

    monkeypatch.setattr(Driver, "launch", wrong)
    backend = backends.backend_for(GPU)
    assert backend.name == "torch"
    assert backend.reason == "the cuda kernel computes wrong weights on this device (nf32_b64)"


def test_a_dtype_whose_kernel_is_wrong_is_cast_from_fp16(stub) -> None:
    """The stub's kernels write fp16 whatever was compiled."""
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        backend = backends.backend_for(GPU, dtype)
        assert backend.name == "cuda" and backend.reason.startswith(
            f"{name} is cast from fp16: the cuda kernel computes"
        )
        check(backend.dequantize_into, "nf24_b64", 1001, dtype)


def test_fp64_is_cast_from_fp16(stub) -> None:
    backend = backends.backend_for(GPU, torch.float64)
    assert backend.reason == "float64 is cast from fp16: the kernels write float16, bfloat16 and float32"
    check(backend.dequantize_into, "nf24_b64", 1001, torch.float64)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (2, torch.cuda.OutOfMemoryError, "CUDA out of memory"),
        (700, DriverError, "cuLaunchKernel of the NVIDIA driver fails \\(CUDA_ERROR_ILLEGAL_ADDRESS\\)"),
    ],
)
def test_what_fails_after_the_choice_raises(stub, result, error, message) -> None:
    backend = backends.backend_for(GPU)
    stub.fail("cuLaunchKernel", result)
    with pytest.raises(error, match=message):
        check(backend.dequantize_into, "nf16_b64", 640)
    # The context was left, as the next launch shows.
    stub.fail("", 0)
    check(backend.dequantize_into, "nf16_b64", 640)


def test_no_memory_for_the_test_says_nothing_about_the_kernel(stub) -> None:
    stub.fail("cuLaunchKernel", 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        backends.backend_for(GPU)
    stub.fail("", 0)
    assert backends.backend_for(GPU).name == "cuda"


def test_a_first_decode_in_a_graph_capture_is_refused(stub, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backends, "_is_cuda", lambda device: True)
    with pytest.raises(RuntimeError, match="once before you capture a CUDA graph"):
        backends.backend_for(GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backend = backends.backend_for(GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.backend_for(GPU) is backend


def test_the_source_has_a_kernel_for_every_format() -> None:
    text = cuda_decode.source(torch.float16)
    assert all((f"K({fmt.id}," in text) == fmt.has_kernel for fmt in FORMATS.values())


def test_the_parameter_is_laid_out_as_in_c() -> None:
    assert ctypes.sizeof(cuda_decode.Arguments) == 48 and cuda_decode.Arguments.weights.offset == 40


def fake_folder(monkeypatch, folder: Path, names: list[str], cuda: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no library")
    monkeypatch.setattr(nvrtc, "_folders", lambda: sorted({(folder / name).parent for name in names}))
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("cuda", "first", "last"),
    [
        ("12.8", "a/libnvrtc.so.12", "libnvrtc.so.12"),
        ("13.0", "b/libnvrtc.so.13", "libnvrtc.so.13"),
        ("11.8", "torch/libnvrtc-672ee683.so.11.2", "libnvrtc.so.11.2"),
        (None, None, "libnvrtc.so"),
    ],
)
def test_where_nvrtc_is_looked_for(monkeypatch, tmp_path, cuda, first, last) -> None:
    names = ["a/libnvrtc.so.12", "b/libnvrtc.so.13", "torch/libnvrtc-672ee683.so.11.2"]
    others = ["a/libnvrtc-builtins.so.12.8", "b/libnvrtc.alt.so.13", "b/libnvrtc-builtins.alt.so.13.0"]
    fake_folder(monkeypatch, tmp_path, names + others, cuda)
    monkeypatch.setattr(nvrtc.sys, "platform", "linux")
    found = list(nvrtc.candidates())
    assert found[-1] == last and set(found[:-1]) == {str(tmp_path / name) for name in names}
    assert first is None or found[0] == str(tmp_path / first)


@pytest.mark.parametrize(("cuda", "first"), [("12.8", "nvrtc64_120_0.dll"), ("13.0", "nvrtc64_130_0.dll")])
def test_where_nvrtc_is_looked_for_on_windows(monkeypatch, tmp_path, cuda, first) -> None:
    names = [
        "lib/nvrtc64_120_0.dll",
        "lib/nvrtc64_130_0.dll",
        "lib/nvrtc64_120_0.alt.dll",
        "lib/nvrtc-builtins64_128.dll",
    ]
    fake_folder(monkeypatch, tmp_path, names, cuda)
    monkeypatch.setattr(nvrtc.sys, "platform", "win32")
    found = list(nvrtc.candidates())
    assert found[0] == str(tmp_path / "lib" / first) and len(found) == 3 and found[-1] == first


@pytest.mark.parametrize(
    ("cuda", "file"),
    [
        ("12.8", "cuda_nvrtc/bin/nvrtc64_120_0.dll"),
        ("13.0", "cu13/bin/x86_64/nvrtc64_130_0.dll"),
        ("12.8", "cuda_nvrtc/lib/libnvrtc.so.12"),
        ("13.0", "cu13/lib/libnvrtc.so.13"),
    ],
)
def test_nvidias_packages_beside_torch(monkeypatch, tmp_path, cuda, file) -> None:
    """Where the packages nvidia-cuda-nvrtc and nvidia-cuda-nvrtc-cu12 have their files."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(b"no library")
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvrtc, "find_spec", lambda name: package if name == "nvidia" else None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc.sys, "platform", "win32" if file.endswith("dll") else "linux")
    assert next(nvrtc.candidates()) == str(tmp_path / file)


def test_nvrtc_that_cannot_be_loaded(monkeypatch, tmp_path) -> None:
    fake_folder(monkeypatch, tmp_path, ["lib/libnvrtc.so.99"], "99.0")
    with pytest.raises(NvrtcError, match=r"NVRTC cannot be loaded \(.*libnvrtc.so.99: "):
        nvrtc.load_nvrtc()
    monkeypatch.setattr(nvrtc, "_folders", lambda: [])
    with pytest.raises(NvrtcError, match="NVRTC is not installed beside torch"):
        nvrtc.load_nvrtc()


def test_a_missing_driver(monkeypatch) -> None:
    monkeypatch.setattr("nfq_core.packed.cuda_driver.LIBRARY", "libno-such-driver.so.1")
    load_driver.cache_clear()
    with pytest.raises(DriverError, match="the NVIDIA driver cannot be loaded"):
        load_driver()


def test_the_real_nvrtc_compiles_the_source() -> None:
    """Where one is installed: it needs no GPU."""
    try:
        library = nvrtc.load_nvrtc()
    except NvrtcError as error:
        pytest.skip(str(error))
    assert library.compile(cuda_decode.source(torch.float16), "sm_86").startswith(b"\x7fELF")
    newest = library.architectures()[-1]
    assert f".target sm_{newest}".encode() in library.compile(cuda_decode.source(torch.bfloat16), f"compute_{newest}")
    with pytest.raises(NvrtcError, match=r"refuses the kernel for sm_86: .*error"):
        library.compile("no program", "sm_86")
