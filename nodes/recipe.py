"""What packed weights were made from, and how: read off the graph, kept in files and workflows, explained."""

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
from ..nfq_core.errors import printable
from ..nfq_core.files.container import BAKED, IMPORTED, Source
from ..nfq_core.planning.allocation import PRESETS
from .host import CHECKPOINTS, SUFFIX, UNETS, listed_name

LOADER_INPUTS = {"unet_name": UNETS, "ckpt_name": CHECKPOINTS, "model_name": "", "model_path": ""}
"""Inputs by which loaders, stock ones and others, name their file, and the host's folder it lies in, where known."""

_NODE_INPUTS = ("levels", "conv_levels", "effort", "quantize_first_last", "calibration")
"""Settings that are inputs of NFQuantizeUNet, under the same name."""

_OPTIONS = {
    **{name: name.replace("_", "-") for name in (*_NODE_INPUTS, "format", "conv_format", "target_bpw", extras.SETTING)},
    "target_bytes": "target-size",
}
"""The options of `nfq quantize` by the settings that they stand for. Others may be a stranger's words for a shell."""

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Origin:
    """What the MODEL of a node came from, as its graph tells."""

    name: str = ""
    """The file of its weights; for a merge, of its first model."""
    path: str = ""
    """Where that file lies; empty where it is not known."""
    baked: tuple[str, ...] = ()
    """What was applied to the weights before they were quantised: LoRAs with their strengths, models merged in."""

    def hashing(self) -> Callable[[], Source]:
        """Begin to hash the file on a thread of its own; the result waits for it and tells name, size and hash."""
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
    """Size and SHA-256 of a file as it is now; nothing where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return 0, ""
    return size, digest.hexdigest()


def origin_in_graph(prompt: Mapping[str, Any] | None, node_id: str | None) -> Origin:
    """What the MODEL that enters a node came from, found by following the inputs for models up the graph.

    Args:
        prompt: the graph as it runs, in the host's API format.
        node_id: the node.
    """
    files: list[tuple[str, str]] = []
    baked: list[str] = []
    for node in _upstream(prompt or {}, str(node_id)):
        inputs = node.get("inputs", {})
        loaded = next((name for name in LOADER_INPUTS if isinstance(inputs.get(name), str)), None)
        if loaded:
            files.append((inputs[loaded], LOADER_INPUTS[loaded]))
        elif isinstance(inputs.get("lora_name"), str):
            strength = inputs.get("strength_model")
            at = f" at {strength:g}" if isinstance(strength, (int, float)) else ""
            baked.append(f"LoRA {_base_name(inputs['lora_name'])}{at}")
    if not files:
        return Origin(baked=tuple(baked))
    (first, folder), *others = files
    path = folder_paths.get_full_path(folder, first) if folder else None
    merged = (f"model {_base_name(name)}" for name, _ in others)
    return Origin(_base_name(first), path or "", (*baked, *merged))


def _upstream(prompt: Mapping[str, Any], node_id: str) -> Iterator[Mapping[str, Any]]:
    """The nodes that a node's MODEL passed through, the nearest first, a merge's first model before its second."""
    seen: set[str] = set()
    waiting = deque([node_id])
    while waiting:
        current = waiting.popleft()
        node = prompt.get(current)
        if node is None or current in seen:
            continue
        seen.add(current)
        yield node
        links = sorted((name, value) for name, value in node.get("inputs", {}).items() if name.startswith("model"))
        waiting.extend(str(value[0]) for _, value in links if isinstance(value, list) and len(value) == 2)


def _base_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def recipe(file: NFQFile) -> dict[str, Any]:
    """What an open file was made from and how, short enough for a workflow."""
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
    """What to do about a file that a workflow wants and that is not there, fit for a terminal; empty where it is.

    Args:
        folder: the host's folder.
        name: the file; None where another node will give the name.
        recipe_text: JSON of `recipe`, from the workflow; anything else is taken for none.
    """
    if name is None or (isinstance(name, str) and listed_name(folder, name)):
        return ""
    there = f"{name!r} is not in models/{folder}"
    if not isinstance(name, str) or not name.lower().endswith(SUFFIX):
        return printable(f"{there}, or is no {SUFFIX} file, which the stock loader takes; choose an {SUFFIX} file")
    told = _told(recipe_text)
    if told is None:
        return printable(f"{there}; put it there, or choose another file")
    return printable(f"{there}. {_how_to_make(told, folder, name)}")


def node_inputs(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs of NFQuantizeUNet that stand for recorded settings; None where they need what it does not offer."""
    inputs = {key: settings[key] for key in _NODE_INPUTS if key in settings}
    presets = {bits: preset for preset, bits in PRESETS.items()}
    if settings.get("target_bpw") in presets:
        inputs["preset"] = presets[settings["target_bpw"]]
    elif any(key in settings for key in ("format", "conv_format", "target_bpw", "target_bytes")):
        return None
    return inputs


def command_options(settings: Mapping[str, Any]) -> str:
    """The options of `nfq quantize` that stand for recorded settings."""
    given = {_OPTIONS[key]: value for key, value in settings.items() if key in _OPTIONS and value is not False}
    if isinstance(size := given.get("target-size"), int):
        given["target-size"] = f"{size}B"
    return " ".join(
        f"--{option}" if value is True else f"--{option} {shlex.quote(str(value))}" for option, value in given.items()
    )


def _how_to_make(told: _Told, folder: str, name: str) -> str:
    known = f" (SHA-256 {told.sha256})" if told.sha256 else ""
    made_from = f"{told.source!r}{known}" if told.source else "a model whose name is not recorded"
    if IMPORTED in told.settings:
        return f"It was imported from {made_from}: run `nfq import-article` on that again"
    changed = f", after {', '.join(told.baked)}" if told.baked else ""
    command = f"run `nfq quantize` on it with {command_options(told.settings) or 'its defaults'}"
    inputs = node_inputs(told.settings)
    if inputs is None:
        first = "make a checkpoint of that with CheckpointSave, and " if told.baked else ""
        return f"It was made from {made_from}{changed}: {first}{command}"
    with_settings = f" with {_in_words(inputs)}" if inputs else ""
    companions = ", its CLIP and VAE connected too" if folder == CHECKPOINTS else ""
    return (
        f"It was made from {made_from}{changed}{with_settings}: load that with the stock loader, connect "
        f"NFQuantizeUNet with these settings, and NFSaveCheckpoint with filename_prefix {name[: -len(SUFFIX)]!r}"
        f"{companions}{'' if told.baked else f'; or {command}'}"
    )


def _in_words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


@dataclass(frozen=True)
class _Told:
    """What a recipe tells."""

    source: str
    sha256: str
    settings: dict[str, Any]
    baked: list[str]


def _told(recipe_text: str) -> _Told | None:
    """What a recipe tells, its settings without what was baked in; None for what is no recipe."""
    try:
        told = json.loads(recipe_text)
        settings = {key: value for key, value in told["settings"].items() if isinstance(value, (int, float, str))}
        baked = [str(item) for item in told["settings"].get(BAKED, ())]
        return _Told(str(told["source"]), str(told["source_sha256"]), settings, baked)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
