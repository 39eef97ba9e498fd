"""Size and quality of ours beside every peer's: `python -m benchmarks.quality`.

Random weights (Gaussian, Student-t, a convolution whose channels differ) and the demo model, the latter with the
output of the whole UNet and the pictures of captions that no calibration saw. The peers' own code is used: ggml's
quantisers (`xllamacpp`), `bitsandbytes`, `hqq`, `sdnq`, torch; what is not installed (`pip install -e ".[bench]"`) is
left out, and said to be. Apple's palettisation is our own reading of it. All overheads count.

It ends with a list of what was promised, kept or not. `--model FILE` measures the weights of any other model instead,
one layer at a time; `--quick` small random weights alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from nfq_core.calibration.statistics import Calibration
from nfq_core.demo.calibrate import collect_demo
from nfq_core.errors import NFQError
from nfq_core.fitting.codebook import EFFORTS

from ..shared import machine, unavailable, write_results
from .checks import checks, left_of
from .demo import demo_rows
from .judge import HELD_OUT, OUTPUT_BATCH, PROMPTS
from .peers import ARTICLE, Contestant, our_formats, peers
from .plot import PLOT, plot
from .tables import table
from .weights import DEMO, cut, model_layers, random_weights, weight_rows


def results_of(rows: list[dict], skipped: dict[str, str], **facts: object) -> dict:
    """All results: the rows, what follows from them, and what is missing and why."""
    articles = list(dict.fromkeys(row["name"] for row in rows if row["family"] == ARTICLE))
    return {**facts, "skipped": skipped, "checks": checks(rows, articles), "left_of": left_of(rows), "rows": rows}


def run_random(contestants: Sequence[Contestant], quick: bool) -> list[dict]:
    """The rows of the random sources."""
    rows = []
    for source, weight in random_weights(quick).items():
        started = perf_counter()
        print(source, flush=True)
        rows += weight_rows(source, cut(weight).items(), contestants)
        print(f"{source}: {perf_counter() - started:.0f} s", flush=True)
    return rows


def run_demo(contestants: Sequence[Contestant], effort: str, calibration: str | None) -> list[dict]:
    """The rows of the demo model, its calibration collected unless there is a file of one."""
    started = perf_counter()
    statistics = Calibration.load(calibration) if calibration else collect_demo(PROMPTS)
    print(f"demo model, its calibration there after {perf_counter() - started:.0f} s", flush=True)
    rows = demo_rows(contestants, statistics, effort)
    print(f"demo model: {perf_counter() - started:.0f} s", flush=True)
    return rows


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--effort", choices=list(EFFORTS), default="fast", help="effort of our formats; random weights have both"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--model", type=Path, help="a .safetensors file; its weights alone are measured then")
    instead.add_argument("--quick", action="store_true", help="small random weights alone")
    parser.add_argument("--layers", type=int, help="how many of its layers, spread evenly; by default all")
    parser.add_argument("--calibration", help="what `nfq calibrate-demo` wrote; by default it is collected anew")
    parser.add_argument("--out", type=Path, help="JSON; with --model and --quick nothing is written unless it is given")
    parser.add_argument("--plot", type=Path, help=f"PNG; likewise, else {PLOT.name} in docs")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    options = parsed(arguments)
    whole = not options.quick and options.model is None
    started = perf_counter()
    print(machine())
    theirs, skipped = peers()
    for family, reason in skipped.items():
        print(f"{family} is left out: {reason}")
    contestants = [*theirs, *our_formats(options.effort)]
    if options.model is not None:
        rows = weight_rows(options.model.name, model_layers(options.model, options.layers), contestants)
    elif options.quick:
        rows = run_random(contestants, quick=True)
    else:
        rows = run_random([*theirs, *(one for effort in EFFORTS for one in our_formats(effort))], quick=False)
    facts: dict[str, object] = {"effort": options.effort}
    if whole:
        facts |= {"prompts": PROMPTS, "held_out": HELD_OUT, "output_batch": OUTPUT_BATCH}
        missing = unavailable("diffusers")
        if missing:
            skipped[DEMO] = missing
        else:
            rows += run_demo(contestants, options.effort, options.calibration)
    results = results_of(rows, skipped, seconds=round(perf_counter() - started), **facts)
    print(table(results))
    if whole or options.out:
        print(write_results("quality", results, options.out))
    if whole or options.plot:
        missing = unavailable("matplotlib")
        print(f"no plot: {missing}" if missing else plot(results, options.plot or PLOT))


if __name__ == "__main__":
    if hasattr(torch.compiler, "set_stance"):
        # A peer that compiles its decode would do so anew for every shape.
        torch.compiler.set_stance("force_eager")
    try:
        main(sys.argv[1:])
    except NFQError as error:
        sys.exit(f"error: {error}")
