"""SHA-256 of a source while it is read for another purpose."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ..parallel import IN_FLIGHT_BYTES


class SourceHash:
    """Hashes a whole source on a thread of its own while the source is read in order; a context manager."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future, int]] = deque()
        self.complete = False
        """Whether everything was added; the reader sets it, and what it reads again is not added."""

    def __enter__(self) -> SourceHash:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, data: bytes | bytearray) -> None:
        """Add bytes that no longer change; waits while too many are not hashed yet."""
        if self.complete:
            return
        self._waiting.append((self._pool.submit(self._hash.update, data), len(data)))
        while sum(size for _, size in self._waiting) > IN_FLIGHT_BYTES:
            self._waiting.popleft()[0].result()

    def over(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """Add pieces that are valid only until the next one is asked for, and yield each."""
        for piece in pieces:
            if not self.complete:
                self._pool.submit(self._hash.update, piece).result()
            yield piece

    def consume(self, pieces: Iterator[memoryview]) -> None:
        """Add pieces that are used for nothing else."""
        for _ in self.over(pieces):
            pass

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._pool.submit(self._hash.hexdigest).result()
