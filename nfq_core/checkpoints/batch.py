"""Convert whole folders of models. You can interrupt a run at any time; the next one skips finished files."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from ..calibration.statistics import Calibration, recorded_settings
from ..errors import (
    ANY,
    DEBUG,
    OVERWRITE,
    AlreadyQuantizedError,
    CorruptFileError,
    DiskFullError,
    NFQError,
    TargetExistsError,
    UnsupportedFileError,
    internal_fault,
    reason_of,
)
from ..files.atomic import named_errors, remove_leftovers
from ..files.claims import Claims
from ..files.container import NFQFile, source_name
from ..files.original import Original, part_refusal, sharded_model
from ..parallel import Progress, no_progress
from ..planning.policy import recorded_text_encoders
from ..planning.settings import Settings
from . import extras
from .convert import quantize_file
from .kinds import kind_of
from .library import ModelFile, find_models, target_for
from .memory import is_out_of_memory

log = logging.getLogger("nfq")


POLL_SECONDS = 1
"""Pause before looking again at files that only other processes work on."""


class Result(str, Enum):
    """Outcome for one file; `TO_CONVERT` occurs in dry runs only."""

    CONVERTED = "converted"
    TO_CONVERT = "to_convert"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    NOT_TRIED = "not_tried"


@dataclass
class Row:
    """One file and its outcome."""

    source: Path
    target: Path | None = None
    kind: str = ""
    result: Result = Result.NOT_TRIED
    reason: str = ""
    original_bytes: int | None = None
    file_bytes: int | None = None
    seconds: float | None = None
    warnings: Sequence[str] = ()

    def set_result(self, result: Result, reason: str = "") -> None:
        """Store the outcome and its reason, on one line and without the source's name in front."""
        self.result = result
        self.reason = " ".join(reason.removeprefix(f"{self.source}: ").removeprefix(f"{self.source} ").split())

    def as_dict(self) -> dict:
        """The row as a JSON-ready dict."""
        texts = {"source": str(self.source), "target": self.target and str(self.target), "result": self.result.value}
        return asdict(self) | texts


def convert_folders(
    folders: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    settings: Settings | None = None,
    *,
    preset: str | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
    drop_extras: bool = False,
    any_kind: bool = False,
    overwrite: bool = False,
    rehash: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Convert every model in some folders that is not converted yet.

    A target is *done*, and skipped, if its header is valid and it was made with the same settings from the same source.
    The source is the same if its name and size are, and it was not modified after the target was written; if it was,
    its SHA-256 decides.

    Runs into one folder at the same time share the work, on one machine or on several: each claims a file before it
    converts it, see `claims`. A run ends when no file is left to convert: it waits for those of the other runs, and
    takes over those of a run that died. Targets that something else is writing are skipped.

    Args:
        folders: folders to search, with all subfolders.
        out: folder for the containers, see `library.target_for`.
        settings: see `quantize_file`, also for `preset`, `device`, `calibration` and `drop_extras`.
        any_kind: whether to convert files without a UNet of the SDXL family too, such as LoRAs and VAEs.
        overwrite: whether existing targets that are not done may be replaced.
        rehash: whether the SHA-256 always decides.
        dry_run: whether to report only, and write nothing.
        progress: see `Progress`; its name is the source's.

    Returns:
        `files` (for each file found: `source`, `target`, `kind`, `result`, `reason`, `original_bytes`, `file_bytes`,
        `seconds`, `warnings`), `totals` (the number of files per result, and `original_bytes`, `file_bytes` and
        `seconds` of those converted in this run) and `stopped`: why the run stopped early, else empty. A full disk and
        Ctrl-C stop it; finished files stay.

    Raises:
        NFQError: a folder is missing, or `out` is a file.
        ValueError: the preset is unknown, or given next to settings.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise NFQError(f"{out} is a file; name a folder for the results")
    settings = Settings.given(settings, preset)
    rows = _plan(find_models(folders, out), out, settings, any_kind)
    recorded = recorded_settings(settings, calibration) | ({extras.SETTING: True} if drop_extras else {})
    run = _Run(settings, recorded, device, calibration, overwrite, rehash)
    waiting = [row for row in rows if row.result is Result.TO_CONVERT]
    done, total, stopped = 0, sum(row.original_bytes for row in waiting), ""
    for row in () if dry_run else waiting:
        row.set_result(Result.NOT_TRIED)
    try:
        while waiting:
            held = []
            for row in waiting:
                if dry_run:
                    run.target_decides(row)
                elif not run.work_on(row, partial(_report_within_file, progress, done, total, row)):
                    held.append(row)
                    continue
                done += row.original_bytes
                progress(done, total, row.source.name)
            if len(held) == len(waiting):
                time.sleep(POLL_SECONDS)
            waiting = held
    except DiskFullError as error:
        stopped = str(error)
    except KeyboardInterrupt:
        stopped = "interrupted"
    return {"files": [row.as_dict() for row in rows], "totals": _totals(rows), "stopped": stopped}


def _plan(models: Iterable[ModelFile], out: str | os.PathLike, settings: Settings, any_kind: bool) -> list[Row]:
    """A row for each file; rows to convert have their targets."""
    rows: list[Row] = []
    # Compared without case, as some file systems do.
    taken: dict[str, Path] = {}
    for model in models:
        row = Row(model.path)
        rows.append(row)
        if model.fault:
            row.set_result(Result.FAILED, model.fault)
        elif model.same_as:
            row.set_result(Result.SKIPPED, f"it is the same file as {model.same_as}")
        elif model.other_format:
            row.set_result(Result.SKIPPED, f"it is {model.other_format}")
        elif sharded_model(model.path):
            row.set_result(Result.SKIPPED, part_refusal(model.path))
        else:
            _classify(row, any_kind)
        if row.result != Result.TO_CONVERT:
            continue
        row.target = target_for(model, out, settings)
        other = taken.setdefault(os.path.abspath(row.target).casefold(), row.source)
        if other is not row.source:
            row.set_result(Result.FAILED, f"{other} has the same target {row.target}; rename one of them")
    # Results of this run among the sources.
    targets = {os.path.abspath(row.target) for row in rows if row.target}
    return [row for row in rows if os.path.abspath(row.source) not in targets]


def _classify(row: Row, any_kind: bool) -> None:
    """Read what a file is, and set whether it is to be converted."""
    try:
        with Original(row.source) as file:
            row.original_bytes = file.file_bytes
            kind = kind_of(file)
    except AlreadyQuantizedError as error:
        row.set_result(Result.SKIPPED, str(error))
        return
    except NFQError as error:
        row.set_result(Result.FAILED, str(error))
        return
    except OSError as error:
        row.set_result(Result.FAILED, reason_of(error))
        return
    row.kind = kind.name
    if kind.obstacle:
        row.set_result(Result.SKIPPED, kind.obstacle)
    elif kind.is_family_unet or any_kind:
        row.set_result(Result.TO_CONVERT)
    else:
        row.set_result(Result.SKIPPED, f"{ANY} converts it too")


def _report_within_file(progress: Progress, before: int, total: int, row: Row, part: int, whole: int, _: str) -> None:
    """Report the progress within one file as that of the run, scaled from its tensors' bytes to the file's."""
    progress(before + row.original_bytes * part // max(1, whole), total, row.source.name)


class _Run:
    """What one run does to its files; see `convert_folders`. `recorded` are the settings as headers record them."""

    def __init__(
        self,
        settings: Settings,
        recorded: dict,
        device: str | None,
        calibration: Calibration | None,
        overwrite: bool,
        rehash: bool,
    ) -> None:
        self._settings = settings
        self._recorded = recorded
        self._device = device
        self._calibration = calibration
        self._overwrite = overwrite
        self._rehash = rehash
        self._claims = Claims()

    def work_on(self, row: Row, progress: Progress) -> bool:
        """Claim a row's target, convert its file unless that is done, and set its result.

        Returns:
            False if another process has claimed the target.
        """
        try:
            with named_errors(row.target):
                row.target.parent.mkdir(parents=True, exist_ok=True)
            with self._claims.claim(row.target) as owner:
                if owner:
                    row.set_result(Result.NOT_TRIED, f"{owner} is converting it")
                    return False
                if remove_leftovers(row.target):
                    row.set_result(Result.SKIPPED, "another process is writing its target")
                elif not self.target_decides(row):
                    self._convert(row, progress)
        except DiskFullError as error:
            row.set_result(Result.FAILED, str(error))
            raise
        except NFQError as error:
            # A folder that cannot be written may hold finished files.
            if not self.target_decides(row):
                row.set_result(Result.FAILED, str(error))
        return True

    def target_decides(self, row: Row) -> bool:
        """Set a row's result from its existing target; False if there is none, or it is to be replaced."""
        try:
            if not row.target.exists():
                return False
            difference = self._difference(row)
            if not difference:
                row.file_bytes = row.target.stat().st_size
                row.set_result(Result.DONE)
            elif self._overwrite:
                return False
            else:
                row.set_result(Result.FAILED, f"{row.target} {difference}; {OVERWRITE} replaces it")
        except NFQError as error:
            row.set_result(Result.FAILED, str(error))
        except OSError as error:
            row.set_result(Result.FAILED, reason_of(error))
        return True

    def _difference(self, row: Row) -> str:
        """Why an existing target is not the one wanted; empty if it is."""
        try:
            with NFQFile(row.target) as file:
                facts = file.facts
        except (CorruptFileError, UnsupportedFileError):
            return "exists already and is not a valid NFQ file"
        with Original(row.source) as original:
            drops = extras.SETTING in self._recorded
            recorded = {name: value for name, value in self._recorded.items() if name != extras.SETTING}
            entries, _ = extras.split_extras(original.entries, drops)
            recorded |= recorded_text_encoders(self._settings, entries)
            recorded |= extras.recorded_extras(drops, original.entries)
            if facts.settings != recorded:
                return "exists already, made with other settings"
            if facts.source.bytes != row.original_bytes:
                return "exists already, made from another file"
            sources = [file.path.stat() for file in original.files]
            # Renaming, copying and writing set one of the two times.
            touched = max(max(source.st_mtime_ns, source.st_ctime_ns) for source in sources)
            untouched = touched < row.target.stat().st_mtime_ns
            if untouched and facts.source.name == source_name(row.source) and not self._rehash:
                return ""
            return "" if original.sha256() == facts.source.sha256 else "exists already, made from another file"

    def _convert(self, row: Row, progress: Progress) -> None:
        """Convert one file and set its row's result; DiskFullError ends the run."""
        try:
            result = quantize_file(
                row.source,
                row.target,
                self._settings,
                device=self._device,
                calibration=self._calibration,
                drop_extras=extras.SETTING in self._recorded,
                overwrite=self._overwrite,
                progress=progress,
            )
        except DiskFullError:
            raise
        except NFQError as error:
            row.set_result(Result.FAILED, str(error))
            if isinstance(error, TargetExistsError):
                # Another process may have written it in the meantime.
                self.target_decides(row)
        except OSError as error:
            row.set_result(Result.FAILED, reason_of(error))
        except Exception as error:
            # A fault in one file must not end an overnight run.
            if os.environ.get(DEBUG):
                log.exception("%s", row.source)
            row.set_result(Result.FAILED, "not enough memory" if is_out_of_memory(error) else internal_fault(error))
        else:
            row.file_bytes, row.seconds, row.warnings = result["file_bytes"], result["seconds"], result["warnings"]
            row.set_result(Result.CONVERTED)


def _totals(rows: Sequence[Row]) -> dict:
    counts = Counter(row.result for row in rows)
    now = [row for row in rows if row.result is Result.CONVERTED]
    return {
        **{result.value: counts[result] for result in Result},
        "original_bytes": sum(row.original_bytes for row in now),
        "file_bytes": sum(row.file_bytes for row in now),
        "seconds": round(sum(row.seconds for row in now), 3),
    }
