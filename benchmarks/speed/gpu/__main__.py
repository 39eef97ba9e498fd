"""Correctness and speed on a GPU, in one run: `python -m benchmarks.speed.gpu`.

It checks the bits of every format, and measures the decode, steps of SDXL's UNet, quantising and loading. It writes the
results after each part, with failures and skipped measurements; the exit status is 1 if anything failed. After a
failure that breaks the GPU's context, run the other parts with --only. `--device cpu --small --out FILE` tries the
script without a GPU. Needs diffusers; bitsandbytes is used if installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch

from ...shared import argument_parser, write_results
from .decode import correctness, decode
from .part import Part
from .step import compiled, files, step

# Most important first.
PARTS: dict[str, Callable[[Part], None]] = {
    "correctness": correctness,
    "decode": decode,
    "step": step,
    "files": files,
    "compile": compiled,
}


def without_device(device: torch.device) -> str:
    """Why nothing can be measured on a device; empty if it can."""
    if device.type != "cuda" or (device.index or 0) < torch.cuda.device_count():
        return ""
    hint = "try the script with --device cpu --small --out FILE"
    return f"cannot measure {device}: torch sees {torch.cuda.device_count()} CUDA devices here; {hint}"


def describe(device: torch.device) -> dict:
    """The device, and the versions of the packages used."""
    versions: dict[str, str | None] = dict.fromkeys(("triton", "diffusers", "bitsandbytes"))
    for name in versions:
        # ROCm's Triton is another package.
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    if device.type != "cuda":
        return {"name": str(device), "versions": versions}
    found, cuda = torch.cuda.get_device_properties(device), torch.version.cuda or torch.version.hip
    memory = round(found.total_memory / 2**30, 1)
    facts = {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_gib": memory, "cuda": cuda}
    return {**facts, "versions": versions}


def run(device: torch.device, small: bool, out: Path | None, only: Sequence[str] = tuple(PARTS)) -> bool:
    """Run parts and write the results after each; returns whether nothing failed."""
    results = {"small": small, "device": describe(device), "parts": {}}
    for name in only:
        part, started = Part(device, small), perf_counter()
        part.attempt(name, lambda name=name, part=part: PARTS[name](part))
        seconds = round(perf_counter() - started, 1)
        problems = {"skipped": part.skipped, "failures": part.failures}
        results["parts"][name] = {"seconds": seconds, **part.results, **problems}
        write_results("gpu", results, out)
        print(f"{name}: {seconds} s", problems)
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
