"""What a calibration gains: `python -m benchmarks.quality.calibration`.

The demo model, calibrated with 32 captions and measured with others; the first and last convolution are kept. Every
weight has the given number of levels; the article's format is compared. `presets` measures sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nfq_core import quantize
from nfq_core.demo.calibrate import collect_demo
from nfq_core.packed.formats import LEVELS
from nfq_core.planning.settings import Formats, Settings

from ..shared import argument_parser, machine, markdown_table, write_results
from .demo import FACTS, PROMPTS, DemoModel
from .peers import Stored, article, stored


def at_levels(model: DemoModel) -> Iterator[dict]:
    """The article's format, ours without a calibration, with importance alone and with error feedback, by levels."""

    def ours(levels: int, calibrated: bool, key: str) -> Stored:
        importance = model.inputs[key].importance if calibrated and key in model.inputs else None
        return stored(quantize(model.weights[key], levels, importance=importance))

    for levels in LEVELS:
        made = {
            "article": model.each(lambda key, levels=levels: article(model.weights[key], levels)),
            "fast": model.each(partial(ours, levels, False)),
            "importance": model.each(partial(ours, levels, True)),
            "feedback": model.calibrated(Settings(Formats.of(levels, levels))),
        }
        yield {"levels": levels, **{name: model.judge(weights) for name, weights in made.items()}}


def table(results: dict) -> str:
    """Bits and errors by levels, with the gain over the article's format in brackets."""
    rows = []
    for row in results["rows"]:
        cells = [str(row["levels"])]
        cells += [f"{row[name]['bits_per_weight']:.2f}" for name in ("article", "fast", "feedback")]
        for figure in ("output_db", "picture_db"):
            base = row["article"][figure]
            gains = (row[name][figure] for name in ("fast", "importance", "feedback"))
            cells += [f"{base:.1f}", *(f"{found:.1f} ({found - base:+.1f})" for found in gains)]
        rows.append(cells)
    header = ["levels", "article, bits", "without, bits", "feedback, bits"]
    for figure in ("output", "pictures"):
        header += [f"{figure}: article, dB", "without", "importance", "feedback"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    print(machine())
    model = DemoModel(collect_demo(PROMPTS))
    print(write_results("calibrated", {**FACTS, "rows": list(at_levels(model))}))
