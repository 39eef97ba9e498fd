"""Staging buffers: few, used again, free when what they held has arrived. Only the last test needs CUDA itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from samples import random_half

from nfq_core import NFTensor, quantize
from nfq_core.staging import STAGING_BUFFERS, STAGING_BYTES, PlainTransfer, StagedTransfer, StagingPool, transfer_to

CPU = torch.device("cpu")
WEIGHT = quantize(random_half(64, 100))


class Delayed:
    """A copy that is done when it is waited for, as late as possible: whoever reuses memory too early spoils it."""

    def __init__(self, copies: list) -> None:
        self._copies = copies

    def synchronize(self) -> None:
        while self._copies:
            target, source = self._copies.pop(0)
            target.copy_(source)


class StandIn:
    """`Streams` whose results are plain memory, and which notes what is asked of it in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.copies: list = []

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.asked.append(f"pinned {nbytes}")
        return torch.empty(nbytes, dtype=torch.uint8)

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        self.asked.append(what)
        yield

    def allocating(self):
        return self._noted("allocating")

    def copying(self):
        return self._noted("copying")

    def arrival(self) -> Delayed:
        self.asked.append("arrival")
        return Delayed(self.copies)

    def join(self) -> None:
        self.asked.append("join")


def reads(value: NFTensor | torch.Tensor):
    """What a file does: put a tensor's bytes into the memory given, or into new memory."""

    def read(memory: torch.Tensor | None) -> NFTensor | torch.Tensor:
        data = value.data if isinstance(value, NFTensor) else value.view(-1).view(torch.uint8)
        place = torch.empty(data.numel(), dtype=torch.uint8) if memory is None else memory[: data.numel()]
        place.copy_(data)
        if isinstance(value, NFTensor):
            return NFTensor(place, value.format, value.shape, value.dtype)
        return place.view(value.dtype).view(value.shape)

    return read


def test_a_pool_makes_its_buffers_once_and_waits_for_their_copies():
    made, waited = [], []

    class Arrival:
        def synchronize(self) -> None:
            waited.append(True)

    pool = StagingPool(1, 10, lambda nbytes: made.append(nbytes) or torch.zeros(nbytes, dtype=torch.uint8))
    assert made == []
    for _ in range(3):
        with pool.borrow() as buffer:
            assert buffer.memory.numel() == 10
            buffer.arrival = Arrival()
    assert made == [10]
    assert len(waited) == 2


def test_no_more_buffers_are_out_than_there_are():
    pool = StagingPool(2, 1, lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    taken, may_end = threading.Semaphore(0), threading.Event()
    out, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal out, most
        with pool.borrow():
            with lock:
                out += 1
                most = max(most, out)
            taken.release()
            may_end.wait(10)
            with lock:
                out -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert taken.acquire(timeout=10) and taken.acquire(timeout=10)
    assert not taken.acquire(timeout=0.05)
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert (out, most) == (0, 2)


@pytest.mark.parametrize("where", ["make", "use"])
def test_an_error_gives_the_buffer_back(where):
    failing = True

    def make(nbytes: int) -> torch.Tensor:
        if failing and where == "make":
            raise RuntimeError("out of memory")
        return torch.zeros(nbytes, dtype=torch.uint8)

    pool = StagingPool(1, 1, make)
    with pytest.raises(RuntimeError, match="out of memory"), pool.borrow():
        raise RuntimeError("out of memory")
    failing = False
    with pool.borrow() as buffer:
        assert buffer.memory is not None


def test_results_are_allocated_and_copied_on_their_streams():
    streams = StandIn()
    transfer = StagedTransfer(CPU, False, WEIGHT.nbytes, 1, streams)
    found = transfer.bring(reads(WEIGHT), WEIGHT.nbytes)
    transfer.finish()
    assert streams.asked == [f"pinned {WEIGHT.nbytes}", "allocating", "copying", "arrival", "join"]
    assert (found.format, found.shape, found.dtype) == (WEIGHT.format, WEIGHT.shape, WEIGHT.dtype)
    assert torch.equal(found.data, WEIGHT.data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resident_weights_come_in_the_dtype_they_had(dtype):
    weight = quantize(random_half(64, 100).to(dtype))
    for transfer in (PlainTransfer(CPU, True), StagedTransfer(CPU, True, weight.nbytes, 1, StandIn())):
        found = transfer.bring(reads(weight), weight.nbytes)
        assert found.dtype == dtype
        assert torch.equal(found, weight.dequantize(dtype))


def test_results_do_not_share_the_staging_memory():
    values = [random_half(7, seed=seed) for seed in range(2 * STAGING_BUFFERS)]
    transfer = StagedTransfer(CPU, False, 14, 1, StandIn())
    found = [transfer.bring(reads(value), 14) for value in values]
    assert all(torch.equal(one, other) for one, other in zip(found, values, strict=True))


def test_a_buffer_is_not_written_to_before_its_copy_has_arrived(monkeypatch):
    """The stand-in copies nothing before it is waited for: a buffer used again too early would give later bytes."""
    streams = StandIn()
    values = [random_half(7, seed=seed) for seed in range(3 * STAGING_BUFFERS)]
    transfer = StagedTransfer(CPU, False, 14, 1, streams)
    with monkeypatch.context() as patched:
        copy = torch.Tensor.copy_

        def later(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return copy(target, source)
            streams.copies.append((target, source))
            return target

        patched.setattr(torch.Tensor, "copy_", later)
        found = [transfer.bring(reads(value), 14) for value in values]
    assert 0 < len(streams.copies) <= 2
    Delayed(streams.copies).synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, values, strict=True))


def test_what_does_not_fit_goes_through_memory_of_its_own(monkeypatch):
    monkeypatch.setattr("nfq_core.staging.STAGING_BYTES", WEIGHT.nbytes - 1)
    streams = StandIn()
    transfer = StagedTransfer(CPU, False, WEIGHT.nbytes, 1, streams)
    assert torch.equal(transfer.bring(reads(WEIGHT), WEIGHT.nbytes).data, WEIGHT.data)
    assert streams.asked == ["allocating", "copying"]


def test_pinned_memory_is_bounded():
    streams = StandIn()
    transfer = StagedTransfer(CPU, False, 1 << 40, 64, streams)
    buffers = [transfer._pool._free.get() for _ in range(STAGING_BUFFERS)]
    assert transfer._pool.nbytes == STAGING_BYTES
    assert transfer._pool._free.empty()
    assert len(buffers) == STAGING_BUFFERS


def test_devices_that_are_not_cuda_get_plain_copies():
    transfer = transfer_to(CPU, False, 100, 2)
    assert isinstance(transfer, PlainTransfer)
    value = random_half(3, 4)
    assert torch.equal(transfer.bring(reads(value), value.nbytes), value)
    transfer.finish()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, for its streams and pinned memory")
@pytest.mark.parametrize("resident", [False, True])
def test_on_a_cuda_device(resident):
    device = torch.device("cuda")
    weights = [quantize(random_half(640, 1000, seed=seed)) for seed in range(3 * STAGING_BUFFERS)]
    transfer = transfer_to(device, resident, weights[0].nbytes, 4)
    assert isinstance(transfer, StagedTransfer)
    found = [transfer.bring(reads(weight), weight.nbytes) for weight in weights]
    transfer.finish()
    for one, weight in zip(found, weights, strict=True):
        assert one.device.type == "cuda"
        dense = one if resident else one.dequantize()
        assert torch.equal(dense.cpu(), weight.dequantize())
