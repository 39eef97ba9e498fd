"""Output and pictures of two small models at each preset and effort: `python -m benchmarks.quality.presets`.

Without a calibration and with one, and beside them one format for every layer. Both models stand for trained UNets that
are not SDXL: without a calibration, layers get bits by the role that they have in SDXL. More bits must give better
results, `best` better ones than `fast`, and a calibration better ones than none. Captions of the calibration are not
judged; errors of pictures are pooled as noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product

from nfq_core.demo.calibrate import CALIBRATION_SEED
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.planning.settings import PRESETS, Settings

from ..shared import markdown_table, run_command
from .worlds import WORLDS, Judge, World, quantized

CAPTIONS, SEEDS = 16, (0, 1000)
PROMPTS = 32  # Captions of the calibration
FIGURES = {"output_db": "output", "picture_db": "pictures", "median_picture_db": "median picture"}
# By effort: a format for every layer, which has slightly more bits than the preset that it is compared with.
ONE_FORMAT = {"fast": "nf16_b64", "best": "t4w8_b64"}
COMPARED = "balanced"
NAMES = [name for name, _ in sorted(PRESETS.items(), key=lambda item: -item[1])]


def rows_of(world: World) -> Iterator[dict]:
    """A row for each preset, effort and calibration."""
    judge = Judge(world, world.captions(PROMPTS, CALIBRATION_SEED), CAPTIONS, SEEDS)
    calibration = world.calibrate(PROMPTS)
    cases = [(effort, preset) for effort in EFFORTS for preset in (*NAMES, ONE_FORMAT[effort])]
    for calibrated, (effort, preset) in product((False, True), cases):
        choice = {"preset": preset} if preset in PRESETS else {"format": preset, "conv_format": preset}
        settings = Settings.of(**choice, effort=effort)
        dense, about = quantized(world.weights, settings, calibration if calibrated else None)
        found = {name: about[name] for name in ("packed_bits_per_weight", "expected")} | judge.figures(dense)
        print(f"  {world.name}, {preset}, {effort}, calibrated: {calibrated}: {found['output_db']:.1f} dB", flush=True)
        yield {"model": world.name, "calibrated": calibrated, "effort": effort, "preset": preset, **found}


def run() -> dict:
    """The rows of both models, and what is out of order among them."""
    rows = []
    for world in WORLDS.values():
        if world.weights.exists():
            rows += rows_of(world)
        else:
            print(f"  {world.weights} is missing, so {world.name} is left out")
    return {
        "captions": CAPTIONS,
        "seeds": len(SEEDS),
        "prompts": PROMPTS,
        "rows": rows,
        "out_of_order": [fault for figure in FIGURES for fault in out_of_order(rows, figure)],
    }


def out_of_order(rows: Sequence[Mapping], figure: str) -> list[str]:
    """What should not be.

    A larger preset worse than the next one, `best` worse than `fast`, calibrated worse than not, and, with the same
    calibration, a preset worse than one format.
    """
    found = {(row["model"], row["calibrated"], row["effort"], row["preset"]): row[figure] for row in rows}
    models, efforts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "effort"))
    presets = list(dict.fromkeys(row["preset"] for row in rows if row["preset"] in PRESETS))
    pairs = []
    for model, effort, calibrated in product(models, efforts, (False, True)):
        pairs += [
            ((model, calibrated, effort, one), (model, calibrated, effort, two)) for one, two in pairwise(presets)
        ]
    for model, preset, calibrated in product(models, presets, (False, True)):
        pairs.append(((model, calibrated, "best", preset), (model, calibrated, "fast", preset)))
    for model, effort, preset in product(models, efforts, presets):
        pairs.append(((model, True, effort, preset), (model, False, effort, preset)))
    for model, effort in product(models, efforts):
        pairs.append(((model, True, effort, COMPARED), (model, True, effort, ONE_FORMAT[effort])))
    return [
        f"{figure}: {_words(one)} {found[one]:.1f} < {found[two]:.1f} {_words(two)}"
        for one, two in pairs
        if one in found and two in found and found[one] < found[two]
    ]


def _words(case: tuple[str, bool, str, str]) -> str:
    model, calibrated, effort, preset = case
    return f"{model} {preset} {effort}{' calibrated' if calibrated else ''}"


def table(results: Mapping) -> str:
    """Output and pictures of each preset at both efforts, without a calibration and with one."""
    found = {(row["model"], row["preset"], row["effort"], row["calibrated"]): row for row in results["rows"]}
    lines = []
    for model, preset, effort in dict.fromkeys(case[:3] for case in found):
        without, calibrated = (found[model, preset, effort, kind] for kind in (False, True))
        cells = [model, f"`{preset}`", effort, f"{without['packed_bits_per_weight']:.2f}"]
        for figure in FIGURES:
            gain = calibrated[figure] - without[figure]
            cells += [f"{without[figure]:.1f}", f"{calibrated[figure]:.1f} ({gain:+.1f})"]
        lines.append(cells)
    columns = [cell for words in FIGURES.values() for cell in (f"{words}, dB", "calibrated")]
    header = ["model", "preset", "effort", "packed bits", *columns]
    return markdown_table(header, lines)


if __name__ == "__main__":
    run_command(__doc__, "presets", run)
