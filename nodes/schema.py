"""Shared parts of the nodes' schemas."""

from __future__ import annotations

from inspect import signature
from typing import Any

from comfy_api.latest import io

from .host import SUFFIX, file_names

CATEGORY = "NFQ"

NOTHING = "(none)"
"""The option that selects no file."""

DEFAULT_PREFIX = "ComfyUI-NFQ"
"""The name of a new file unless the user chooses another."""


def schema(*, search_aliases: list[str], **arguments: Any) -> io.Schema:
    """A node's schema, without the fields that ComfyUI before 0.22 does not have.

    With `has_intermediate_output`, a node whose result is cached shows its output again.

    Args:
        search_aliases: other words by which the node can be found.
        arguments: further fields of `io.Schema`.
    """
    newer = {"search_aliases": search_aliases, "has_intermediate_output": True}
    known = {name: value for name, value in newer.items() if name in io.Schema.__dataclass_fields__}
    return io.Schema(category=CATEGORY, **known, **arguments)


def advanced(kind: Any, name: str, **options: Any) -> Any:
    """An optional input that the page shows among the advanced ones, where the host's version has these.

    Args:
        kind: its kind, such as `io.Combo`.
        name: its name.
        options: further options of the input.
    """
    known = {"advanced": True} if "advanced" in signature(kind.Input).parameters else {}
    return kind.Input(name, optional=True, **known, **options)


def filename_prefix_input(suffix: str, folder: str, if_empty: str = "") -> io.String.Input:
    """The input that names a new file.

    Args:
        suffix: the ending that is added to the name.
        folder: where the file is written, for the tooltip.
        if_empty: what happens without a name, for the tooltip; the input is then empty unless the user types one.
    """
    explained = f" If it is empty, {if_empty}." if if_empty else ""
    return io.String.Input(
        "filename_prefix",
        default="" if if_empty else DEFAULT_PREFIX,
        optional=True,
        tooltip=f"Name of the file; {suffix} is added.{explained} The file is written to {folder}.",
    )


def file_input(name: str, folder: str, writer: str = "Save NFQ Checkpoint") -> io.Combo.Input:
    """The input of a loader that chooses the file.

    Args:
        name: its name.
        folder: the host's folder.
        writer: the node that writes such files, for the tooltip.
    """
    return io.Combo.Input(
        name,
        options=file_names(folder),
        tooltip=f"An {SUFFIX} file in models/{folder}. {writer} and `nfq quantize` write such files.",
    )


def recipe_input() -> io.String.Input:
    """The input of a loader that keeps the file's recipe in the workflow."""
    return io.String.Input(
        "recipe",
        default="",
        optional=True,
        socketless=True,
        tooltip="How the file was made: its source and settings. Filled in when you choose a file. If the file is "
        "missing, the node explains how to recreate it.",
    )


def overwrite_input() -> io.Boolean.Input:
    """The input that allows replacing a file."""
    return io.Boolean.Input("overwrite", default=False, optional=True, tooltip="Replace an existing file of this name.")
