"""Find the model files in folders, and the paths of their containers."""

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
class ModelFile:
    """One model file, or a file or folder that could not be read.

    Args:
        path: its path, as reached from `root`.
        root: the folder that was searched.
        fault: why it could not be read; empty if it could.
        same_as: path under which the same file was found before, through a link or another folder.
    """

    path: Path
    root: Path
    fault: str = ""
    same_as: Path | None = None

    @property
    def other_format(self) -> str:
        """What it is by its name, if not safetensors. Such files are never opened, because a pickle can run code."""
        return BY_ENDING.get(self.path.suffix.lower(), "")


def find_models(folders: Iterable[str | os.PathLike], out: str | os.PathLike) -> Iterator[ModelFile]:
    """Find every model file in folders and their subfolders, in order of names; each folder is read only once.

    Names that begin with a dot are skipped, and so is `out`, unless it is one of the folders.

    Args:
        folders: folders to search, or files.
        out: folder for the containers.

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
            yield _model_file(root, root.parent, seen)


def target_for(model: ModelFile, out: str | os.PathLike, settings: Settings) -> Path:
    """Path of a file's container: `container_name`, in the same subfolder of `out` as the model in its root."""
    _, around = model_name(model.path)
    root, folder = os.path.abspath(model.root), os.path.abspath(around)
    below = os.path.relpath(folder, root) if Path(folder).is_relative_to(root) else ""
    return Path(out, below, container_name(model.path, settings))


def _walk(folder: Path, root: Path, seen: dict[object, Path]) -> Iterator[ModelFile]:
    try:
        identity = file_identity(folder)
        if identity in seen:
            return
        seen[identity] = folder
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        yield ModelFile(folder, root, f"the folder cannot be read: {reason_of(error)}")
        return
    for name in names:
        path = folder / name
        if os.path.isdir(path):
            yield from _walk(path, root, seen)
        elif path.suffix.lower() in (PLAIN_SUFFIX, *BY_ENDING) or indexed_model(name):
            yield _model_file(path, root, seen)


def _model_file(path: Path, root: Path, seen: dict[object, Path]) -> ModelFile:
    try:
        identity = file_identity(path)
        if not stat.S_ISREG(path.stat().st_mode):
            return ModelFile(path, root, "it is not a regular file")
    except OSError as error:
        return ModelFile(path, root, f"it cannot be read: {reason_of(error)}")
    return ModelFile(path, root, same_as=None if seen.setdefault(identity, path) is path else seen[identity])
