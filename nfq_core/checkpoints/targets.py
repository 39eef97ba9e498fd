"""The names of the files that commands write: given, completed or made up, such that programs list them."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from ..errors import NFQError
from ..files.atomic import is_same_file
from ..files.container import SUFFIX, NFQFile
from ..files.original import indexed_model
from ..files.sniff import BY_ENDING
from ..planning.settings import BitsPerWeight, FileSize, Formats, Settings

PLAIN_SUFFIX = ".safetensors"

_PLAIN_ENDINGS = (PLAIN_SUFFIX, ".sft")
"""What programs list plain safetensors files by."""

_MODEL_ENDINGS = (SUFFIX, *_PLAIN_ENDINGS, ".nfq", *BY_ENDING)
"""Endings that say what kind of model a file holds: whatever is not of that kind must not have them."""

_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
"""What is meant as an extension; the `.0` of a version is not."""

_DIFFUSERS_NAME = re.compile(r"diffusion_pytorch_model(\..+)?")
"""What diffusers calls the file of every model, with or without a variant such as `.fp16`."""

_DTYPE_TAGS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}


def model_name(source: str | os.PathLike) -> tuple[str, Path]:
    """What a model is called, and the folder around it.

    The name is the file's, but for those that diffusers calls all alike: these take the name of the model's folder,
    which is the one around `unet`, or in the hub's cache the one around `snapshots`.
    """
    path = Path(source)
    model, folder = indexed_model(path) or _without(path.name, (SUFFIX,)) or path.stem, path.parent
    if path.is_dir():
        model, folder = "diffusion_pytorch_model", path
    alike = _DIFFUSERS_NAME.fullmatch(model)
    if not alike:
        return model, folder
    folder = Path(os.path.abspath(folder))
    folder = folder.parent if folder.name == "unet" else folder
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    return folder.name.rpartition("--")[2] + (alike[1] or ""), folder.parent


def tag(settings: Settings) -> str:
    """What settings are called in a file's name: `NF16`, `NF12-NF24` with other convolutions, `3.4bpw`, `1.2GB`."""
    choice = settings.choice
    if isinstance(choice, BitsPerWeight):
        return f"{choice.bits:g}bpw"
    if isinstance(choice, FileSize):
        return f"{choice.nbytes / 1e9:g}GB"
    linear, convolution = (fmt.id.removesuffix("_b64").upper() for fmt in (choice.linear, choice.convolution))
    return linear if choice.convolution == Formats().convolution else f"{linear}-{convolution}"


def container_name(source: str | os.PathLike, settings: Settings) -> str:
    """The name of the container that is made of a model with some settings: `<Model>-NF16.nfq.safetensors`."""
    return f"{model_name(source)[0]}-{tag(settings)}{SUFFIX}"


def dense_name(source: str | os.PathLike, tag: str = "") -> str:
    """The name of the plain file that is made of a container: `<Model>-fp16.safetensors`.

    Args:
        source: the container.
        tag: what the dtype of the tensors that were quantised is called; by default that which most of them had.
    """
    if not tag:
        with NFQFile(source) as file:
            dtypes = Counter(entry.dtype for entry in file.quantized.values())
        tag = _DTYPE_TAGS.get(dtypes.most_common(1)[0][0], "dense") if dtypes else "dense"
    return f"{_without(Path(source).name, (SUFFIX,)) or Path(source).stem}-{tag}{PLAIN_SUFFIX}"


def target_path(given: str | None, source: str | os.PathLike, name: str, suffix: str = SUFFIX) -> Path:
    """Where a command writes, before anything is read or made.

    Args:
        given: the user's DST. None: the file goes beside the source; a folder, or what ends in a slash: into that. A
            bare name gets the suffix.
        source: what the file is made from.
        name: the file's name where the user gives none.
        suffix: SUFFIX or PLAIN_SUFFIX.

    Raises:
        NFQError: the folder is missing, or programs would not list the file under this name.
    """
    if given is None:
        beside = os.path.abspath(source) if os.path.isdir(source) else source
        return Path(beside).parent / name
    if not given:
        raise NFQError("DST is empty; name a file or folder")
    if given.endswith(tuple(filter(None, (os.sep, os.altsep)))) or os.path.isdir(given):
        _refuse_missing(Path(given))
        return Path(given, name)
    path = Path(given)
    _refuse_missing(path.parent)
    if path.exists() and (not path.is_file() or (os.path.exists(source) and is_same_file(path, source))):
        # Refused by whoever writes, with its own words.
        return path
    refuse_name(path, suffix)
    if path.name.lower().endswith(_endings(suffix)):
        return path
    return path.with_name(path.name + suffix)


def refuse_name(path: str | os.PathLike, suffix: str = SUFFIX) -> None:
    """NFQError where a file's name says that it is of another kind than it will be.

    Args:
        path: where the file is about to be written.
        suffix: SUFFIX for a container, PLAIN_SUFFIX for other safetensors files.
    """
    name = Path(path).name
    ending = next((ending for ending in _MODEL_ENDINGS if name.lower().endswith(ending)), Path(path).suffix)
    if ending in _endings(suffix) or not _is_extension(ending):
        return
    bare = name[: -len(ending)] if ending in _MODEL_ENDINGS else name
    raise NFQError(f"{path}: programs list such a file only if its name ends in {suffix}; call it {bare}{suffix}")


def _endings(suffix: str) -> tuple[str, ...]:
    return (SUFFIX,) if suffix == SUFFIX else _PLAIN_ENDINGS


def _is_extension(ending: str) -> bool:
    return ending in _MODEL_ENDINGS or _EXTENSION.fullmatch(ending) is not None


def _without(name: str, endings: tuple[str, ...]) -> str:
    """A name without the first of some endings that it has; empty where it has none."""
    ending = next((ending for ending in endings if name.lower().endswith(ending)), "")
    return name[: -len(ending)] if ending else ""


def _refuse_missing(folder: Path) -> None:
    if not folder.exists():
        raise NFQError(f"{folder}: no such folder; make it first, or name another")
    if not folder.is_dir():
        raise NFQError(f"{folder} is a file, not a folder; name another")
