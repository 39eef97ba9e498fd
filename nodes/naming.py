"""Names of new files for which the user gives none: source and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nfq_core.checkpoints.targets import MODEL_ENDINGS, settings_tag
from ..nfq_core.planning.settings import (
    DEFAULT_CONV_LEVELS,
    DEFAULT_LEVELS,
    DEFAULT_PRESET,
    DEFAULTS,
    Settings,
    without_repetition,
)
from .recipe import base_name, origin_in_graph, upstream
from .schema import DEFAULT_PREFIX, NOTHING

QUANTIZING = "NFQuantizeUNet"
"""Id of the node whose MODEL `planned_name` names."""

_CHOICES = {"preset", "target_bpw", "target_bytes", "levels", "conv_levels", "format", "conv_format"}
"""The recorded settings that a name tells."""


def default_name(source: str, settings: Mapping[str, Any]) -> str:
    """The name of a packed MODEL's file without its ending: `model-balanced`, `model-NF16-calibrated`.

    Args:
        source: name of the file that the weights came from; empty if unknown.
        settings: as recorded. Without a size or formats the name is `model-nfq`.
    """
    chosen = {name: value for name, value in without_repetition(settings).items() if name in _CHOICES}
    try:
        tag = settings_tag(Settings.of(**chosen)) if chosen else "nfq"
    except (TypeError, ValueError):
        tag = "nfq"
    return _name(source, tag, bool(settings.get("calibration")))


def planned_name(prompt: Mapping[str, Any] | None, node_id: str | None) -> str | None:
    """The `default_name` of the MODEL that will reach a node; None if the graph does not determine it.

    A calibration is expected to change the result.

    Args:
        prompt: the graph in the host's API format.
        node_id: the node.
    """
    inputs = _quantizing_inputs(prompt or {}, str(node_id))
    if inputs is None:
        return None
    levels = inputs.get("levels", DEFAULT_LEVELS), inputs.get("conv_levels", DEFAULT_CONV_LEVELS)
    try:
        chosen = Settings.from_form(inputs.get("preset", DEFAULT_PRESET), *map(int, levels), DEFAULTS.effort)
    except (TypeError, ValueError):
        # A link in place of a value.
        return None
    calibrated = inputs.get("calibration", NOTHING) != NOTHING
    return _name(origin_in_graph(prompt, node_id).name, settings_tag(chosen), calibrated)


def _quantizing_inputs(prompt: Mapping[str, Any], node_id: str) -> Mapping[str, Any] | None:
    """The inputs of the node that quantises what reaches a node; None if there is none, or if paths join before."""
    for node in upstream(prompt, node_id, "model"):
        inputs = node.get("inputs", {})
        if node.get("class_type") == QUANTIZING:
            return inputs
        if sum(name.startswith("model") and isinstance(value, list) for name, value in inputs.items()) > 1:
            return None
    return None


def _name(source: str, tag: str, calibrated: bool) -> str:
    name = base_name(source)
    ending = next((ending for ending in MODEL_ENDINGS if name.lower().endswith(ending)), "")
    model = name[: len(name) - len(ending)] or DEFAULT_PREFIX
    return f"{model}-{tag}-calibrated" if calibrated else f"{model}-{tag}"
