"""Merge calibrations into one, as if their prompts had been sampled one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import NFQError
from ..fitting.feedback import inverse_root
from .statistics import Calibration, LayerInputs


def merge_calibrations(calibrations: Sequence[Calibration]) -> tuple[Calibration, list[str]]:
    """Merge calibrations of one architecture, each layer weighted by the number of inputs that each of them saw.

    Args:
        calibrations: two or more, all with Hessians or all without.

    Returns:
        The merged calibration, and a warning for each weight that some of them lack.

    Raises:
        NFQError: architectures or layer sizes differ, or only some calibrations have Hessians.
    """
    if len(calibrations) < 2:
        raise NFQError(f"merging takes at least two calibrations, got {len(calibrations)}")
    first = calibrations[0]
    for number, other in enumerate(calibrations[1:], 2):
        if other.architecture != first.architecture:
            raise NFQError(
                f"{_name(first, 1)} was made with {first.architecture}, {_name(other, number)} with "
                f"{other.architecture}; only calibrations of one architecture can be merged"
            )
    warnings, merged, inputs, sensitivities = [], {}, {}, {}
    names = dict.fromkeys(name for each in calibrations for name in (*each.inputs, *each.faults))
    for name in names:
        for number, each in enumerate(calibrations, 1):
            if name not in each.inputs:
                reason = f" ({each.faults[name]})" if name in each.faults else ""
                warnings.append(f"{_name(each, number)} lacks {name!r}{reason}; only the others are used for it")
        parts = [each.inputs[name] for each in calibrations if name in each.inputs]
        if not parts:
            continue
        # Layers that share their statistics in every calibration share them in the result.
        identity = tuple(map(id, parts))
        if identity not in merged:
            merged[identity] = _merge(name, parts)
        inputs[name] = merged[identity]
        measured = [each for each in calibrations if name in each.inputs and name in each.sensitivities]
        if measured:
            rows = sum(each.inputs[name].rows for each in measured)
            total = sum(each.inputs[name].rows * each.sensitivities[name] for each in measured)
            sensitivities[name] = total / rows
    if not inputs:
        raise NFQError("none of the calibrations has usable statistics; there is nothing to merge")
    prompts, steps = [each.prompts for each in calibrations], {each.steps for each in calibrations}
    return Calibration(
        inputs,
        first.architecture,
        None if None in prompts else sum(prompts),
        steps.pop() if len(steps) == 1 else None,
        sensitivities=sensitivities,
    ), warnings


def _name(calibration: Calibration, number: int) -> str:
    return calibration.source.name or f"calibration {number}"


def _merge(name: str, parts: list[LayerInputs]) -> LayerInputs:
    """Merge the statistics of one layer."""
    if len({part.correlation is None for part in parts}) > 1:
        raise NFQError(
            f"layer {name!r} has a Hessian in only some of the calibrations; collect all of them with Hessians, or none"
        )
    if len({(len(part.importance), part.taps) for part in parts}) > 1:
        raise NFQError(f"layer {name!r} has different sizes in the calibrations; merge those of one model")
    rows = sum(part.rows for part in parts)
    importance = sum(part.rows * part.importance.double() for part in parts) / rows
    if parts[0].correlation is None:
        return LayerInputs(importance.float(), rows)
    columns, taps = len(parts[0].correlation), parts[0].taps
    scale = inverse_root(importance.repeat_interleave(taps))
    # Turns each part's correlation into its share of the merged correlation.
    shares = [scale * (part.rows / rows * part.importance.double().repeat_interleave(taps)).sqrt() for part in parts]
    rank = max(part.correlation.shape[1] for part in parts)
    if rank == columns:
        correlation = torch.zeros(columns, columns, dtype=torch.float64, device="cpu")
        for part, share in zip(parts, shares, strict=True):
            own = part.correlation.double()
            own = own if len(own) == own.shape[1] else own @ own.T
            correlation += own * share[:, None] * share
        return LayerInputs(importance.float(), rows, correlation.half())
    factor = torch.cat(
        [part.correlation.double() * share[:, None] for part, share in zip(parts, shares, strict=True)], 1
    )
    left, sizes, _ = torch.linalg.svd(factor, full_matrices=False)
    return LayerInputs(importance.float(), rows, (left * sizes)[:, :rank].half())
