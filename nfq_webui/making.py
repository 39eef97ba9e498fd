"""Quantising a checkpoint for the page: on a thread of its own, with lines of progress, to be stopped at any time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..nfq_core import NFQError, Settings, TargetExistsError
from ..nfq_core.checkpoints.convert import quantize_file
from ..nfq_core.checkpoints.extras import DROPPING
from ..nfq_core.parallel import fraction_done, seconds_left
from .loading import SUFFIX

DROP_EXTRAS = "Leave out extras"
"""The label of the check box."""

SECONDS = 0.5
"""Time between two lines of progress."""


class _Stopped(Exception):
    """Ends the work where its progress is reported."""


def default_name(source: str, levels: int) -> str:
    """The name that a checkpoint's file gets where the user gives none."""
    return f"{Path(source).stem}-NF{levels}"


def target_path(folder: str, name: str) -> str:
    """The path of the file called `name`, with or without its ending, in the folder that the program lists.

    Raises:
        NFQError: the name is empty or leads out of the folder.
    """
    name = name.strip().replace("\\", "/").removesuffix(".safetensors").removesuffix(".nfq")
    path = Path(os.path.abspath(os.path.join(folder, name + SUFFIX)))
    if not name.rpartition("/")[2].strip(". ") or not path.is_relative_to(os.path.abspath(folder)):
        raise NFQError(f"{name!r} is no name for a file in {folder}; give it one such as 'my-model-NF16'")
    return str(path)


class Making:
    """One file after another is made; a second is refused while the first is in work."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the work at the next tensor; nothing is left behind."""
        self._stop.set()

    def run(
        self, source: str, target: str, settings: Settings, overwrite: bool = False, drop_extras: bool = False
    ) -> Iterator[str]:
        """Quantise a file, yielding lines to be shown one after another; the last one says how it ended.

        Args:
            source: the `.safetensors` checkpoint.
            target: the file to write; folders on the way are made. It appears whole or not at all.
            settings: levels and effort.
            overwrite: whether an existing target may be replaced.
            drop_extras: whether tensors that no loader uses are left out.

        Raises:
            NFQError: the source is unfit, the target exists or cannot be written, or another file is in work.
        """
        if not self._busy.acquire(blocking=False):
            raise NFQError("another checkpoint is being quantised; wait for it, or stop it")
        try:
            self._stop.clear()
            yield from self._run(source, target, settings, {"overwrite": overwrite, "drop_extras": drop_extras})
        finally:
            self._busy.release()

    def _run(self, source: str, target: str, settings: Settings, options: dict[str, bool]) -> Iterator[str]:
        line, outcome, started = "reading", [], time.monotonic()

        def progress(done: int, total: int, name: str) -> None:
            nonlocal line
            if self._stop.is_set():
                raise _Stopped
            left = seconds_left(time.monotonic() - started, done, total)
            line = f"{fraction_done(done, total):.0%}{'' if left is None else f', {left:.0f} s left'}: {name}"

        def work() -> None:
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                outcome.append(quantize_file(source, target, settings, **options, progress=progress))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=work, name="nfq")
        thread.start()
        try:
            while thread.is_alive():
                yield line
                thread.join(SECONDS)
        finally:
            # Whoever asks for no more lines, such as a page that was closed, ends the work.
            self._stop.set()
            thread.join()
        yield _told(outcome[0], target)


def _for_page(warning: str) -> str:
    """A warning of the core, which names an option of the command, for the page, which has a check box."""
    return warning.replace(DROPPING, f"tick {DROP_EXTRAS!r} to leave them out")


def _told(outcome: dict | BaseException, target: str) -> str:
    """How the work ended, in words; what a user cannot have caused is raised."""
    if isinstance(outcome, _Stopped):
        return "stopped; nothing was written"
    if isinstance(outcome, TargetExistsError):
        raise NFQError(f"{target} exists already; choose another name, or tick Overwrite")
    if isinstance(outcome, OSError):
        raise NFQError(f"{target} cannot be written: {outcome.strerror}")
    if isinstance(outcome, BaseException):
        raise outcome
    before, after = outcome["original_bytes"] / 1e9, outcome["file_bytes"] / 1e9
    lines = [
        f"{target}: {before:.2f} GB → {after:.2f} GB in {outcome['seconds']:.0f} s",
        *map(_for_page, outcome["warnings"]),
    ]
    return "\n".join(lines)
