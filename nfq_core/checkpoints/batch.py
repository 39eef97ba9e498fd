"""Converting whole folders of models, in a way that can be broken off and taken up again at any time."""

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
from ..planning.settings import DEFAULTS, Settings
from . import extras
from .convert import quantize_file
from .kinds import kind_of
from .library import Found, find_models, target_for
from .memory import is_out_of_memory

log = logging.getLogger("nfq")


class Result(str, Enum):
    """What became of a file; `TO_CONVERT` only where nothing is written."""

    CONVERTED = "converted"
    TO_CONVERT = "to_convert"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    NOT_TRIED = "not_tried"


@dataclass
class Row:
    """What became of one file."""

    source: Path
    target: Path | None = None
    kind: str = ""
    result: Result = Result.NOT_TRIED
    reason: str = ""
    original_bytes: int | None = None
    file_bytes: int | None = None
    seconds: float | None = None
    warnings: Sequence[str] = ()

    def settle(self, result: Result, reason: str = "") -> None:
        """Note what became of it, and why; the reason need not name the source again."""
        self.result = result
        self.reason = " ".join(reason.removeprefix(f"{self.source}: ").removeprefix(f"{self.source} ").split())

    def as_dict(self) -> dict:
        """The row for JSON."""
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
    """Convert every model below some folders that is not converted yet.

    A target is *done*, and left alone, when it is sound as far as its header tells, was made with these very settings,
    and from this very source: same name and size, and the source was not touched since the target was written; where
    it was, its SHA-256 decides. Two runs at once into one folder do not harm each other: a target that another process
    is writing is skipped.

    Args:
        folders: where to look, with all subfolders.
        out: where the containers go, see `library.target_for`.
        settings: as `quantize_file`, and so `device`, `calibration` and `drop_extras`.
        any_kind: whether files are converted that hold no UNet of the SDXL family: LoRAs, VAEs, anything.
        overwrite: whether an existing target that is not done may be replaced.
        rehash: whether SHA-256 decides always.
        dry_run: whether only to tell what would be done.
        progress: see `Progress`; it gets the source's name.

    Returns:
        `files` (for each file found: `source`, `target`, `kind`, `result`, `reason`, `original_bytes`, `file_bytes`,
        `seconds`, `warnings`), `totals` (the number of files with each result; `original_bytes`, `file_bytes` and
        `seconds` of those converted now) and `stopped`: why the rest was not tried, else empty. A full disk stops it,
        and so does Ctrl-C; what is finished stays.

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
            row.settle(Result.NOT_TRIED)
    try:
        for row in waiting:
            if not dry_run and remove_leftovers(row.target):
                row.settle(Result.SKIPPED, "another process is writing its target")
            elif not _settled(row, recorded, overwrite, rehash) and not dry_run:
                show = partial(_show_part, progress, done, total, row)
                _convert(row, settings, recorded, device, calibration, overwrite, show)
            done += row.original_bytes
            progress(done, total, row.source.name)
    except DiskFullError as error:
        stopped = str(error)
    except KeyboardInterrupt:
        stopped = "interrupted"
    return {"files": [row.as_dict() for row in rows], "totals": _totals(rows), "stopped": stopped}


def _plan(found: Iterable[Found], out: str | os.PathLike, settings: Settings, any_kind: bool) -> list[Row]:
    """A row for each file, those that are to be converted with their targets."""
    rows: list[Row] = []
    # Not every file system tells capitals from small letters.
    taken: dict[str, Path] = {}
    for item in found:
        row = Row(item.path)
        rows.append(row)
        if item.fault:
            row.settle(Result.FAILED, item.fault)
        elif item.same_as:
            row.settle(Result.SKIPPED, f"it is the same file as {item.same_as}")
        elif item.other_format:
            row.settle(Result.SKIPPED, f"it is {item.other_format}")
        elif sharded_model(item.path):
            row.settle(Result.SKIPPED, part_refusal(item.path))
        else:
            _recognise(row, any_kind)
        if row.result != Result.TO_CONVERT:
            continue
        row.target = target_for(item, out, settings)
        other = taken.setdefault(os.path.abspath(row.target).casefold(), row.source)
        if other is not row.source:
            row.settle(Result.FAILED, f"{other} already gets the name {row.target}; rename one of them")
    ours = {os.path.abspath(row.target) for row in rows if row.target}
    return [row for row in rows if os.path.abspath(row.source) not in ours]


def _recognise(row: Row, any_kind: bool) -> None:
    try:
        with Original(row.source) as file:
            row.original_bytes = file.file_bytes
            kind = kind_of(file)
    except AlreadyQuantizedError as error:
        row.settle(Result.SKIPPED, str(error))
        return
    except NFQError as error:
        row.settle(Result.FAILED, str(error))
        return
    except OSError as error:
        row.settle(Result.FAILED, reason_of(error))
        return
    row.kind = kind.name
    if kind.obstacle:
        row.settle(Result.SKIPPED, kind.obstacle)
    elif kind.is_family_unet or any_kind:
        row.settle(Result.TO_CONVERT)
    else:
        row.settle(Result.SKIPPED, "--any converts it too")


def _settled(row: Row, recorded: dict, overwrite: bool, rehash: bool) -> bool:
    """Settle a row whose target is there already, unless it is to be replaced; returns whether it is settled."""
    try:
        if not row.target.exists():
            return False
        difference = _difference(row, recorded, rehash)
        if not difference:
            row.file_bytes = row.target.stat().st_size
            row.settle(Result.DONE)
        elif overwrite:
            return False
        else:
            row.settle(Result.FAILED, f"{row.target} {difference}; --force replaces it")
    except NFQError as error:
        row.settle(Result.FAILED, str(error))
    except OSError as error:
        row.settle(Result.FAILED, reason_of(error))
    return True


def _show_part(progress: Progress, before: int, total: int, row: Row, part: int, whole: int, _: str) -> None:
    """Pass on the progress within one file as that within all; a file's tensors and its own bytes differ slightly."""
    progress(before + row.original_bytes * part // max(1, whole), total, row.source.name)


def _difference(row: Row, recorded: dict, rehash: bool) -> str:
    """What keeps an existing target from being the one wanted; empty where nothing does."""
    try:
        with NFQFile(row.target) as file:
            facts = file.facts
    except (CorruptFileError, UnsupportedFileError):
        return "exists already and is no sound file of ours"
    with Original(row.source) as original:
        drops = extras.SETTING in recorded
        recorded = {name: value for name, value in recorded.items() if name != extras.SETTING}
        recorded |= extras.recorded_extras(drops, original.entries)
        if facts.settings != recorded:
            return "exists already, made with other settings"
        if facts.source.bytes != row.original_bytes:
            return "exists already, made from another file"
        sources = [file.path.stat() for file in original.files]
        # Renaming, copying and writing each set one of these two.
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
    """Convert one file and settle its row; only a full disk ends the whole."""
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
        row.settle(Result.FAILED, str(error))
        raise
    except TargetExistsError as error:
        row.settle(Result.FAILED, str(error))
        # Another process may have written it meanwhile.
        _settled(row, recorded, overwrite, rehash=True)
    except NFQError as error:
        row.settle(Result.FAILED, str(error))
    except OSError as error:
        row.settle(Result.FAILED, reason_of(error))
    except Exception as error:
        # Whatever is wrong with one file, a night's work on the others shall not be lost.
        if os.environ.get(DEBUG):
            log.exception("%s", row.source)
        row.settle(Result.FAILED, "not enough memory" if is_out_of_memory(error) else internal_fault(error))
    else:
        row.file_bytes, row.seconds, row.warnings = result["file_bytes"], result["seconds"], result["warnings"]
        row.settle(Result.CONVERTED)


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
    """What `convert_folders` reports, to read: a table and a line of totals."""
    rows, totals = report["files"], report["totals"]
    width = max((len(row["source"]) for row in rows), default=0)
    texts = (f"{_words(row['result']):10}  {row['source']:{width}}  {_outcome(row)}".rstrip() for row in rows)
    lines = map(printable, texts)
    counts = ", ".join(f"{totals[result]} {_words(result)}" for result in Result if totals[result])
    if totals[Result.CONVERTED]:
        counts += f"; {_sizes(totals)} in {totals['seconds']:.1f} s"
    return [*lines, counts or "no model file found"]


def _words(result: str) -> str:
    return Result(result).value.replace("_", " ")


def _outcome(row: dict) -> str:
    """The columns behind a file's name."""
    if row["file_bytes"]:
        seconds = "" if row["seconds"] is None else f" in {row['seconds']:.1f} s"
        return f"{row['kind']}, {_sizes(row)}{seconds}"
    target = f"→ {row['target']}" if row["result"] == Result.TO_CONVERT else ""
    return ": ".join(filter(None, (row["kind"], row["reason"] or target)))


def _sizes(row: dict) -> str:
    before, after = row["original_bytes"], row["file_bytes"]
    return f"{before:,} → {after:,} bytes ({after / before:.0%})"
