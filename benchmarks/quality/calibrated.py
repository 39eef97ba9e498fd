"""What calibration gains on the demo model: `python -m benchmarks.quality.calibrated`.

Statistics come from 32 captions sampled with DPM++ and CFG; everything is measured on other captions. Output dB is the
signal-to-noise ratio of the whole UNet's output on noisy pictures at random timesteps, against the fp16 weights';
picture dB the PSNR of 24 captions drawn with the same seeds. Every weight is at the given number of levels,
convolutions too; the first and last convolution are kept throughout, for the article's format as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nfq_core import quantize
from nfq_core.calibration.statistics import Calibration
from nfq_core.demo.calibrate import collect_demo
from nfq_core.demo.model import load_weights
from nfq_core.files.safefile import describe
from nfq_core.models.unet import detect
from nfq_core.packed.formats import LEVELS
from nfq_core.planning.policy import DEFAULTS, plan_tensors

from ..shared import machine, markdown_table, write_results
from .judge import HELD_OUT, OUTPUT_BATCH, PROMPTS, Judge, Weights
from .peers import Stored, article, stored


def measure(judge: Judge, weights: Weights, keys: list[str], make: Callable[[str], Stored]) -> dict:
    """Bits per weight and all errors where `make` gives a weight by its name."""
    made = {key: make(key) for key in keys}
    total = sum(weights[key].numel() for key in keys)
    return {
        "bits_per_weight": 8 * sum(part.disk_bytes for part in made.values()) / total,
        "packed_bits_per_weight": 8 * sum(part.packed_bytes for part in made.values()) / total,
        **judge.judge(weights | {key: part.weight for key, part in made.items()}),
    }


def run(calibration: Calibration) -> dict:
    """All measurements, as written to the results."""
    weights = load_weights()
    plans = plan_tensors(describe(weights), DEFAULTS)[1]
    keys = [key for key, plan in plans.items() if plan.format]
    found, warnings = calibration.for_plans(detect({key: tensor.shape for key, tensor in weights.items()}), plans)
    for warning in warnings:
        print(warning)
    judge = Judge(weights)
    importance = {key: {"importance": inputs.importance} for key, inputs in found.items()}
    feedback = {key: inputs.arguments() for key, inputs in found.items()}
    rows = []
    for levels in LEVELS:

        def article_of(key: str, levels: int = levels) -> Stored:
            return article(weights[key], levels)

        row = {"levels": levels, "article": measure(judge, weights, keys, article_of)}
        for name, arguments in (("fast", {}), ("importance", importance), ("feedback", feedback)):

            def ours(key: str, arguments: dict = arguments, levels: int = levels) -> Stored:
                return stored(quantize(weights[key], levels, **arguments.get(key, {})))

            row[name] = measure(judge, weights, keys, ours)
        rows.append(row)
        print(row, flush=True)
    return {"prompts": calibration.prompts, "held_out": HELD_OUT, "output_batch": OUTPUT_BATCH, "rows": rows}


def table(results: dict) -> str:
    """The README's table."""
    names = ("article", "fast", "importance", "feedback")
    rows = []
    for row in results["rows"]:
        cells = [str(row["levels"]), f"{row['article']['bits_per_weight']:.2f}"]
        cells += [f"{row['fast']['bits_per_weight']:.2f}", f"{row['feedback']['bits_per_weight']:.2f}"]
        for figure in ("output_db", "picture_db"):
            base = row["article"][figure]
            cells += [
                f"{base:.1f}",
                *(f"{row[name][figure]:.1f} ({row[name][figure] - base:+.1f})" for name in names[1:]),
            ]
        rows.append(cells)
    header = ["levels", "article, bits", "without, bits", "feedback, bits"]
    header += ["output: article, dB", "without", "importance", "feedback"]
    header += ["pictures: article, dB", "without", "importance", "feedback"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", help="a file that `nfq calibrate-demo` wrote; by default it is collected anew")
    path = parser.parse_args().calibration
    print(machine())
    results = run(Calibration.load(path) if path else collect_demo(PROMPTS))
    print(write_results("calibrated", results))
