"""A bounded pipeline over threads: work starts in order, results come back in order, little is in flight at once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

IN_FLIGHT_BYTES = 256 << 20
"""Bytes of tensors that a pipeline works on at once."""

DEVICE_BYTES = 5 << 29
"""What the temporaries of all threads of a pipeline may take on a device other than the CPU, 2.5 GiB."""

QUANTIZING_BYTES = 5 << 27
"""What the temporaries of one of them take while it quantises, at most, 640 MiB.

Those of a trellis format's search are the largest: `trellis.DEVICE_BYTES`, and each of the blocks that
`quantizer.DEVICE_CHUNK_BLOCKS` says under each of six scales, in fp32.
"""

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all, and the name of the tensor that was finished."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def no_progress(done: int, total: int, name: str) -> None:
    """The progress callback that shows nothing."""


def fraction_done(done: int, total: int) -> float:
    """The part of the work that is done, from 0 to 1; 1 where there is nothing to do, such as empty tensors only."""
    return done / total if total else 1.0


def seconds_left(elapsed: float, done: int, total: int) -> float | None:
    """Estimate the seconds until `done` reaches `total`; None while nothing is done, such as after empty tensors.

    Args:
        elapsed: seconds that the work done so far took.
        done: see `Progress`.
        total: see `Progress`.
    """
    if done >= total:
        return 0.0
    return elapsed * (total - done) / done if done else None


def default_threads() -> int:
    """One thread for each processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(device: torch.device | str | None, worker_bytes: int = QUANTIZING_BYTES) -> int:
    """How many threads may work on a device, so that their temporaries take DEVICE_BYTES there at most.

    Args:
        device: the device; None: the CPU.
        worker_bytes: what the temporaries of one thread take.
    """
    if device is None or torch.device(device).type == "cpu":
        return default_threads()
    return max(1, min(default_threads(), DEVICE_BYTES // worker_bytes))


class _SingleThreadedTorch:
    """Has each torch call stay on its own thread: the pipelines' threads already use every processor.

    torch's setting is the process's; it is restored when the last of several pipelines at once ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = 1

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = torch.get_num_threads()
                torch.set_num_threads(1)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.set_num_threads(self._before)


_single_threaded_torch = _SingleThreadedTorch()


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    size: Callable[[Item], int],
    max_in_flight: int = IN_FLIGHT_BYTES,
    threads: int | None = None,
) -> Iterator[Result]:
    """Apply `work` to items on several threads and yield the results in order.

    Args:
        work: called on a thread of the pool; torch runs single-threaded there.
        items: drawn on the calling thread, only as fast as results leave.
        size: weight of an item, such as its bytes.
        max_in_flight: a new item is drawn only while the items in flight weigh less than this in sum.
        threads: number of threads; by default one per processor.
    """
    with _single_threaded_torch:
        pool = ThreadPoolExecutor(threads or default_threads(), initializer=torch.set_num_threads, initargs=(1,))
        pending: deque = deque()
        in_flight = 0
        future = None
        try:
            for item in items:
                weight = size(item)
                pending.append((pool.submit(work, item), weight))
                in_flight += weight
                del item
                while pending and (in_flight >= max_in_flight or pending[0][0].done()):
                    future, weight = pending.popleft()
                    in_flight -= weight
                    yield future.result()
            while pending:
                future, _ = pending.popleft()
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # An error's traceback keeps this frame, which then keeps no results, nor by its future the error itself.
            pending.clear()
            future = None
