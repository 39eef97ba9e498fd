"""Predicted output of SDXL's UNet at each preset: `python -m benchmarks.quality.prediction`.

Nothing is quantised. The signal-to-noise ratio of the output is predicted from the formats' errors on Gaussian weights
and from SDXL's sensitivities, see `nfq_core.models.sensitivities`: measured on SDXL-Turbo in one step, one layer at a
time. It assumes that the noise of the layers adds up. Formats are chosen by SDXL's own sensitivities, by less exact
ones, and without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import log10, prod

from nfq_core.files.safetensors_io import Entry
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.models.sensitivities import BY_BLOCK, BY_LAYER, BY_ROLE, Sensitivities, layer_sensitivities
from nfq_core.models.unet import UNKNOWN, UNetInfo
from nfq_core.models.unet_keys import SDXL_BASE, Shape, tensor_shapes
from nfq_core.packed.layout import BlockFormat
from nfq_core.planning.allocation import MENUS, allocate, predicted_output_db
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULTS, PRESETS

from ..shared import markdown_table, run_command

SIZES = [tenths / 10 for tenths in range(22, 82, 2)]  # Packed bits per weight
ALIKE, ONE_FORMAT = "all weights alike", "one format"

GOALS = {
    "fast": {2.8: 25.5, 3.4: 29.8, 4.1: 34.5, 4.9: 38.5},
    "best": {2.8: 28.0, 3.4: 31.9, 4.1: 36.3, 4.9: 40.5},
}
"""Output in dB to reach at each number of packed bits per weight, by effort."""


def quantized_shapes() -> dict[str, Shape]:
    """Shape of each weight of SDXL's UNet that is quantised, by its name in diffusers' layout."""
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in tensor_shapes(SDXL_BASE, "diffusers").items()}
    return {name: plan.shape for name, plan in plan_tensors(entries, DEFAULTS)[1].items() if plan.format}


def sdxl_sensitivities(shapes: Mapping[str, Shape]) -> dict[str, Sensitivities]:
    """SDXL's sensitivities as SDXL gets them, as a known relative would and as an unknown model would, by basis."""
    relative = replace(SDXL_BASE, name="a relative", channels=(1, 2, 3))
    models = (SDXL_BASE, relative, replace(relative, name=UNKNOWN))
    found = (layer_sensitivities(UNetInfo("diffusers", "", model), shapes) for model in models)
    return {one.basis: one for one in found}


def uniform_output_db(weights_db: float, sensitivities: Sensitivities) -> float:
    """Predicted output in dB if every weight has the same signal-to-noise ratio in dB, whatever the format."""
    return weights_db - 10 * log10(sum(sensitivities.values.values()))


def figures(formats: Mapping[str, BlockFormat], shapes: Mapping[str, Shape], own: Sensitivities) -> dict[str, float]:
    """`packed` bits per weight of a choice of formats, and its predicted output in `db`."""
    packed = sum(fmt.packed_bytes(prod(shapes[name])) for name, fmt in formats.items())
    return {"packed": 8 * packed / sum(map(prod, shapes.values())), "db": predicted_output_db(formats, own)}


def chosen_formats(
    shapes: Mapping[str, Shape], bits: float, values: Mapping[str, float] | None, effort: str
) -> dict[str, BlockFormat]:
    """What `allocate` chooses within so many packed bits per weight."""
    allocated = allocate(shapes, int(bits * sum(map(prod, shapes.values())) / 8), values, effort=effort)
    return {name: fmt for name, (fmt, _) in allocated.items()}


def predictions() -> list[dict]:
    """A row for each effort and preset: `effort`, `bits`, `goal` and `choices`, each with `packed` bits and `db`."""
    shapes = quantized_shapes()
    found = sdxl_sensitivities(shapes)
    own = found[BY_LAYER]
    rows = []
    for effort in EFFORTS:
        uniform = [figures(dict.fromkeys(shapes, fmt), shapes, own) for fmt in MENUS[effort]]
        for bits in sorted(PRESETS.values()):
            fits = [one for one in uniform if one["packed"] <= bits]
            choices = {ONE_FORMAT: max(fits, key=lambda one: one["db"])} if fits else {}
            values = {ALIKE: None} | {basis: one.priorities for basis, one in found.items()}
            for name, sensitivities in values.items():
                choices[name] = figures(chosen_formats(shapes, bits, sensitivities, effort), shapes, own)
            rows.append({"effort": effort, "bits": bits, "goal": GOALS[effort].get(bits), "choices": choices})
    return rows


def run() -> dict:
    """The predictions, as written to the results."""
    shapes = quantized_shapes()
    gain = uniform_output_db(0.0, sdxl_sensitivities(shapes)[BY_LAYER])
    return {"rows": predictions(), "uniform_gain_db": gain, "sizes": sizes(shapes)}


def sizes(shapes: Mapping[str, Shape]) -> list[dict]:
    """Predicted output at many sizes, formats chosen by SDXL's own sensitivities: `effort`, `packed` bits and `db`."""
    own = sdxl_sensitivities(shapes)[BY_LAYER]
    return [
        {"effort": effort, **figures(chosen_formats(shapes, bits, own.priorities, effort), shapes, own)}
        for effort, bits in product(EFFORTS, SIZES)
    ]


def table(results: dict) -> str:
    """Predicted output by effort, packed bits and what the formats were chosen by."""
    names = (ONE_FORMAT, ALIKE, BY_ROLE, BY_BLOCK, BY_LAYER)
    lines = []
    for row in results["rows"]:
        cells = [f"{row['choices'][name]['db']:.1f}" if name in row["choices"] else "–" for name in names]
        one = row["choices"].get(ONE_FORMAT)
        cells[0] += f" at {one['packed']:.2f}" if one else ""
        goal = "–" if row["goal"] is None else f"{row['goal']:.1f}"
        lines.append([row["effort"], f"{row['bits']:g}", *cells, goal])
    return markdown_table(["effort", "packed bits, at most", *names, "goal"], lines)


if __name__ == "__main__":
    run_command(__doc__, "prediction", run)
