"""Makes the core's table of SDXL's sensitivities: `python -m benchmarks.quality.sdxl_sensitivities CSV`.

The CSV has the columns `layer`, a name in diffusers' layout, and `output_db_weight_4bit`, the signal-to-noise ratio of
the UNet's output in dB when only this layer's weight is rounded to 4 bits. These are measurements of SDXL-Turbo's UNet
with 32 captions and one step, from the logs that the authors of MixDQ (ECCV 2024, arXiv 2405.17873) publish with their
code.

A sensitivity is the relative noise power of the output ÷ that of the weight. The logs do not have the latter: it is
taken to be -17 dB, which is usual for rounding to 4 bits between the minimum and the maximum of each output channel.
Layers that are never quantised are left out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from nfq_core.models.sensitivities import SDXL_SENSITIVITIES

from ..shared import argument_parser, write_json

ROUNDED_DB = 17.0
"""Signal-to-noise ratio of a weight rounded to 4 bits, min-max, in dB: assumed."""

SOURCE = "SDXL-Turbo, 32 captions, one step: logs published by the authors of MixDQ (ECCV 2024, arXiv 2405.17873)"
UNIT = "dB: 10 * log10(relative noise power of the output / relative noise power of the layer's weight)"


def table(rows: Iterable[Mapping[str, str]]) -> dict:
    """The contents of the core's table, from the rows of the CSV."""
    outputs = {row["layer"]: float(row["output_db_weight_4bit"]) for row in rows if "emb" not in row["layer"]}
    decibels = {name: round(ROUNDED_DB - output, 1) for name, output in outputs.items()}
    return {"source": SOURCE, "unit": UNIT, "decibels": decibels}


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=SDXL_SENSITIVITIES, help="default: the core's own file")
    options = parser.parse_args()
    with options.csv.open(encoding="utf-8", newline="") as file:
        write_json(options.out, table(csv.DictReader(file)))
