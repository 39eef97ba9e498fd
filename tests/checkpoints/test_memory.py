"""How much memory weights take, how much is free, and which of both forms is chosen."""

from __future__ import annotations

import pytest
import torch
from samples import SMALL_MODEL

import nfq_core
from nfq_core import NFQError, NFQFile
from nfq_core.checkpoints import memory
from nfq_core.checkpoints.convert import dequantize_file
from nfq_core.checkpoints.examine import verify_file
from nfq_core.checkpoints.memory import MODES, ROOM, choose_memory_mode, free_bytes, is_out_of_memory, needed_bytes


def test_auto_leaves_as_much_again_as_dense_weights_take():
    assert ROOM == 2
    assert choose_memory_mode("auto", 500, 130, 1000)[0] == "resident"
    assert choose_memory_mode("auto", 500, 130, 999)[0] == "packed"


def test_the_reason_has_the_figures():
    reason = choose_memory_mode("auto", 5_140_000_000, 1_400_000_000, 8_000_000_000)[1]
    assert reason == (
        "8.00 GB are free; dequantised weights need 5.14 GB and the same again for activations, packed weights 1.40 GB"
    )


def test_what_is_not_known_is_not_risked():
    assert choose_memory_mode("auto", 1, 1, None) == ("packed", "the free memory is unknown")


@pytest.mark.parametrize("free", [None, 0, 1 << 60])
@pytest.mark.parametrize("mode", ["packed", "resident"])
def test_a_mode_that_is_named_is_followed(mode, free):
    assert choose_memory_mode(mode, 500, 130, free) == (mode, "as requested")


def test_an_unknown_mode_is_refused():
    assert MODES == ("packed", "resident", "auto")
    with pytest.raises(ValueError, match="memory must be one of packed, resident, auto, got 'dense'"):
        choose_memory_mode("dense", 1, 1, 1)


def test_what_the_tensors_of_a_file_take(tmp_path):
    nfq_core.save(nfq_core.quantize_state_dict(SMALL_MODEL, levels=16), tmp_path / "a")
    with NFQFile(tmp_path / "a") as file:
        packed = nfq_core.load(tmp_path / "a")
        wanted = sum(tensor.nbytes for tensor in SMALL_MODEL.values()), sum(value.nbytes for value in packed.values())
        assert needed_bytes(file) == wanted
        # 6,400 weights in 100 blocks: a head of 32 bytes, 4 bits a weight, a byte a block, two more; the bias is kept.
        assert needed_bytes(file, ["linear.weight", "norm.bias"]) == (2 * 6400 + 14, 32 + 3200 + 102 + 14)
        assert needed_bytes(file, []) == (0, 0)


def test_free_memory_of_a_cpu_is_what_linux_calls_available(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert free_bytes("cpu") is None
    (tmp_path / "meminfo").write_text("MemTotal:       24000000 kB\nMemFree: 5 kB\nMemAvailable:   1234 kB\n")
    assert free_bytes("cpu") == 1234 * 1024
    (tmp_path / "meminfo").write_text("MemTotal:       24000000 kB\n")
    assert free_bytes("cpu") is None


def test_free_memory_of_a_cuda_device_includes_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_bytes("cuda") == 1400


def test_free_memory_of_other_devices_is_not_known():
    assert free_bytes("meta") is None


@pytest.mark.parametrize("read", [nfq_core.load, verify_file, lambda path: dequantize_file(path, path.parent / "b")])
def test_what_no_memory_holds_is_refused_before_it_is_read(tmp_path, monkeypatch, read):
    nfq_core.save(nfq_core.quantize_state_dict(SMALL_MODEL, levels=16), tmp_path / "a")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemAvailable:  1 kB\nSwapFree:  2 kB\n")
    with pytest.raises(NFQError, match=r"a: there is not enough memory: it needs [\d.]+ KB, 3\.1 KB are available"):
        read(tmp_path / "a")
    (tmp_path / "meminfo").write_text("MemAvailable:  1 kB\nSwapFree:  99 kB\n")
    read(tmp_path / "a")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_allocators(error, wanted):
    assert is_out_of_memory(error) == wanted


def test_the_error_of_the_cpu_allocator_is_one():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "xpu:99"])
def test_a_device_that_is_not_there_is_told_in_one_line(device: str) -> None:
    with pytest.raises(NFQError, match=rf"^device '{device}' cannot be used here; this machine has cpu[^\n]*$"):
        memory.check_device(device)
    memory.check_device("cpu", torch.float64)


def test_a_device_that_lacks_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_names", lambda: ["cpu", "mps"])

    def refuse(*_: object, dtype: torch.dtype, device: object) -> None:
        raise TypeError(f"Cannot convert a {device} Tensor to {dtype}\nmore")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(
        NFQError,
        match=r"^device 'mps' cannot compute in float64; choose another, such as",
    ):
        memory.check_device("mps", torch.float64)
