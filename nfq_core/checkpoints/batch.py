"""Convert whole folders of models. You can interrupt a run at any time; the next one skips finished files."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from ..calibration.statistics import Calibration, recorded_settings
from ..errors import (
    DEBUG,
    AlreadyQuantizedError,
    CorruptFileError,
    DiskFullError,
    NFQError,
    TargetExistsError,
    UnsupportedFileError,
    internal_fault,
    printable,
    reason_of,
)
from ..files.atomic import named_errors, remove_leftovers
from ..files.container import NFQFile, source_name
from ..files.original import Original, part_refusal, sharded_model
from ..parallel import Progress, no_progress
from ..planning.policy import recorded_text_encoders
from ..planning.settings import DEFAULTS, Settings
from . import extras
from .convert import quantize_file
from .kinds import kind_of
from .library import ModelFile, find_models, target_for
from .memory import is_out_of_memory

log = logging.getLogger("nfq")


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
    settings: Settings = DEFAULTS,
    *,
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
    its SHA-256 decides. Concurrent runs into one folder are safe: targets that another process is writing are skipped.

    Args:
        folders: folders to search, with all subfolders.
        out: folder for the containers, see `library.target_for`.
        settings: see `quantize_file`, also for `device`, `calibration` and `drop_extras`.
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
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise NFQError(f"{out} is a file; name a folder for the results")
    rows = _plan(find_models(folders, out), out, settings, any_kind)
    recorded = recorded_settings(settings, calibration) | ({extras.SETTING: True} if drop_extras else {})
    waiting = [row for row in rows if row.result is Result.TO_CONVERT]
    done, total, stopped = 0, sum(row.original_bytes for row in waiting), ""
    if not dry_run:
        for row in waiting:
            row.set_result(Result.NOT_TRIED)
    try:
        for row in waiting:
            if not dry_run and remove_leftovers(row.target):
                row.set_result(Result.SKIPPED, "another process is writing its target")
            elif not _target_decides(row, settings, recorded, overwrite, rehash) and not dry_run:
                report = partial(_report_within_file, progress, done, total, row)
                _convert(row, settings, recorded, device, calibration, overwrite, report)
            done += row.original_bytes
            progress(done, total, row.source.name)
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
        row.set_result(Result.SKIPPED, "--any converts it too")


def _target_decides(row: Row, settings: Settings, recorded: dict, overwrite: bool, rehash: bool) -> bool:
    """Set a row's result from its existing target; False if there is none, or it is to be replaced."""
    try:
        if not row.target.exists():
            return False
        difference = _difference(row, settings, recorded, rehash)
        if not difference:
            row.file_bytes = row.target.stat().st_size
            row.set_result(Result.DONE)
        elif overwrite:
            return False
        else:
            row.set_result(Result.FAILED, f"{row.target} {difference}; --force replaces it")
    except NFQError as error:
        row.set_result(Result.FAILED, str(error))
    except OSError as error:
        row.set_result(Result.FAILED, reason_of(error))
    return True


def _report_within_file(progress: Progress, before: int, total: int, row: Row, part: int, whole: int, _: str) -> None:
    """Report the progress within one file as that of the run, scaled from its tensors' bytes to the file's."""
    progress(before + row.original_bytes * part // max(1, whole), total, row.source.name)


def _difference(row: Row, settings: Settings, recorded: dict, rehash: bool) -> str:
    """Why an existing target is not the one wanted; empty if it is."""
    try:
        with NFQFile(row.target) as file:
            facts = file.facts
    except (CorruptFileError, UnsupportedFileError):
        return "exists already and is not a valid NFQ file"
    with Original(row.source) as original:
        drops = extras.SETTING in recorded
        recorded = {name: value for name, value in recorded.items() if name != extras.SETTING}
        entries, _ = extras.split_extras(original.entries, drops)
        recorded |= recorded_text_encoders(settings, entries) | extras.recorded_extras(drops, original.entries)
        if facts.settings != recorded:
            return "exists already, made with other settings"
        if facts.source.bytes != row.original_bytes:
            return "exists already, made from another file"
        sources = [file.path.stat() for file in original.files]
        # Renaming, copying and writing set one of the two times.
        touched = max(max(source.st_mtime_ns, source.st_ctime_ns) for source in sources)
        untouched = touched < row.target.stat().st_mtime_ns
        if untouched and facts.source.name == source_name(row.source) and not rehash:
            return ""
        return "" if original.sha256() == facts.source.sha256 else "exists already, made from another file"


def _convert(
    row: Row,
    settings: Settings,
    recorded: dict,
    device: str | None,
    calibration: Calibration | None,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Convert one file and set its row's result; only a full disk ends the run."""
    try:
        with named_errors(row.target):
            row.target.parent.mkdir(parents=True, exist_ok=True)
        result = quantize_file(
            row.source,
            row.target,
            settings,
            device=device,
            calibration=calibration,
            drop_extras=extras.SETTING in recorded,
            overwrite=overwrite,
            progress=progress,
        )
    except DiskFullError as error:
        row.set_result(Result.FAILED, str(error))
        raise
    except TargetExistsError as error:
        row.set_result(Result.FAILED, str(error))
        # Another process may have written it in the meantime.
        _target_decides(row, settings, recorded, overwrite, rehash=True)
    except NFQError as error:
        row.set_result(Result.FAILED, str(error))
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


def batch_lines(report: dict) -> list[str]:
    """The report of `convert_folders` as text lines: one per file, and one with the totals."""
    rows, totals = report["files"], report["totals"]
    width = max((len(row["source"]) for row in rows), default=0)
    texts = (f"{_spaced(row['result']):10}  {row['source']:{width}}  {_outcome(row)}".rstrip() for row in rows)
    lines = map(printable, texts)
    counts = ", ".join(f"{totals[result]} {_spaced(result)}" for result in Result if totals[result])
    if totals[Result.CONVERTED]:
        counts += f"; {_sizes(totals)} in {totals['seconds']:.1f} s"
    return [*lines, counts or "no model file found"]


def _spaced(result: str) -> str:
    return Result(result).value.replace("_", " ")


def _outcome(row: dict) -> str:
    """The text after a file's name."""
    if row["file_bytes"]:
        seconds = "" if row["seconds"] is None else f" in {row['seconds']:.1f} s"
        return f"{row['kind']}, {_sizes(row)}{seconds}"
    target = f"→ {row['target']}" if row["result"] == Result.TO_CONVERT else ""
    return ": ".join(filter(None, (row["kind"], row["reason"] or target)))


def _sizes(row: dict) -> str:
    before, after = row["original_bytes"], row["file_bytes"]
    return f"{before:,} → {after:,} bytes ({after / before:.0%})"
