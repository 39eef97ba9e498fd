"""Size and quality of our formats compared with the peers': `python -m benchmarks.quality`.

Random weights (Gaussian, Student-t, a convolution whose channels differ) and the demo model, the latter with the UNet's
output and pictures for captions that the calibration did not see. The peers' own code runs: ggml's quantisers
(`xllamacpp`), bitsandbytes, hqq, sdnq, torch. A package that is not installed is left out and named (`pip install -e
".[bench]"`). Sizes count all overheads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nfq_core.demo.calibrate import collect_demo
from nfq_core.errors import NFQError

from ..shared import argument_parser, machine, write_results
from .checks import checks, left_of
from .demo import FACTS, PROMPTS, demo_rows
from .peers import ARTICLE, our_formats, peers
from .plot import plot
from .tables import table
from .weights import cut, model_layers, random_weights, weight_rows


def results_of(rows: list[dict], skipped: dict[str, str], **facts: object) -> dict:
    """The rows, the comparisons that follow from them, and the reason for each peer left out."""
    articles = list(dict.fromkeys(row["name"] for row in rows if row["family"] == ARTICLE))
    return {**facts, "skipped": skipped, "checks": checks(rows, articles), "left_of": left_of(rows), "rows": rows}


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write; a part of the run is written only with --out."""
    parser = argument_parser(__doc__)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="measure small random weights only")
    part.add_argument("--model", type=Path, help="measure the weights of this .safetensors file only")
    parser.add_argument("--out", type=Path, help="results file; --quick and --model write none by default")
    options = parser.parse_args(arguments)
    whole = not options.quick and options.model is None
    print(machine())
    calibration = collect_demo(PROMPTS) if whole else None
    rivals, skipped = peers()
    fast, best = our_formats("fast"), our_formats("best") if whole else []
    if options.model is not None:
        rows = weight_rows(options.model.name, model_layers(options.model), [*rivals, *fast])
    else:
        sources = random_weights(options.quick).items()
        rows = [
            row for name, weight in sources for row in weight_rows(name, cut(weight).items(), [*rivals, *fast, *best])
        ]
    if calibration is not None:
        rows += demo_rows([*rivals, *fast], calibration)
    results = results_of(rows, skipped, effort="fast", **(FACTS if whole else {}))
    print(table(results))
    if whole or options.out:
        print(write_results("quality", results, options.out))
    if whole:
        print(plot(results))


if __name__ == "__main__":
    if hasattr(torch.compiler, "set_stance"):
        # A peer that compiles its decode would compile it again for every shape.
        torch.compiler.set_stance("force_eager")
    try:
        main(sys.argv[1:])
    except NFQError as error:
        sys.exit(f"error: {error}")
