"""Describe a container, verify its checksums, and measure its error against the original."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..decibels import pooled_sqnr_db, sqnr_db
from ..errors import CorruptFileError, NFQError, printable
from ..files.container import NFQFile
from ..files.original import Original
from ..models.components import Component, find_components
from ..models.unet import detect, known_ldm_names
from ..parallel import Progress, no_progress, ordered_map
from ..sizes import share_in_words, size_in_words
from .memory import refuse_beyond_memory

MAX_LINE = 500
"""Most characters of a line about a file: names and texts in it may be megabytes long."""


def file_info(path: str | os.PathLike) -> dict:
    """Read a container's header as `nfq info --json` prints it, see `container_info`; no tensor is read.

    Raises:
        NFQError: the file is missing, damaged, foreign or newer.
    """
    with NFQFile(path) as file:
        return container_info(file)


def container_info(file: NFQFile) -> dict:
    """Read the header of an open container.

    Returns:
        `container_version`, `writer`, `architecture`, `layout`, `source`, `settings`, `expected` (of the output, see
        `expectation`), `weights` (count of quantised weights), `bits_per_weight` (stored bytes of the quantised tensors
        × 8 ÷ those weights),
        `packed_bits_per_weight` (the same for the packed buffers), `file_bytes`, `original_bytes` (size of the source
        file), `kept` and `kept_bytes` (number and size of the tensors kept), `has_workflow`, `components` (the models
        in the file, see `_component_info`), and `layers` (each `name`, `format`, `shape`, `bits_per_weight` and, if
        formats were chosen by size, `sensitivity`: see `allocation.allocate`).
    """
    shapes = file.shapes()
    weights = sum(entry.weights for entry in file.quantized.values())
    stored = sum(file.stored_bytes(key) for key in file.quantized)
    packed = sum(entry.packed_bytes for entry in file.quantized.values())
    source = file.facts.source
    return {
        "container_version": file.container_version,
        "writer": file.writer,
        "architecture": file.facts.architecture,
        "layout": file.facts.layout,
        "source": {"name": source.name, "sha256": source.sha256},
        "settings": file.facts.settings,
        "expected": file.facts.expected,
        "weights": weights,
        "bits_per_weight": stored * 8 / weights if weights else 0.0,
        "packed_bits_per_weight": packed * 8 / weights if weights else 0.0,
        "file_bytes": file.file_bytes,
        "original_bytes": source.bytes,
        "kept": len(file.kept),
        "kept_bytes": sum(file.stored_bytes(key) for key in file.kept),
        "has_workflow": "workflow" in file.metadata,
        "components": [_component_info(file, each) for each in find_components(detect(shapes), shapes)],
        "layers": [
            {
                "name": key,
                "format": entry.format.id,
                "shape": list(entry.shape),
                "bits_per_weight": file.stored_bytes(key) * 8 / entry.weights,
                **({} if entry.sensitivity is None else {"sensitivity": entry.sensitivity}),
            }
            for key, entry in file.quantized.items()
        ],
    }


def _component_info(file: NFQFile, component: Component) -> dict[str, Any]:
    """One of the models in an open container.

    Returns:
        `kind` ("diffusion model", "text encoder", "VAE" or "other"), `name`, `tensors`, `weights` (count of quantised
        weights), `bits_per_weight` and `packed_bits_per_weight` (of these weights, as in `container_info`; None if
        nothing is quantised), `file_bytes` (of its tensors in the file) and `original_bytes` (before they were
        quantised).
    """
    entries = [file.quantized[key] for key in component.keys if key in file.quantized]
    weights = sum(entry.weights for entry in entries)
    stored = sum(file.stored_bytes(key) for key in component.keys if key in file.quantized)
    packed = sum(entry.packed_bytes for entry in entries)
    return {
        "kind": component.kind,
        "name": component.name,
        "tensors": len(component.keys),
        "weights": weights,
        "bits_per_weight": stored * 8 / weights if weights else None,
        "packed_bits_per_weight": packed * 8 / weights if weights else None,
        "file_bytes": sum(map(file.stored_bytes, component.keys)),
        "original_bytes": sum(map(file.dense_bytes, component.keys)),
    }


def of_main_component(info: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `container_info` with the number of weights and the bits of the diffusion model, if there is one.

    Presets and target bits count the diffusion model only, so files compare by these.
    """
    models = (each for each in info["components"] if each["kind"] == "diffusion model" and each["weights"])
    main = next(models, info)
    return {**info, **{name: main[name] for name in ("weights", "bits_per_weight", "packed_bits_per_weight")}}


def _model_name(info: Mapping[str, Any]) -> str:
    """The architecture; of a file without a known diffusion model, the names of its text encoders, if it has some."""
    encoders = [each["name"] for each in info["components"] if each["kind"] == "text encoder"]
    return ", ".join(encoders) if encoders and info["layout"] == "plain" else info["architecture"]


def _component_line(component: Mapping[str, Any]) -> str:
    size = size_in_words(component["file_bytes"])
    if component["bits_per_weight"] is None:
        return f"{size}, kept"
    return (
        f"{size}, {component['file_bytes'] / component['original_bytes']:.0%} of the original; "
        f"{component['bits_per_weight']:.3f} bits/weight in the file, {component['packed_bits_per_weight']:.3f} packed"
    )


def info_lines(path: str | os.PathLike, info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result of `file_info` for the file at `path` as pairs of name and text, printable on a terminal."""
    formats = Counter(layer["format"] for layer in info["layers"])
    lines = [
        ("file", f"{path}, {share_in_words(info['file_bytes'], info['original_bytes'])}"),
        ("written by", f"{info['writer']}, container version {info['container_version']}"),
        ("model", f"{_model_name(info)}, {info['layout']} keys"),
        ("source", f"{info['source']['name'] or 'not recorded'} {info['source']['sha256'][:10]}"),
        ("settings", settings_in_words(info["settings"]) or "not recorded"),
        (
            "quantised",
            f"{len(info['layers'])} layers, {info['weights']:,} weights"
            + "".join(f", {count} {name}" for name, count in sorted(formats.items())),
        ),
        ("bits/weight", f"{info['bits_per_weight']:.3f} in the file, {info['packed_bits_per_weight']:.3f} packed"),
        ("kept", f"{info['kept']} tensors, {size_in_words(info['kept_bytes'])}"),
        *((each["name"], _component_line(each)) for each in info["components"] if len(info["components"]) > 1),
        ("workflow", "embedded" if info["has_workflow"] else "none"),
    ]
    if info["expected"]:
        lines.insert(5, ("expected", expected_in_words(info["expected"])))
    return [(name, printable(text, MAX_LINE)) for name, text in lines]


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Recorded settings on one line, such as "levels 16, effort best"; empty if none are recorded."""
    texts = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def expected_in_words(expected: Mapping[str, float | None]) -> str:
    """`expectation` on one line; empty if nothing is known."""
    decibels, added = expected.get("output_db"), expected.get("calibration_db")
    if decibels is None:
        return ""
    part = "" if added is None else f", {added:+.1f} dB by the calibration"
    difference = f"{10 ** (-decibels / 20):.1%}"
    return f"the output differs by about {difference} from the original's ({decibels:.1f} dB{part}; predicted)"


def verify_file(path: str | os.PathLike, *, progress: Progress = no_progress) -> dict:
    """Read a whole container and check every checksum and bound.

    Returns:
        `ok`, `tensors` (number checked) and `errors` (one line for each damaged tensor).

    Raises:
        NFQError: the file is missing or not a container, or its header is damaged.
    """
    with NFQFile(path) as file:
        refuse_beyond_memory(file, max(map(file.packed_bytes, file.quantized), default=0))

        def check(key: str) -> tuple[str, str]:
            try:
                file.verify(key)
            except CorruptFileError as error:
                return key, str(error)
            return key, ""

        errors = []
        done, total = 0, sum(map(file.stored_bytes, file.keys()))
        for key, error in ordered_map(check, file.keys(), size=file.stored_bytes):
            errors += [error] if error else []
            done += file.stored_bytes(key)
            progress(done, total, key)
        return {"ok": not errors, "tensors": len(file.keys()), "errors": errors}


def compare_files(original: str | os.PathLike, path: str | os.PathLike, *, progress: Progress = no_progress) -> dict:
    """Measure the error of a container's quantised weights against the original.

    Args:
        original: the safetensors file it was made from, or any with the same shapes. UNet names may be in another
            layout. Give a sharded model by its index or folder. fp8 and int8 weights with scales are dequantised first.
        path: the `.nfq.safetensors` file.
        progress: see `parallel.Progress`.

    Returns:
        `sqnr_db` (of all layers together, see `decibels.pooled_sqnr_db`) and `layers` (each `name`, `format`,
        `bits_per_weight` as stored, and `sqnr_db`); if several models in the file are quantised, `components` (each
        `kind`, `name`, `weights` and `sqnr_db`); if the original lacks text encoders, their names as `not_compared`. A
        `sqnr_db` is None if the weights are equal.

    Raises:
        NFQError: a file is missing or damaged, or the original lacks a tensor or has it in another shape.
    """
    with Original(original) as before, NFQFile(path) as after:
        names = _counterparts(before, after)
        shapes = after.shapes()
        components = find_components(detect(shapes), shapes)
        absent = [each for each in components if each.encoder and not any(map(each.encoder.owns, before.entries))]
        left_out = {key for component in absent for key in component.keys}
        compared = {key: entry for key, entry in after.quantized.items() if key not in left_out}
        for key, entry in compared.items():
            found = before.entries[names[key]].shape if key in names else None
            if found != entry.shape:
                raise NFQError(f"{before.path}: tensor {key!r} has shape {found}, {after.path} has {entry.shape}")

        refuse_beyond_memory(after, max((8 * entry.weights for entry in compared.values()), default=0))

        def measure(key: str) -> float:
            return sqnr_db(before.tensor(names[key]), after.load(key).dequantize(torch.float32))

        layers = []
        done, total = 0, sum(before.entries[names[key]].nbytes for key in compared)
        results = ordered_map(measure, compared, size=lambda key: 8 * compared[key].weights)
        for (key, entry), ratio in zip(compared.items(), results, strict=True):
            if math.isnan(ratio) or ratio == -math.inf:
                raise NFQError(f"{before.path}: tensor {key!r} is not what {after.path} was made from")
            layers.append(
                {
                    "name": key,
                    "format": entry.format.id,
                    "bits_per_weight": after.stored_bytes(key) * 8 / entry.weights,
                    "sqnr_db": ratio if math.isfinite(ratio) else None,
                }
            )
            done += before.entries[names[key]].nbytes
            progress(done, total, key)
        weighted = {each["name"]: (compared[each["name"]].weights, each["sqnr_db"]) for each in layers}
        parts = [_component_error(each, weighted) for each in components if weighted.keys() & set(each.keys)]
        return {
            "sqnr_db": pooled_sqnr_db(weighted.values()),
            **({"components": parts} if len(parts) > 1 else {}),
            **({"not_compared": [each.name for each in absent]} if absent else {}),
            "layers": layers,
        }


def _component_error(component: Component, weighted: Mapping[str, tuple[int, float | None]]) -> dict[str, Any]:
    """A component's entry in the result of `compare_files`, from weights and SQNR of each layer by name."""
    layers = [weighted[key] for key in component.keys if key in weighted]
    return {
        "kind": component.kind,
        "name": component.name,
        "weights": sum(weights for weights, _ in layers),
        "sqnr_db": pooled_sqnr_db(layers),
    }


def _counterparts(before: Original, after: NFQFile) -> dict[str, str]:
    """Name in the original of each quantised tensor that it has: the same, or the UNet's name in another layout."""
    same = {key: key for key in after.quantized if key in before.entries}
    if len(same) == len(after.quantized):
        return same
    shapes = after.shapes(), {key: entry.shape for key, entry in before.entries.items()}
    ours, theirs = (known_ldm_names(detect(each), each) for each in shapes)
    known = {ldm: key for key, ldm in theirs.items()}
    return {key: known[ldm] for key, ldm in ours.items() if ldm in known and key in after.quantized} | same
