"""Source and settings of packed weights: read from the graph, stored in files and workflows, explained to users."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import folder_paths

from ..nfq_core import NFQFile
from ..nfq_core.checkpoints import extras
from ..nfq_core.errors import command, printable
from ..nfq_core.files.container import BAKED, IMPORTED, Source
from ..nfq_core.planning.settings import BY_LEVELS, PRESETS, TEXT_ENCODERS_SETTING, without_repetition
from .host import CHECKPOINTS, SUFFIX, TEXT_ENCODERS, UNETS, listed_name
from .schema import NOTHING

LOADER_INPUTS = {
    **{"unet_name": UNETS, "ckpt_name": CHECKPOINTS, "clip_name": TEXT_ENCODERS, "clip_name1": TEXT_ENCODERS},
    **{"model_name": "", "model_path": ""},
}
"""Inputs that name a loader's file, of stock loaders and others, and the host's folder for it; empty if unknown."""

_NODE_INPUTS = ("effort", "levels", "conv_levels", "quantize_first_last", "calibration")
"""Settings that are inputs of NFQuantizeUNet under the same names and with the same values."""

_OPTIONS = {
    "target_bytes": "target-size",
    **{name: name.replace("_", "-") for name in ("preset", "target_bpw", *_NODE_INPUTS)},
    **{name: name.replace("_", "-") for name in ("format", "conv_format", extras.SETTING, TEXT_ENCODERS_SETTING)},
}
"""Options of `nfq quantize` by setting. Other settings are left out: a stranger's workflow must not reach a shell."""

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Origin:
    """Where a MODEL came from, according to the graph."""

    name: str = ""
    """Name of the file with its weights; for a merge, of the first model."""
    path: str = ""
    """Path of that file; empty if unknown."""
    baked: tuple[str, ...] = ()
    """What was applied before quantising: LoRAs with their strengths, merged models."""

    def hashing(self) -> Callable[[], Source]:
        """Start hashing the file in a thread; the returned function waits for it and returns name, size and hash."""
        if not self.path:
            return lambda: Source(self.name)
        worker = ThreadPoolExecutor(1)
        digest = worker.submit(_file_sha256, self.path, *_version(self.path))
        worker.shutdown(wait=False)
        return lambda: Source(self.name, *digest.result())


def _version(path: str) -> tuple[int, int]:
    try:
        facts = os.stat(path)
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size


@lru_cache(64)
def _file_sha256(path: str, mtime_ns: int, size: int) -> tuple[int, str]:
    """Size and SHA-256 of a file; (0, "") if it cannot be read. The other arguments are part of the cache's key."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return 0, ""
    return size, digest.hexdigest()


def origin_in_graph(prompt: Mapping[str, Any] | None, node_id: str | None, part: str = "model") -> Origin:
    """Find where a node's input MODEL or CLIP came from by following such inputs up the graph.

    Args:
        prompt: the graph in the host's API format.
        node_id: the node.
        part: "model" or "clip".
    """
    files: list[tuple[str, str]] = []
    baked: list[str] = []
    for node in upstream(prompt or {}, str(node_id), part):
        inputs = node.get("inputs", {})
        loaded = next((name for name in LOADER_INPUTS if isinstance(inputs.get(name), str)), None)
        clips = [value for name, value in inputs.items() if name.startswith("clip_name") and isinstance(value, str)]
        clips = [name for name in clips if name != NOTHING]
        if len(clips) > 1:
            files.append((" and ".join(map(base_name, clips)), ""))
        elif loaded:
            files.append((inputs[loaded], LOADER_INPUTS[loaded]))
        elif isinstance(inputs.get("lora_name"), str):
            strength = inputs.get(f"strength_{part}")
            at = f" at {strength:g}" if isinstance(strength, (int, float)) else ""
            baked.append(f"LoRA {base_name(inputs['lora_name'])}{at}")
    if not files:
        return Origin(baked=tuple(baked))
    (first, folder), *others = files
    path = folder_paths.get_full_path(folder, first) if folder else None
    merged = (f"model {base_name(name)}" for name, _ in others)
    return Origin(base_name(first), path or "", (*baked, *merged))


def upstream(prompt: Mapping[str, Any], node_id: str, part: str) -> Iterator[Mapping[str, Any]]:
    """The nodes that a node's MODEL or CLIP passed through, nearest first; a merge's first input comes first."""
    seen: set[str] = set()
    waiting = deque([node_id])
    while waiting:
        current = waiting.popleft()
        node = prompt.get(current)
        if node is None or current in seen:
            continue
        seen.add(current)
        yield node
        links = sorted((name, value) for name, value in node.get("inputs", {}).items() if name.startswith(part))
        waiting.extend(str(value[0]) for _, value in links if isinstance(value, list) and len(value) == 2)


def base_name(name: str) -> str:
    """A file's name without its folders, whichever slashes it has."""
    return name.replace("\\", "/").rpartition("/")[2]


def file_recipe(file: NFQFile) -> dict[str, Any]:
    """Source and settings of an open file, short enough to be stored in a workflow."""
    source = file.facts.source
    return {
        "architecture": file.facts.architecture,
        "settings": file.facts.settings,
        "node_inputs": node_inputs(file.facts.settings),
        "command_options": command_options(file.facts.settings),
        "source": source.name,
        "source_sha256": source.sha256,
        "header_sha256": file.header_sha256,
        "file_bytes": file.file_bytes,
    }


def missing_file(folder: str, name: object, recipe_text: str) -> str:
    """Explain what to do about a missing file, in one printable line; empty if the file exists.

    Args:
        folder: the host's folder.
        name: the file; None if the name comes from another node.
        recipe_text: JSON of `file_recipe`, from the workflow; any other text is ignored.
    """
    if name is None or (isinstance(name, str) and listed_name(folder, name)):
        return ""
    there = f"{name!r} is not in models/{folder}"
    if not isinstance(name, str) or not name.lower().endswith(SUFFIX):
        return printable(
            f"{there}, or does not end in {SUFFIX}; choose an {SUFFIX} file, or load others with a stock loader"
        )
    recipe = _parse_recipe(recipe_text)
    if recipe is None:
        return printable(f"{there}; put it there, or choose another file")
    return printable(f"{there}. {_how_to_make(recipe, folder, name)}")


def node_inputs(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs of NFQuantizeUNet for recorded settings; None if the node does not offer these settings."""
    inputs = {key: settings[key] for key in _NODE_INPUTS if key in settings}
    preset = next((name for name, bits in PRESETS.items() if bits == settings.get("target_bpw")), None)
    if preset is None and any(key in settings for key in ("format", "conv_format", "target_bpw", "target_bytes")):
        return None
    if preset is None and "levels" in settings:
        preset = BY_LEVELS
    return inputs if preset is None else {"preset": preset} | inputs


def command_options(settings: Mapping[str, Any]) -> str:
    """The options of `nfq quantize` for recorded settings."""
    given = without_repetition(settings)
    given = {_OPTIONS[key]: value for key, value in given.items() if key in _OPTIONS and value is not False}
    if isinstance(size := given.get("target-size"), int):
        given["target-size"] = f"{size}B"
    return " ".join(
        f"--{option}" if value is True else f"--{option} {shlex.quote(str(value))}" for option, value in given.items()
    )


def _how_to_make(recipe: Recipe, folder: str, name: str) -> str:
    """Explain in one sentence how to make a file again."""
    known = f" (SHA-256 {recipe.sha256})" if recipe.sha256 else ""
    source = f"{recipe.source!r}{known}" if recipe.source else "an unrecorded model"
    if IMPORTED in recipe.settings:
        return f"It was imported from {source}: run {command('import-article')} on that file again"
    baked = f" plus {', '.join(recipe.baked)}" if recipe.baked else ""
    by_command = f"run {command('quantize')} on it with {command_options(recipe.settings) or 'its defaults'}"
    bits = recipe.settings.get(TEXT_ENCODERS_SETTING)
    if folder == TEXT_ENCODERS:
        in_graph = (
            f"load that with Load CLIP or DualCLIPLoader, connect NFQ Quantize CLIP with bits={bits}, then Save NFQ "
            f"CLIP with filename_prefix {name[: -len(SUFFIX)]!r}"
        )
        ways = ([in_graph] if bits else []) + ([] if recipe.baked else [by_command])
        return f"It was made from {source}{baked}: {'; or '.join(ways)}"
    inputs = node_inputs(recipe.settings)
    if inputs is None:
        first = "save that with Save Checkpoint, and " if recipe.baked else ""
        return f"It was made from {source}{baked}: {first}{by_command}"
    with_settings = f" with {_in_words(inputs)}" if inputs else ""
    companions = " and its CLIP and VAE" if folder == CHECKPOINTS else ""
    if companions and bits:
        companions = f" and {TEXT_ENCODERS_SETTING}={bits}, and its CLIP and VAE"
    return (
        f"It was made from {source}{baked}{with_settings}: load that with the stock loader, connect NFQ Quantize Model "
        f"with these settings, then Save NFQ Checkpoint with filename_prefix {name[: -len(SUFFIX)]!r}{companions}"
        f"{'' if recipe.baked else f'; or {by_command}'}"
    )


def _in_words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


@dataclass(frozen=True)
class Recipe:
    """A recipe read from a workflow."""

    source: str
    sha256: str
    settings: dict[str, Any]
    baked: list[str]


def _parse_recipe(recipe_text: str) -> Recipe | None:
    """Read a recipe from its JSON, keeping only plain settings; None if the text is not a recipe."""
    try:
        fields = json.loads(recipe_text)
        settings = {key: value for key, value in fields["settings"].items() if isinstance(value, (int, float, str))}
        baked = [str(item) for item in fields["settings"].get(BAKED, ())]
        return Recipe(str(fields["source"]), str(fields["source_sha256"]), settings, baked)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
