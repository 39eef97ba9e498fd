"""What is expected of a quantised model's output, and how much of it a calibration adds."""

from __future__ import annotations

from collections.abc import Mapping

from ..files.safetensors_io import Entry
from ..files.writer import Plan
from ..models.unet import UNetInfo
from ..planning.forecast import expected_output_db
from ..planning.policy import plan_tensors
from ..planning.settings import Formats, Settings
from .statistics import Calibration, LayerInputs

FEEDBACK_SHARE = 0.6
"""Part of error feedback's theoretical gain, in dB, that arrives in a model's output.

`python -m benchmarks.quality.collecting` measures it on two small models at 16 levels.
"""


def expectation(
    entries: Mapping[str, Entry],
    settings: Settings,
    info: UNetInfo | None,
    plans: Mapping[str, Plan],
    calibration: Calibration | None,
    packed_bytes: int | None = None,
) -> dict[str, float]:
    """Predict the signal-to-noise ratio of a quantised model's output, see `allocation.predicted_output_db`.

    Args:
        entries: dtype and shape of every tensor by name.
        settings: what `plan_tensors` was given, also `packed_bytes`.
        info: what it recognised.
        plans: its plans.
        calibration: statistics of the layers' inputs, if they are used.

    Returns:
        `output_db`, and with a calibration `calibration_db`: how many dB of it the calibration adds, through formats
        chosen by measured sensitivities and through error feedback. Empty if the sensitivities are not known.
    """
    if calibration is None:
        found = expected_output_db(info, plans, None)
        return {} if found is None else {"output_db": round(found, 1)}
    measured = calibration.sensitivities_of({key: entry.shape for key, entry in entries.items()})
    factors = feedback_factors(calibration.for_plans(info, plans)[0])
    found = expected_output_db(info, plans, measured, factors)
    if found is None:
        return {}
    if not factors and not measured:
        return {"output_db": round(found, 1)}
    if measured and not isinstance(settings.choice, Formats):
        plans = plan_tensors(entries, settings, None, packed_bytes)[1]
    without = expected_output_db(info, plans, measured)
    return {"output_db": round(found, 1), "calibration_db": round(found - without, 1)}


def feedback_factors(inputs: Mapping[str, LayerInputs]) -> dict[str, float]:
    """By what error feedback is expected to multiply the noise that each layer causes in the model's output, by name.

    Args:
        inputs: statistics by weight name; layers without Hessians are left out.
    """
    gains = {name: one.feedback_gain for name, one in inputs.items()}
    return {name: gain**FEEDBACK_SHARE for name, gain in gains.items() if gain is not None}
