"""What a calibration gains: `python -m benchmarks.quality.calibration`.

The demo model, calibrated with 32 captions and measured with others; the first and last convolution are kept. At fixed
levels, every weight has the given number of levels; the article's format is compared. At fixed sizes (the presets, and
4.15 packed bits per weight), a calibration chooses formats by measured sensitivity, and codes by error feedback.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nfq_core import quantize
from nfq_core.demo.calibrate import collect_demo
from nfq_core.packed.formats import LEVELS
from nfq_core.planning.settings import PRESETS, BitsPerWeight, Formats, Settings

from ..shared import argument_parser, machine, markdown_table, write_results
from .demo import FACTS, PROMPTS, DemoModel
from .peers import Stored, article, stored

SIZES = {**PRESETS, "": 4.15}  # Packed bits per weight by preset; the last is the size at which K-quants are compared


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


def at_sizes(model: DemoModel) -> Iterator[dict]:
    """Each size without a calibration and with one."""
    for preset, bits in SIZES.items():
        formats = model.formats(bits)
        without = model.each(lambda key, formats=formats: stored(quantize(model.weights[key], format=formats[key])))
        calibrated = model.calibrated(Settings(BitsPerWeight(bits)))
        judged = {"without": model.judge(without), "calibrated": model.judge(calibrated)}
        yield {"preset": preset, "asked": bits, **judged}


def levels_table(results: dict) -> str:
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


def sizes_table(results: dict) -> str:
    """Bits and errors by size, without a calibration and with one."""
    rows = []
    for row in results["rows"]:
        without, calibrated = row["without"], row["calibrated"]
        cells = [f"`{row['preset']}`" if row["preset"] else "", f"{row['asked']}"]
        cells += [f"{kind['packed_bits_per_weight']:.2f}" for kind in (without, calibrated)]
        for figure in ("output_db", "picture_db"):
            gain = calibrated[figure] - without[figure]
            cells += [f"{without[figure]:.1f}", f"{calibrated[figure]:.1f} ({gain:+.1f})"]
        rows.append(cells)
    header = ["preset", "bits asked for", "packed bits", "calibrated", "output, dB", "calibrated", "pictures, dB"]
    return markdown_table([*header, "calibrated"], rows)


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    print(machine())
    model = DemoModel(collect_demo(PROMPTS))
    for name, measure in {"calibrated": at_levels, "sizes": at_sizes}.items():
        print(write_results(name, {**FACTS, "rows": list(measure(model))}))
