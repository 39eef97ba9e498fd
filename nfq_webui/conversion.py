"""Quantise a checkpoint for the page, or estimate that, on a thread with lines of progress, until done or stopped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..nfq_core import NFQError, Settings, TargetExistsError
from ..nfq_core.checkpoints.convert import quantize_file
from ..nfq_core.checkpoints.dry_run import forecast_file, forecast_lines
from ..nfq_core.checkpoints.extras import DROP_HINT
from ..nfq_core.checkpoints.targets import MODEL_ENDINGS, complete_name, container_name
from ..nfq_core.errors import reason_of
from ..nfq_core.parallel import Progress, fraction_done, seconds_left
from ..nfq_core.sizes import size_in_words
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
    given = name = name.strip().replace("\\", "/")
    if not name.lower().endswith(MODEL_ENDINGS):
        name += SUFFIX
    path = Path(os.path.abspath(os.path.join(folder, name)))
    stem = name.rpartition("/")[2].removesuffix(SUFFIX).strip(". ")
    if not stem or not path.is_relative_to(os.path.abspath(folder)):
        raise NFQError(f"{given!r} is not a file name in {folder}; enter one such as 'my-model-small'")
    return str(complete_name(path))


class Converter:
    """Quantises one checkpoint at a time; a second is refused while one is in progress."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the work at the next tensor; no partial file is left."""
        self._stop.set()

    def estimate(self, source: str, target: str, settings: Settings, drop_extras: bool = False) -> Iterator[str]:
        """Estimate a file's size and the time that quantising takes, and yield lines; the last one is the outcome.

        Arguments and errors as for `run`. Nothing is written.
        """

        def work(progress: Progress) -> str:
            found = forecast_file(source, target, settings, drop_extras=drop_extras, progress=progress)
            return "\n".join([*forecast_lines(found), *map(_for_page, found["warnings"])])

        yield from self._alone(work, target)

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

        def work(progress: Progress) -> str:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            found = quantize_file(
                source, target, settings, drop_extras=drop_extras, overwrite=overwrite, progress=progress
            )
            before, after = size_in_words(found["original_bytes"]), size_in_words(found["file_bytes"])
            line = f"{target}: {before} → {after} in {found['seconds']:.0f} s"
            return "\n".join([line, *map(_for_page, found["warnings"])])

        yield from self._alone(work, target)

    def _alone(self, work: Callable[[Progress], str], target: str) -> Iterator[str]:
        """Work on a thread of its own, unless another work is in progress, and yield lines of progress."""
        if not self._busy.acquire(blocking=False):
            raise NFQError("another checkpoint is being quantised; wait for it, or stop it")
        try:
            self._stop.clear()
            yield from self._lines(work, target)
        finally:
            self._busy.release()

    def _lines(self, work: Callable[[Progress], str], target: str) -> Iterator[str]:
        line, outcome, started = "reading", [], time.monotonic()

        def progress(done: int, total: int, name: str) -> None:
            nonlocal line
            if self._stop.is_set():
                raise _Stopped
            left = seconds_left(time.monotonic() - started, done, total)
            line = f"{fraction_done(done, total):.0%}{'' if left is None else f', {left:.0f} s left'}: {name}"

        def run() -> None:
            try:
                outcome.append(work(progress))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, name="nfq")
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


def _outcome_message(outcome: str | BaseException, target: str) -> str:
    """How the work ended; errors that a user cannot fix are raised."""
    if isinstance(outcome, _Stopped):
        return "stopped; nothing was written"
    if isinstance(outcome, TargetExistsError):
        raise NFQError(f"{target} exists already; choose another name, or tick Overwrite")
    if isinstance(outcome, OSError):
        raise NFQError(f"{target} cannot be written: {reason_of(outcome)}")
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
