"""Claims: which of several processes, on one machine or on several that share a folder, works on a target.

A claim is a hidden file next to the target, `.NAME.1.claim`, which only one process can create. Its owner changes the
file's time every HEARTBEAT_SECONDS, and removes it when the work is done. To take over an abandoned claim, a process
creates the next number, which again only one can do. A claim is abandoned

- on its owner's machine: if nobody holds the file any more, see `atomic`;
- on other machines: if its time does not change while it is watched for STALE_SECONDS.

Machines need not share a clock or locks. In the worst case two processes do the same work: targets are written whole.
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from ..errors import printable
from .atomic import hold, is_held, named_errors, stem

HEARTBEAT_SECONDS = 20

STALE_SECONDS = 180
"""Longer than network file systems cache a file's time, which is a minute."""

HOLDING_SECONDS = 0.5
"""More than a process needs from creating a claim until it holds it."""

MAX_BYTES = 1000
"""Most bytes read of a claim."""


SOMEBODY = "another process"
"""An owner that is not known by name."""


class Claims:
    """The claims of one run. It remembers since when it has seen each claim of other machines unchanged."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, float]] = {}

    @contextmanager
    def claim(self, target: Path) -> Iterator[str]:
        """Context in which the target belongs to this process, unless another one has it.

        Yields:
            Who has it: empty if this process does, else the other one's machine and process id.

        Raises:
            NFQError: the claim cannot be written.
        """
        with named_errors(target):
            owner, number = self._newest(target)
            file = None if owner else _create(_path(target, number + 1))
        if file is None:
            yield owner or SOMEBODY
            return
        stopped = threading.Event()
        thread = threading.Thread(target=_beat, args=(_path(target, number + 1), stopped), daemon=True)
        thread.start()
        try:
            yield ""
        finally:
            stopped.set()
            thread.join()
            _remove(target, number + 1, file)

    def _newest(self, target: Path) -> tuple[str, int]:
        """Owner and number of the newest claim: no owner if it is abandoned, and number 0 if there is none."""
        number = max(_numbers(target), default=0)
        if not number:
            return "", 0
        path = _path(target, number)
        try:
            with open(path, "rb") as file:
                text = file.read(MAX_BYTES).decode("utf-8", "replace")
            changed = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            # Its owner has just ended; another process may be creating the first claim again.
            return SOMEBODY, number
        machine, process = _parse(text)
        if machine == platform.node() and not is_held(path):
            time.sleep(HOLDING_SECONDS)
            if not is_held(path):
                return "", number
        owner = f"process {process} on {machine}"
        now = time.monotonic()
        before, since = self._seen.get(path, (0, now))
        self._seen[path] = (changed, since if changed == before else now)
        return ("" if now - self._seen[path][1] > STALE_SECONDS else owner), number


def _path(target: Path, number: int) -> Path:
    return target.with_name(f".{stem(target.name)}.{number}.claim")


def _numbers(target: Path) -> list[int]:
    ours = re.compile(re.escape(f".{stem(target.name)}.") + r"([0-9]{1,9})\.claim")
    return [int(match[1]) for match in map(ours.fullmatch, os.listdir(target.parent)) if match]


def _create(path: Path) -> FileIO | None:
    """Create a claim, held and open; None if another process was faster."""
    try:
        file = open(path, "xb", buffering=0)  # noqa: SIM115
    except FileExistsError:
        return None
    hold(file)
    file.write(json.dumps({"machine": platform.node(), "process": os.getpid()}).encode())
    return file


def _parse(text: str) -> tuple[str, str]:
    """Machine and process of a claim; question marks where its owner was killed while it wrote."""
    try:
        claim = json.loads(text)
        return printable(str(claim["machine"]), 100), printable(str(claim["process"]), 20)
    except (ValueError, TypeError, KeyError, RecursionError):
        return "?", "?"


def _beat(path: Path, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        # A file server that is away for a moment must not end the work.
        with suppress(OSError):
            os.utime(path)


def _remove(target: Path, number: int, file: FileIO) -> None:
    """Remove the own claim and those that it took over."""
    # Windows cannot remove an open file.
    file.close()
    with suppress(OSError):
        for other in _numbers(target):
            if other <= number:
                _path(target, other).unlink(missing_ok=True)
