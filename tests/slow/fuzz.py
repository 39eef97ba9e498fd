"""Mutated files put to every reader: `python tests/slow/fuzz.py --files 100000`.

A file is a container, a calibration, an article file, or plain safetensors, changed at random as in
`tests/helpers/mutations.py`. `tests/helpers/trial.py` checks the outcome: the numbers that a second reader reads, or
one of our errors. File `i` of a seed is always the same. Its memory is the growth of the process's peak while it is
tried, less twice the file's size. The process's address space is limited, so that memory that is requested but never
touched counts too. The second reader reads the file before that, and has no limit. For Linux.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from trial import Fault, Trials, reset_peak, status

from benchmarks.shared import argument_parser, machine, write_results

SECONDS = 20
"""A file that takes longer counts as one that hangs."""

GROWTH_BYTES = 8 << 20
"""Memory that a file may take beyond twice its size, for its few numbers and for what allocators keep."""

SPACE_BYTES = 1 << 30
"""Address space beyond what the process has at first."""


def _hangs(*_: object) -> None:
    raise Fault(f"it takes more than {SECONDS} seconds")


def run(files: int, seed: int, folder: Path) -> dict:
    """Try `files` mutated files one after the other."""
    torch.set_num_threads(1)
    # Conversions warn about tensors that they keep.
    logging.getLogger("nfq").setLevel(logging.CRITICAL)
    trials = Trials(folder)
    for number in range(100):
        # Fill the caches.
        trials.draw(Random(f"warm {number}")).run()
    space = status("VmSize") + SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, _hangs)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in Trials.KINDS}
    faults: list[dict] = []
    worst_seconds = worst_bytes = 0.0
    started = perf_counter()
    for number in range(files):
        attempt = trials.draw(Random(f"{seed} {number}"))
        before, begun = reset_peak(), perf_counter()
        signal.alarm(SECONDS)
        try:
            outcomes[attempt.kind][attempt.run()] += 1
            grown = status("VmHWM") - before
            if grown > 2 * attempt.file_bytes + GROWTH_BYTES:
                raise Fault(f"it has {attempt.file_bytes:,} bytes and takes {grown:,} of memory")
            worst_bytes = max(worst_bytes, grown - 2 * attempt.file_bytes)
        except Fault as fault:
            faults.append({"file": number, "fault": str(fault)})
            print(f"file {number}: {fault}", flush=True)
        finally:
            signal.alarm(0)
        worst_seconds = max(worst_seconds, perf_counter() - begun)
        if (number + 1) % 10_000 == 0:
            print(f"{number + 1:,} files, {perf_counter() - started:.0f} s, {len(faults)} faults", flush=True)
    refused = sum(outcomes.values(), Counter())
    loaded = refused.pop("loaded", 0)
    return {
        "files": files,
        "seed": seed,
        "loaded": loaded,
        "refused": dict(refused),
        "faults": faults,
        "worst_seconds": round(worst_seconds, 3),
        "worst_memory_bytes": int(worst_bytes),
        "seconds": round(perf_counter() - started, 1),
        "by_kind": {kind: dict(counts) for kind, counts in outcomes.items()},
    }


def main() -> int:
    """Run the command line; returns 1 if a reader was wrong."""
    parser = argument_parser(__doc__)
    parser.add_argument("--files", type=int, default=100_000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other files (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/fuzz.json)")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        results = run(options.files, options.seed, Path(folder))
    write_results("fuzz", results, options.out)
    print({name: value for name, value in results.items() if name != "by_kind"})
    return 1 if results["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
