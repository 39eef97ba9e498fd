"""The model files below some folders, and the names that their containers get."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import NFQError, reason_of
from ..files.atomic import file_identity, is_same_file
from ..files.original import indexed_model
from ..files.sniff import BY_ENDING
from ..planning.settings import Settings
from .targets import PLAIN_SUFFIX, container_name, model_name


@dataclass(frozen=True)
class Found:
    """One model file, or a folder or file that could not be looked at.

    Args:
        path: as reached from the folder that was given.
        root: that folder.
        fault: why it could not be looked at; empty where it could.
        same_as: where the same file was found before, by a link or another folder's name.
    """

    path: Path
    root: Path
    fault: str = ""
    same_as: Path | None = None

    @property
    def other_format(self) -> str:
        """What it is if not safetensors, by its name: it is never opened, for a pickle runs what it holds."""
        return BY_ENDING.get(self.path.suffix.lower(), "")


def find_models(folders: Iterable[str | os.PathLike], out: str | os.PathLike) -> Iterator[Found]:
    """Every model file below the folders, in order of names, each folder once however many links lead to it.

    What begins with a dot is passed over, and so is `out`, unless it is among the folders.

    Args:
        folders: where to look; a file stands for itself.
        out: where the containers go.

    Raises:
        NFQError: a folder is missing.
    """
    roots = [Path(folder) for folder in folders]
    absent = next((root for root in roots if not root.exists()), None)
    if absent is not None:
        raise NFQError(f"{absent}: no such folder")
    seen: dict[object, Path] = {}
    if os.path.isdir(out) and not any(is_same_file(root, out) for root in roots):
        seen[file_identity(Path(out))] = Path(out)
    for root in roots:
        if root.is_dir():
            yield from _walk(root, root, seen)
        else:
            yield _look(root, root.parent, seen)


def target_for(found: Found, out: str | os.PathLike, settings: Settings) -> Path:
    """Where a file's container goes: `container_name`, in the same subfolder of `out` as the model in its root."""
    _, around = model_name(found.path)
    root, folder = os.path.abspath(found.root), os.path.abspath(around)
    below = os.path.relpath(folder, root) if Path(folder).is_relative_to(root) else ""
    return Path(out, below, container_name(found.path, settings))


def _walk(folder: Path, root: Path, seen: dict[object, Path]) -> Iterator[Found]:
    try:
        identity = file_identity(folder)
        if identity in seen:
            return
        seen[identity] = folder
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        yield Found(folder, root, f"the folder cannot be read: {reason_of(error)}")
        return
    for name in names:
        path = folder / name
        if os.path.isdir(path):
            yield from _walk(path, root, seen)
        elif path.suffix.lower() in (PLAIN_SUFFIX, *BY_ENDING) or indexed_model(name):
            yield _look(path, root, seen)


def _look(path: Path, root: Path, seen: dict[object, Path]) -> Found:
    try:
        identity = file_identity(path)
        if not stat.S_ISREG(path.stat().st_mode):
            return Found(path, root, "it is no regular file")
    except OSError as error:
        return Found(path, root, f"it cannot be read: {reason_of(error)}")
    return Found(path, root, same_as=None if seen.setdefault(identity, path) is path else seen[identity])
