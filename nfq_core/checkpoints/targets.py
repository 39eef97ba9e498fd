"""Names of the files that commands write: given by the user, completed, or derived from the source."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import NFQError
from ..files.atomic import is_same_file
from ..files.container import SUFFIX, NFQFile
from ..files.original import indexed_model
from ..files.sniff import BY_ENDING
from ..planning.settings import BitsPerWeight, FileSize, Formats, Settings

PLAIN_SUFFIX = ".safetensors"

_PLAIN_ENDINGS = (PLAIN_SUFFIX, ".sft")
"""Endings of the plain safetensors files that programs list."""

MODEL_ENDINGS = (SUFFIX, *_PLAIN_ENDINGS, ".nfq", *BY_ENDING)
"""Endings that name a kind of model file; a file of another kind must not have them."""

_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
"""A file extension; the `.0` of a version number is not one."""

_DIFFUSERS_NAME = re.compile(r"diffusion_pytorch_model(\..+)?")
"""The name that diffusers gives every model's file, with or without a variant such as `.fp16`."""

OUTPUT_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""The dtypes to dequantise to, as file names and commands spell them."""

_DTYPE_TAGS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}


def model_name(source: str | os.PathLike) -> tuple[str, Path]:
    """Name of a model, and the folder that contains it.

    The name is the file's. Files with diffusers' generic name take the name of the model's folder, which contains
    `unet`, or `snapshots` in the hub's cache.
    """
    path = Path(source)
    model, folder = indexed_model(path) or _without(path.name, (SUFFIX,)) or path.stem, path.parent
    if path.is_dir():
        model, folder = "diffusion_pytorch_model", path
    generic = _DIFFUSERS_NAME.fullmatch(model)
    if not generic:
        return model, folder
    folder = Path(os.path.abspath(folder))
    folder = folder.parent if folder.name == "unet" else folder
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    return folder.name.rpartition("--")[2] + (generic[1] or ""), folder.parent


_FORMAT_TAGS = {"nf4_b64": "4LEVELS"}
"""Tags that differ from the format id: NF4 would be taken for bitsandbytes' format of 16 levels."""


def settings_tag(settings: Settings) -> str:
    """Settings as part of a file name: `small`, `3.4bpw`, `1.2GB`, `NF16` or `NF12-NF24` (Linear, convolutions).

    A choice for text encoders that is not the default follows: `small-TE8bit`, `balanced-TEkeep`.
    """
    usual = replace(settings, text_encoders=None).text_encoder_bits
    chosen = settings.text_encoder_bits
    return _size_tag(settings) + ("" if chosen == usual else f"-TE{chosen}")


def _size_tag(settings: Settings) -> str:
    choice = settings.choice
    if isinstance(choice, BitsPerWeight):
        return choice.preset or f"{choice.bits:g}bpw"
    if isinstance(choice, FileSize):
        return f"{choice.nbytes / 1e9:g}GB"
    linear, convolution = (
        _FORMAT_TAGS.get(fmt.id, fmt.id.removesuffix("_b64").upper()) for fmt in (choice.linear, choice.convolution)
    )
    return linear if choice.convolution == Formats().convolution else f"{linear}-{convolution}"


def container_name(source: str | os.PathLike, settings: Settings) -> str:
    """File name of the container for a model and settings: `<Model>-balanced.nfq.safetensors`."""
    return f"{model_name(source)[0]}-{settings_tag(settings)}{SUFFIX}"


def dense_name(source: str | os.PathLike, tag: str | None = None) -> str:
    """File name of the plain safetensors file for a container: `<Model>-fp16.safetensors`.

    Args:
        source: the container.
        tag: name of the dtype of dequantised tensors; by default the dtype that most of them had.
    """
    if not tag:
        with NFQFile(source) as file:
            dtypes = Counter(entry.dtype for entry in file.quantized.values())
        tag = _DTYPE_TAGS.get(dtypes.most_common(1)[0][0], "dense") if dtypes else "dense"
    return f"{_without(Path(source).name, (SUFFIX,)) or Path(source).stem}-{tag}{PLAIN_SUFFIX}"


def container_target(target: str | os.PathLike | None, source: str | os.PathLike, settings: Settings) -> Path:
    """Path of the container that Python code writes: as given, in the folder given, or next to the source."""
    if target is not None and not os.path.isdir(target):
        return Path(target)
    return target_path(target and os.fspath(target), source, container_name(source, settings))


def dense_target(target: str | os.PathLike | None, source: str | os.PathLike, dtype: torch.dtype | None) -> Path:
    """The same for the plain safetensors file made from a container; a dtype of None is the recorded one."""
    if target is not None and not os.path.isdir(target):
        return Path(target)
    return target_path(target and os.fspath(target), source, dense_name(source, OUTPUT_NAMES.get(dtype)), PLAIN_SUFFIX)


def target_path(given: str | None, source: str | os.PathLike, name: str, suffix: str = SUFFIX) -> Path:
    """Path that a command writes to, decided before it reads or writes anything.

    Args:
        given: the user's DST: a file (a name without the suffix gets it), an existing folder, or a folder that ends in
            a slash. None means the source's folder.
        source: the file or folder that is converted.
        name: file name if the user gives none.
        suffix: SUFFIX or PLAIN_SUFFIX.

    Raises:
        NFQError: the folder is missing, or programs would not list a file of this name.
    """
    if given is None:
        # The absolute path of a folder has its name even if it is given as `.`.
        source = os.path.abspath(source) if os.path.isdir(source) else source
        return Path(source).parent / name
    if not given:
        raise NFQError("DST is empty; name a file or folder")
    if given.endswith(tuple(filter(None, (os.sep, os.altsep)))) or os.path.isdir(given):
        _refuse_missing(Path(given))
        return Path(given, name)
    path = Path(given)
    _refuse_missing(path.parent)
    if path.exists() and (not path.is_file() or (os.path.exists(source) and is_same_file(path, source))):
        # The writer refuses it with a more precise message.
        return path
    return complete_name(path, suffix)


def complete_name(path: Path, suffix: str = SUFFIX) -> Path:
    """Append `suffix` to a path without an ending.

    Raises:
        NFQError: the path has the ending of another kind of file.
    """
    refuse_name(path, suffix)
    return path if path.name.lower().endswith(_endings(suffix)) else path.with_name(path.name + suffix)


def refuse_name(path: str | os.PathLike, suffix: str = SUFFIX) -> None:
    """Raise NFQError if the ending of a file's name belongs to another kind of file.

    Args:
        path: the file that will be written.
        suffix: SUFFIX for a container, PLAIN_SUFFIX for other safetensors files.
    """
    name = Path(path).name
    ending = next((ending for ending in MODEL_ENDINGS if name.lower().endswith(ending)), Path(path).suffix)
    if ending in _endings(suffix) or not _is_extension(ending):
        return
    bare = name[: -len(ending)] if ending in MODEL_ENDINGS else name
    raise NFQError(f"{path}: programs list such a file only if its name ends in {suffix}; call it {bare}{suffix}")


def _endings(suffix: str) -> tuple[str, ...]:
    return (SUFFIX,) if suffix == SUFFIX else _PLAIN_ENDINGS


def _is_extension(ending: str) -> bool:
    return ending in MODEL_ENDINGS or _EXTENSION.fullmatch(ending) is not None


def _without(name: str, endings: tuple[str, ...]) -> str:
    """A name without the first of `endings` that it has; empty if it has none."""
    ending = next((ending for ending in endings if name.lower().endswith(ending)), "")
    return name[: -len(ending)] if ending else ""


def _refuse_missing(folder: Path) -> None:
    if not folder.exists():
        raise NFQError(f"{folder}: no such folder; create it first, or name another")
    if not folder.is_dir():
        raise NFQError(f"{folder} is a file, not a folder; name another")
