"""Which sources can be converted, and what to say about the others."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..errors import CorruptFileError, NFQError, UnsupportedFileError, command
from ..files.article import is_article_file
from ..files.atomic import is_same_file
from ..files.container import FACTS_KEY
from ..files.original import Original
from ..files.safetensors_io import Entry, SafetensorsFile
from ..models.completeness import missing_tensors_message, unet_warnings
from ..models.text_encoders import text_encoder_warnings
from ..models.unet import detect
from .kinds import NO_MODELS, kind_name
from .targets import refuse_name


def refuse_unconvertible(original: Original, target: str | os.PathLike) -> None:
    """Raise NFQError if the source is quantised already, or the target's name is not one for its container."""
    refuse_container(original)
    refuse_same(original.files, target)
    refuse_name(target)
    if is_article_file(original.entries):
        converter = command("import-article")
        raise UnsupportedFileError(f"{original.path} was written by the article's code; {converter} converts it")


def refuse_container(file: SafetensorsFile | Original) -> None:
    """Raise NFQError if the source is a container."""
    if FACTS_KEY in file.metadata:
        raise NFQError(f"{file.path} is quantised already; dequantise it first with {command('dequantize')}")


def refuse_same(sources: Iterable[SafetensorsFile], target: str | os.PathLike) -> None:
    """Raise NFQError if the target is one of its own sources, which overwriting would destroy."""
    if os.path.exists(target) and any(is_same_file(source.path, target) for source in sources):
        raise NFQError(f"{target} is the source itself; name another target")


def about_model(original: Original, entries: dict[str, Entry]) -> list[str]:
    """Warnings about a model's UNet and text encoders; NFQError if it is incomplete, or a LoRA or VAE.

    Args:
        original: the source, open.
        entries: the tensors of the source that are converted.
    """
    shapes = {key: entry.shape for key, entry in entries.items()}
    info = detect(shapes)
    lost = missing_tensors_message(info, shapes)
    if lost:
        raise CorruptFileError(f"{original.path} is incomplete: {lost}; fetch the file, or make the merge, again")
    refusal = NO_MODELS.get(kind_name(entries, info))
    if refusal:
        raise UnsupportedFileError(f"{original.path} is not quantised: {refusal}")
    return unet_warnings(info, shapes) + text_encoder_warnings(info, shapes)
