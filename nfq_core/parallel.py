"""A bounded thread pipeline: items start in order, results return in order, and the bytes in flight are limited."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

IN_FLIGHT_BYTES = 256 << 20
"""Bytes of tensors in flight in one pipeline."""

DEVICE_BYTES = 5 << 29
"""Memory limit for the temporaries of all threads on a device other than the CPU: 2.5 GiB."""

QUANTIZING_BYTES = 5 << 27
"""Most memory that the temporaries of one quantising thread take: 640 MiB.

A trellis search needs the most: `trellis.DEVICE_BYTES`, plus `quantizer.DEVICE_CHUNK_BLOCKS` blocks in fp32, divided by
a scale, and the errors of their states for the best scale, for another one and for the better of both.
"""

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the total bytes, and the name of the finished tensor."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def no_progress(done: int, total: int, name: str) -> None:
    """The progress callback that shows nothing."""


def fraction_done(done: int, total: int) -> float:
    """Fraction of the work that is done, 0 to 1; 1 if there is no work, such as only empty tensors."""
    return done / total if total else 1.0


def seconds_left(elapsed: float, done: int, total: int) -> float | None:
    """Estimate the seconds until `done` reaches `total`; None while `done` is 0.

    Args:
        elapsed: seconds spent so far.
        done: as for `Progress`.
        total: as for `Progress`.
    """
    if done >= total:
        return 0.0
    return elapsed * (total - done) / done if done else None


def default_threads() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(device: torch.device | str | None, worker_bytes: int = QUANTIZING_BYTES) -> int:
    """How many threads may work on a device while their temporaries stay within DEVICE_BYTES.

    Args:
        device: the device; None means the CPU, which has no limit.
        worker_bytes: bytes of temporaries per thread.
    """
    if device is None or torch.device(device).type == "cpu":
        return default_threads()
    return max(1, min(default_threads(), DEVICE_BYTES // worker_bytes))


class _SingleThreadedTorch:
    """Context that makes torch single-threaded, because the pipeline's threads already use every processor.

    torch counts its threads per thread, and a new thread begins with the number that was set last. So each thread with
    a pipeline returns to what was set before the first of the pipelines that overlap.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = 1
        self._here = threading.local()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = torch.get_num_threads()
            self._users += 1
        self._here.depth = getattr(self._here, "depth", 0) + 1
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        # A pipeline that is garbage may be closed by another thread than began it.
        self._here.depth = max(0, getattr(self._here, "depth", 0) - 1)
        with self._lock:
            self._users -= 1
            if not self._here.depth:
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
        work: called on a pool thread, where torch is single-threaded.
        items: consumed on the calling thread, only as fast as results are taken.
        size: size of an item, such as its bytes.
        max_in_flight: a new item is taken only while the total size in flight is below this.
        threads: number of threads; by default one per processor.
    """
    with _single_threaded_torch:
        pool = ThreadPoolExecutor(threads or default_threads(), initializer=torch.set_num_threads, initargs=(1,))
        pending: deque = deque()
        in_flight = 0
        future = None
        try:
            for item in items:
                item_size = size(item)
                pending.append((pool.submit(work, item), item_size))
                in_flight += item_size
                del item
                while pending and (in_flight >= max_in_flight or pending[0][0].done()):
                    future, item_size = pending.popleft()
                    in_flight -= item_size
                    yield future.result()
            while pending:
                future, _ = pending.popleft()
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # A traceback keeps this frame alive: drop the results, and the future that holds the error itself.
            pending.clear()
            future = None
