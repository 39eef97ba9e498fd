"""The name of a new file unless the user gives one: that of its source, and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ..nfq_core.checkpoints.targets import settings_tag
from ..nfq_core.planning.settings import DEFAULT_CONV_LEVELS, DEFAULT_LEVELS, DEFAULT_PRESET, DEFAULTS, Settings
from .host import SUFFIX
from .recipe import node_inputs, origin_in_graph, upstream
from .schema import DEFAULT_PREFIX, NOTHING

QUANTIZING = "NFQuantizeUNet"
"""Id of the node whose MODEL `planned_name` names."""

_NAMED = {"preset": DEFAULT_PRESET, "levels": DEFAULT_LEVELS, "conv_levels": DEFAULT_CONV_LEVELS}
"""The inputs of that node that a name tells, with their defaults."""


def model_name(source: str, settings: Mapping[str, Any]) -> str:
    """The name of a packed MODEL's file without its ending: `model-balanced`, `model-NF16-calibrated`.

    Args:
        source: name of the file that the weights came from; empty if unknown.
        settings: as recorded. Those that the node does not offer give `model-nfq`.
    """
    try:
        return _name(source, node_inputs(settings) or {"preset": ""})
    except (TypeError, ValueError):
        return f"{_stem(source)}-nfq"


def planned_name(prompt: Mapping[str, Any] | None, node_id: str | None) -> str | None:
    """`model_name` of the MODEL that a node is going to get; None if the graph does not tell.

    Args:
        prompt: the graph in the host's API format.
        node_id: the node.
    """
    nodes = upstream(prompt or {}, str(node_id), "model")
    inputs = next((node.get("inputs", {}) for node in nodes if node.get("class_type") == QUANTIZING), None)
    try:
        return None if inputs is None else _name(origin_in_graph(prompt, node_id).name, inputs)
    except (TypeError, ValueError):
        # A link in place of a value: what arrives is not known yet.
        return None


def _name(source: str, inputs: Mapping[str, Any]) -> str:
    preset, levels, conv_levels = (inputs.get(name, default) for name, default in _NAMED.items())
    settings = Settings.from_form(preset, int(levels), int(conv_levels), DEFAULTS.effort)
    name = f"{_stem(source)}-{settings_tag(settings)}"
    return name if inputs.get("calibration", NOTHING) == NOTHING else f"{name}-calibrated"


def _stem(source: str) -> str:
    name = source.removesuffix(SUFFIX)
    return (PurePath(name).stem if name == source else name) or DEFAULT_PREFIX
