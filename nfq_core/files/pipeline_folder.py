"""Folders of diffusers' layout that hold a pipeline."""

from __future__ import annotations

from pathlib import Path

from ..errors import NFQError
from .untrusted import parse_json

PIPELINE = "StableDiffusionXLPipeline"

INDEX = "model_index.json"


def refuse_other_folders(folder: Path) -> None:
    """Raise NFQError unless a folder holds a text-to-image pipeline of the SDXL family."""
    try:
        kind = parse_json((folder / INDEX).read_text("utf-8"))["_class_name"]
    except OSError:
        raise NFQError(f"{folder} is not a diffusers folder: its {INDEX} cannot be read") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NFQError(f"{folder}: its {INDEX} is damaged; fetch the folder again") from None
    if kind != PIPELINE:
        raise NFQError(f"{folder} holds a {kind}; give the folder of a {PIPELINE}")
