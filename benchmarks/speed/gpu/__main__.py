"""Correctness and speed on a GPU, in one run: `python -m benchmarks.speed.gpu`.

It checks the bits of every format, and measures the decode, compared with copies of as many bytes; a whole step of
SDXL's UNet (packed, with LoRAs, resident, compiled), compared with fp16, bitsandbytes' NF4 and Q4_0 in torch
operations; quantising and loading. It writes the results after each part, with failures and skipped measurements. The
exit status is 1 if anything failed. After a failure that breaks the GPU's context, run the other parts with --only.

`--device cpu --small --out FILE` tries the script without a GPU. Needs diffusers; bitsandbytes is used if installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import torch

from ...shared import argument_parser, write_results
from .decode import correctness, decode
from .files import files
from .part import Part, describe, without_device
from .step import compiled, step

PARTS: dict[str, Callable[[Part], None]] = {
    "correctness": correctness,
    "decode": decode,
    "step": step,
    "files": files,
    "compile": compiled,
}
"""Most important first."""


def run(device: torch.device, small: bool, out: Path | None, only: Sequence[str] = tuple(PARTS)) -> bool:
    """Run parts and write the results after each; returns whether nothing failed."""
    results = {"small": small, "device": describe(device), "parts": {}}
    for name in only:
        part, started = Part(device, small), monotonic()
        part.attempt(name, lambda name=name, part=part: PARTS[name](part))
        seconds = round(monotonic() - started, 1)
        problems = {"skipped": part.skipped, "failures": part.failures}
        results["parts"][name] = {"seconds": seconds, **part.results, **problems}
        write_results("gpu", results, out)
        print(
            f"{name}: {seconds} s", *(f"{key} {one}: {why}" for key in problems for one, why in problems[key].items())
        )
        if part.on_gpu:
            torch.cuda.empty_cache()
    return not any(found["failures"] for found in results["parts"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda:0", help="default: cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/gpu.json)")
    options = parser.parse_args(arguments)
    if (options.small or len(options.only) < len(PARTS)) and not options.out:
        parser.error("--small and --only need --out: the repository holds the results of all parts at SDXL's shapes")
    if problem := without_device(options.device):
        parser.error(problem)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    if options.small:
        # With tiny shapes, several threads mostly wait for each other.
        torch.set_num_threads(1)
    return 0 if run(options.device, options.small, options.out, options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
