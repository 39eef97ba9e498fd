"""Quantise a checkpoint for the page, on its own thread, with lines of progress, until it is done or stopped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..nfq_core import NFQError, Settings, TargetExistsError
from ..nfq_core.checkpoints.convert import quantize_file
from ..nfq_core.checkpoints.extras import DROP_HINT
from ..nfq_core.checkpoints.targets import MODEL_ENDINGS, complete_name, container_name
from ..nfq_core.parallel import fraction_done, seconds_left
from .loading import SUFFIX

DROP_EXTRAS = "Leave out extras"
"""The label of the check box."""

SECONDS = 0.5
"""Time between two lines of progress."""


class _Stopped(Exception):
    """Raised by the progress callback to end the work."""


def default_name(source: str, settings: Settings) -> str:
    """Name of a checkpoint's file, without its ending, if the user gives none."""
    return container_name(source, settings).removesuffix(SUFFIX)


def target_path(folder: str, name: str) -> str:
    """Path of the file `name`, whose ending may be missing, in the folder that the program lists.

    Raises:
        NFQError: the name is empty, leads out of the folder, or has the ending of another kind of model file.
    """
    name = name.strip().replace("\\", "/")
    if not name.lower().endswith(MODEL_ENDINGS):
        name += SUFFIX
    path = Path(os.path.abspath(os.path.join(folder, name)))
    stem = name.rpartition("/")[2].removesuffix(SUFFIX).strip(". ")
    if not stem or not path.is_relative_to(os.path.abspath(folder)):
        raise NFQError(f"{name!r} is not a file name in {folder}; enter one such as 'my-model-small'")
    return str(complete_name(path))


class Converter:
    """Quantises one checkpoint at a time; a second is refused while one is in progress."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the work at the next tensor; no partial file is left."""
        self._stop.set()

    def run(
        self, source: str, target: str, settings: Settings, overwrite: bool = False, drop_extras: bool = False
    ) -> Iterator[str]:
        """Quantise a file and yield lines of progress; the last one is the outcome.

        Args:
            source: the `.safetensors` checkpoint.
            target: the file to write, completely or not at all; missing folders are created.
            settings: size or levels, and effort.
            overwrite: whether an existing target may be replaced.
            drop_extras: whether tensors that no loader uses are left out.

        Raises:
            NFQError: the source cannot be quantised, the target exists or cannot be written, or another file is in
                progress.
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
            # Closing this generator, as a closed page does, ends the work too.
            self._stop.set()
            thread.join()
        yield _outcome_message(outcome[0], target)


def _for_page(warning: str) -> str:
    """A warning of the core with the page's check box instead of the command's option."""
    return warning.replace(DROP_HINT, f"tick {DROP_EXTRAS!r} to leave them out")


def _outcome_message(outcome: dict | BaseException, target: str) -> str:
    """How the work ended; errors that a user cannot fix are raised."""
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
