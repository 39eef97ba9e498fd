"""What `quantize_file` would make of a source, estimated from samples of its weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from math import prod
from typing import Any

import torch

from ..calibration.expectation import expectation
from ..calibration.statistics import Calibration, measured_sensitivities, recorded_settings
from ..errors import CannotQuantizeError, printable
from ..files.container import NO_SHA256, Source, source_name
from ..files.original import Original
from ..files.writer import Plan
from ..fitting.backends import search_backend
from ..models.components import Component, find_components
from ..models.unet import UNKNOWN
from ..packed.formats import TRELLIS_IDS
from ..packed.layout import BlockFormat
from ..parallel import Progress, no_progress, ordered_map
from ..planning import forecast
from ..planning.allocation import EXPECTED_SQNR_DB, SizeSearch
from ..planning.facts import facts_about
from ..planning.policy import estimate_warnings, plan_tensors, recorded_text_encoders
from ..planning.settings import DEFAULTS, FileSize, Settings
from ..sizes import duration_in_words, size_in_words
from .examine import expected_in_words
from .extras import recorded_extras, split_extras
from .metadata import split_metadata
from .sources import about_model, refuse_container, refuse_unconvertible


def forecast_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    settings: Settings = DEFAULTS,
    *,
    device: str | None = None,
    calibration: Calibration | None = None,
    drop_extras: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Estimate what `quantize_file` would write, without writing anything.

    Args:
        source: see `quantize_file`, also for the arguments not named here.
        progress: see `parallel.Progress`; counts layers.

    Returns:
        `target`, `architecture`, `layers` (each `name`, `format`, `shape`, `bits_per_weight` on disk,
        `expected_sqnr_db`), `components` (each `kind`, `name`, `weights`, `packed_bits_per_weight` (None if nothing is
        quantised) and `file_bytes`), `file_bytes`, `original_bytes`, `weights`, `packed_bits_per_weight`,
        `expected_sqnr_db` (of Gaussian weights), `expected_output_db` and `calibration_db`, the calibration's part of
        it (both None where they are not known), `seconds` (None on another device than a CPU) and `warnings`.

    Raises:
        NFQError: as `quantize_file`, as far as it can be known before.
    """
    with Original(source) as original:
        refuse_unconvertible(original, target)
        metadata, extra, warnings = split_metadata(original.metadata)
        entries, about_extras = split_extras(original.entries, drop_extras)
        warnings += about_extras + about_model(original, entries)
        recorded = recorded_settings(settings, calibration) | recorded_text_encoders(settings, entries)
        recorded |= recorded_extras(drop_extras, original.entries)
        made_from = Source(source_name(original.path), original.file_bytes, NO_SHA256, metadata)
        choice = settings.choice
        size = SizeSearch(choice.nbytes if isinstance(choice, FileSize) else None, settings.effort)
        measured = measured_sensitivities(entries, settings, calibration)
        stored: dict[tuple[str, BlockFormat], float] = {}
        while True:
            info, plans = plan_tensors(entries, settings, measured, size.packed_bytes)
            chosen = [(key, plan.format) for key, plan in plans.items() if plan.format]
            new = [layer for layer in chosen if layer not in stored]
            stored |= zip(new, _stored_bytes(original, new, plans, settings.effort, progress), strict=True)
            expected = expectation(entries, settings, info, plans, calibration, size.packed_bytes)
            facts = facts_about(info, plans, recorded, made_from, expected)
            file_bytes = forecast.file_bytes(plans, facts, extra, sum(stored[layer] for layer in chosen))
            if size.accepts(file_bytes, plans):
                break
    calibrated = calibration is not None and bool(calibration.for_plans(info, plans)[0])
    quantized = {key: plan for key, plan in plans.items() if plan.format}
    weights, bits = _packed_bits(quantized)
    on_cpu = device is None or torch.device(device).type == "cpu"
    shapes = {key: plan.shape for key, plan in plans.items()}
    return {
        "target": str(target),
        "architecture": facts.architecture,
        "layers": [_layer(key, plan, stored[key, plan.format]) for key, plan in quantized.items()],
        "components": [_component(each, plans, stored) for each in find_components(info, shapes)],
        "file_bytes": file_bytes,
        "original_bytes": made_from.bytes,
        "weights": weights,
        "packed_bits_per_weight": bits or 0.0,
        "expected_sqnr_db": forecast.expected_sqnr_db(plans),
        "expected_output_db": expected.get("output_db"),
        "calibration_db": expected.get("calibration_db"),
        "seconds": round(forecast.expected_seconds(plans, settings.effort, calibrated), 3) if on_cpu else None,
        "warnings": list(map(printable, warnings + estimate_warnings(info, plans, measured) + size.warnings)),
    }


def forecast_seconds(source: str | os.PathLike, settings: Settings, calibrated: bool = False) -> float | None:
    """Expected seconds of quantising a source on this machine's processors, from its header alone.

    None if it has nothing to quantise.

    Args:
        source: a file or folder, see `quantize_file`.
        settings: a preset, bits per weight or formats, and effort.
        calibrated: whether statistics of the layers' inputs are used.

    Raises:
        NFQError: the source cannot be read, or is a container.
    """
    with Original(source) as original:
        refuse_container(original)
        _, plans = plan_tensors(original.entries, settings)
    if not any(plan.format for plan in plans.values()):
        return None
    return forecast.expected_seconds(plans, settings.effort, calibrated)


def _stored_bytes(
    original: Original,
    layers: list[tuple[str, BlockFormat]],
    plans: Mapping[str, Plan],
    effort: str,
    progress: Progress,
) -> Iterator[float]:
    """Expected bytes on disk of each layer, given by name and format."""

    def sample(layer: tuple[str, BlockFormat]) -> float:
        key, fmt = layer
        try:
            return forecast.stored_bytes(original.tensor(key).float(), fmt, effort)
        except CannotQuantizeError:
            return plans[key].nbytes

    with closing(ordered_map(sample, layers, size=lambda layer: plans[layer[0]].nbytes)) as results:
        for done, ((key, _), nbytes) in enumerate(zip(layers, results, strict=True), 1):
            yield nbytes
            progress(done, len(layers), key)


def _packed_bits(quantized: Mapping[str, Plan]) -> tuple[int, float | None]:
    """Number of weights of quantised tensors, and their packed bits per weight; None without any."""
    weights = sum(prod(plan.shape) for plan in quantized.values())
    packed = sum(plan.format.packed_bytes(prod(plan.shape)) for plan in quantized.values())
    return weights, packed * 8 / weights if weights else None


def _component(
    component: Component, plans: Mapping[str, Plan], stored: Mapping[tuple[str, BlockFormat], float]
) -> dict[str, Any]:
    own = {key: plans[key] for key in component.keys}
    weights, bits = _packed_bits({key: plan for key, plan in own.items() if plan.format})
    nbytes = sum(stored[key, plan.format] if plan.format else plan.nbytes for key, plan in own.items())
    return {
        "kind": component.kind,
        "name": component.name,
        "weights": weights,
        "packed_bits_per_weight": bits,
        "file_bytes": round(nbytes),
    }


def _layer(key: str, plan: Plan, stored_bytes: float) -> dict[str, Any]:
    weights = prod(plan.shape)
    return {
        "name": key,
        "format": plan.format.id,
        "shape": list(plan.shape),
        "bits_per_weight": stored_bytes * 8 / weights,
        "expected_sqnr_db": EXPECTED_SQNR_DB[plan.format.id],
    }


def named(architecture: str) -> str:
    """The beginning of a line about a model: its architecture and a comma, if it is known."""
    return "" if architecture == UNKNOWN else f"{architecture}, "


def forecast_lines(forecast: dict[str, Any]) -> list[str]:
    """The result of `forecast_file` as lines of text: formats and components, then the whole."""
    formats = Counter(layer["format"] for layer in forecast["layers"])
    lines = [f"{count} layer{'s' if count > 1 else ''} as {name}" for name, count in sorted(formats.items())]
    several = len(forecast["components"]) > 1
    share = forecast["file_bytes"] / forecast["original_bytes"]
    for component in forecast["components"] if several else ():
        bits = component["packed_bits_per_weight"]
        how = "kept" if bits is None else f"{bits:.3f} packed bits per weight"
        lines.append(f"{component['name']}: about {size_in_words(component['file_bytes'])}, {how}")
    backend, reason = search_backend(torch.device("cpu"))
    if backend == "torch" and not formats.keys().isdisjoint(TRELLIS_IDS):
        lines.append(f"trellis codes are searched in plain torch, which takes longer: {reason}")
    size, seconds = size_in_words(forecast["file_bytes"]), forecast["seconds"]
    whole = [
        f"{forecast['target']}: {named(forecast['architecture'])}about {size}, {share:.0%} of the original",
        *([] if several else [f"{forecast['packed_bits_per_weight']:.3f} packed bits per weight"]),
        *([] if seconds is None else [f"takes about {duration_in_words(seconds)}"]),
    ]
    output = {"output_db": forecast["expected_output_db"], "calibration_db": forecast["calibration_db"]}
    return [*filter(None, [*lines, ", ".join(whole), expected_in_words(output)]), "nothing was written"]
