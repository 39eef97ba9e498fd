"""Bringing tensors to a device while others are still decoded.

CUDA copies from pinned memory while the processor goes on, from other memory it does not. So tensors are decoded into
a few pinned buffers that are used again and again, and copied from there on a stream of its own. A buffer is free again
when the copy out of it has arrived. Other devices get plain copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch

from .backends import choose
from .tensor import NFTensor

STAGING_BYTES = 64 << 20
"""The largest staging buffer; what does not fit is copied from memory of its own."""

STAGING_BUFFERS = 6
"""The most of them."""

Read = Callable[[torch.Tensor | None], NFTensor | torch.Tensor]
"""Makes a tensor in the memory given, 1-D uint8 and at least as long as it needs, or in memory of its own."""


class Arrival(Protocol):
    """The moment when a copy is done."""

    def synchronize(self) -> None:
        """Wait for it."""


class StagingBuffer:
    """Memory that a tensor is on its way through.

    Whoever holds it sets `arrival` once something is copied out of it; it is waited for before the next one gets it.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.arrival: Arrival | None = None


class StagingPool:
    """A fixed number of buffers, each made when it is first needed. Safe to use from several threads.

    Args:
        count: how many, at least 1.
        nbytes: bytes of each.
        make: makes the memory of one, 1-D uint8 of the length given.
    """

    def __init__(self, count: int, nbytes: int, make: Callable[[int], torch.Tensor]) -> None:
        self.nbytes = nbytes
        self._make = make
        # First in, first out: what has waited longest is likeliest to have arrived.
        self._free: SimpleQueue[StagingBuffer] = SimpleQueue()
        for _ in range(count):
            self._free.put(StagingBuffer())

    @contextmanager
    def borrow(self) -> Iterator[StagingBuffer]:
        """A buffer that nothing is copied from any more; waits until there is one, and gives it back in any case."""
        buffer = self._free.get()
        try:
            if buffer.arrival is not None:
                buffer.arrival.synchronize()
                buffer.arrival = None
            if buffer.memory is None:
                buffer.memory = self._make(self.nbytes)
            yield buffer
        finally:
            self._free.put(buffer)


class Streams(Protocol):
    """What staging asks of CUDA."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Pinned memory, 1-D uint8."""

    def allocating(self) -> AbstractContextManager[object]:
        """Where the results' memory is allocated: on the stream that they will be used on."""

    def copying(self) -> AbstractContextManager[object]:
        """Where it is copied to and decoded into, after what that stream was doing with it before."""

    def arrival(self) -> Arrival:
        """When all that was copied so far is done."""

    def join(self) -> None:
        """Have the results' stream wait for the copies."""


class CudaStreams:
    """`Streams` of a CUDA device: the caller's current stream, and one of its own."""

    def __init__(self, device: torch.device) -> None:
        self._caller = torch.cuda.current_stream(device)
        self._own = torch.cuda.Stream(device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See `Streams`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def allocating(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        return torch.cuda.stream(self._caller)

    def copying(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        self._own.wait_stream(self._caller)
        return torch.cuda.stream(self._own)

    def arrival(self) -> Arrival:
        """See `Streams`."""
        return self._own.record_event()

    def join(self) -> None:
        """See `Streams`."""
        self._caller.wait_stream(self._own)


class PlainTransfer:
    """Brings tensors to a device one after the other, waiting for each. Safe to use from several threads.

    Args:
        device: any.
        resident: whether packed weights are dequantised there, in the dtype they had.
    """

    def __init__(self, device: torch.device, resident: bool) -> None:
        self._device = device
        self._resident = resident

    def bring(self, read: Read, nbytes: int) -> NFTensor | torch.Tensor:
        """What `read` makes, on the device; `nbytes` is what it needs."""
        tensor = read(None).to(self._device)
        return tensor.dequantize(tensor.dtype) if self._resident and isinstance(tensor, NFTensor) else tensor

    def finish(self) -> None:
        """Have all results complete for whoever called; belongs behind the last `bring`, whatever came of it."""


class StagedTransfer:
    """Brings tensors to a device by way of staging buffers. Safe to use from several threads.

    Args:
        device: a CUDA device.
        resident: see `PlainTransfer`.
        largest: bytes of the largest tensor that is going to be brought.
        threads: how many threads are going to call `bring`.
        streams: `CudaStreams`, or what stands in for it.
    """

    def __init__(self, device: torch.device, resident: bool, largest: int, threads: int, streams: Streams) -> None:
        self._device = device
        self._resident = resident
        self._streams = streams
        # One more than threads: while one is copied from, all of them decode.
        count = min(threads + 1, STAGING_BUFFERS)
        self._pool = StagingPool(count, min(largest, STAGING_BYTES), streams.pinned)

    def bring(self, read: Read, nbytes: int) -> NFTensor | torch.Tensor:
        """See `PlainTransfer`; the result may be on its way until `finish`."""
        if nbytes > self._pool.nbytes:
            # Copies from memory that is not pinned are done when they return.
            return self._send(read(None), staged=False)
        with self._pool.borrow() as buffer:
            try:
                return self._send(read(buffer.memory), staged=True)
            finally:
                buffer.arrival = self._streams.arrival()

    def finish(self) -> None:
        """See `PlainTransfer`; what its caller does next on its stream comes after the copies."""
        self._streams.join()

    def _send(self, source: NFTensor | torch.Tensor, staged: bool) -> NFTensor | torch.Tensor:
        packed = isinstance(source, NFTensor)
        data = source.data if packed else source
        decoded = packed and self._resident
        with self._streams.allocating():
            shape, dtype = (source.shape, source.dtype) if decoded else (data.shape, data.dtype)
            out = torch.empty(shape, dtype=dtype, device=self._device)
        with self._streams.copying():
            if decoded:
                source.to(self._device, non_blocking=staged).dequantize(out=out)
            else:
                out.copy_(data, non_blocking=staged)
        return NFTensor(out, source.format, source.shape, source.dtype) if packed and not decoded else out


def transfer_to(device: torch.device, resident: bool, largest: int, threads: int) -> PlainTransfer | StagedTransfer:
    """What brings tensors to a device, from the calling thread's current stream's point of view."""
    if resident:
        # Tried once here, not by all threads at once.
        choose(device)
    if device.type != "cuda":
        return PlainTransfer(device, resident)
    return StagedTransfer(device, resident, largest, threads, CudaStreams(device))
