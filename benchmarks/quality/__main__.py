"""Size and quality of our formats compared with the peers': `python -m benchmarks.quality`.

Random weights and the demo model, the latter with the UNet's output and pictures for captions that the calibration did
not see. The peers' own code runs: ggml (`xllamacpp`), bitsandbytes, hqq, sdnq, torch. A package that is not installed
is left out and named (`pip install -e ".[bench]"`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nfq_core.demo.calibrate import collect_demo
from nfq_core.errors import NFQError

from ..shared import argument_parser, machine, write_results
from . import plot
from .checks import checks, left_of, table
from .demo import FACTS, PROMPTS, demo_rows
from .peers import ARTICLE, our_formats, peers
from .weights import cut, model_layers, random_weights, weight_rows


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write; a model's rows are written only with --out."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="measure the weights of this .safetensors file only")
    parser.add_argument("--out", type=Path, help="results file; --model writes none by default")
    options = parser.parse_args(arguments)
    print(machine())
    rivals, skipped = peers()
    fast, facts, rows = our_formats("fast"), {}, []
    if options.model:
        rows = weight_rows(options.model.name, model_layers(options.model), [*rivals, *fast])
    else:
        facts, every = FACTS, [*rivals, *fast, *our_formats("best")]
        for name, weight in random_weights().items():
            rows += weight_rows(name, cut(weight).items(), every)
        rows += demo_rows([*rivals, *fast], collect_demo(PROMPTS))
    articles = list(dict.fromkeys(row["name"] for row in rows if row["family"] == ARTICLE))
    results = {"effort": "fast", **facts, "skipped": skipped, "checks": checks(rows, articles)}
    results |= {"left_of": left_of(rows), "rows": rows}
    print(table(results))
    if not options.model or options.out:
        print(write_results("quality", results, options.out))
    if not options.model:
        print(*plot.main(), sep="\n")


if __name__ == "__main__":
    if hasattr(torch.compiler, "set_stance"):
        # A peer that compiles its decode would compile it again for every shape.
        torch.compiler.set_stance("force_eager")
    try:
        main(sys.argv[1:])
    except NFQError as error:
        sys.exit(f"error: {error}")
