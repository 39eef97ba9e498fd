"""The model files below some folders, and the names that their containers get."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .atomic import file_identity, is_same_file
from .container import SUFFIX
from .errors import NFQError, reason_of
from .policy import DEFAULTS, Settings
from .sniff import BY_ENDING

SAFETENSORS = ".safetensors"

_DIFFUSERS_NAME = re.compile(r"diffusion_pytorch_model(\..+)?")
"""What diffusers calls the file of every model, with or without a variant such as `.fp16`."""


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
    """Where a file's container goes: `<Model>-NF16.nfq.safetensors`, in the same subfolder of `out`.

    The model's name is the file's, but for those that diffusers calls all alike: these take the name of the model's
    folder, which is the one around `unet`, or in the hub's cache the one around `snapshots`.
    """
    model, folder = found.path.stem, found.path.parent
    alike = _DIFFUSERS_NAME.fullmatch(model)
    if alike:
        folder = Path(os.path.abspath(folder))
        folder = folder.parent if folder.name == "unet" else folder
        if folder.parent.name == "snapshots":
            folder = folder.parent.parent
        model = folder.name.rpartition("--")[2] + (alike[1] or "")
        folder = folder.parent
    root, folder = os.path.abspath(found.root), os.path.abspath(folder)
    below = os.path.relpath(folder, root) if Path(folder).is_relative_to(root) else ""
    return Path(out, below, f"{model}-{tag(settings)}{SUFFIX}")


def tag(settings: Settings) -> str:
    """What settings are called in a file's name: `NF16`, `NF12-NF24` with other convolutions, `3.4bpw`, `1.2GB`."""
    if settings.target_bpw is not None:
        return f"{settings.target_bpw:g}bpw"
    if settings.target_bytes is not None:
        return f"{settings.target_bytes / 1e9:g}GB"
    linear, convolution = (fmt.id.removesuffix("_b64").upper() for fmt in settings.formats())
    return linear if settings.formats()[1] == DEFAULTS.formats()[1] else f"{linear}-{convolution}"


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
        elif path.suffix.lower() in (SAFETENSORS, *BY_ENDING):
            yield _look(path, root, seen)


def _look(path: Path, root: Path, seen: dict[object, Path]) -> Found:
    try:
        identity = file_identity(path)
        if not stat.S_ISREG(path.stat().st_mode):
            return Found(path, root, "it is no regular file")
    except OSError as error:
        return Found(path, root, f"it cannot be read: {reason_of(error)}")
    return Found(path, root, same_as=None if seen.setdefault(identity, path) is path else seen[identity])
