"""A UNet of SDXL's exact names and shapes through the command line: `python -m benchmarks.speed.fullsize --dir DIR`.

Makes the synthetic fp16 file (5.14 GB) in DIR unless it is there, converts it at the defaults in a process of its own
and notes time and peak resident memory as the operating system reports it; then reads both files, every byte touched,
in turns, each time in a process of its own, with the files in the page cache and after asking for them to be dropped.
For Linux: other systems report peak memory in other units.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from nfq_core import NFTensor, load

from ..shared import markdown_table, summary, timed, write_results, write_sdxl_unet

READ_RUNS = 5
CONVERT_RUNS = 3


def read_mapped(path: str) -> None:
    """Map a safetensors file, as its library does, and touch every byte where it lies in the page cache."""
    for tensor in load_file(path).values():
        _touch(tensor)


def read_copied(path: str) -> None:
    """Load a safetensors file into memory of its own, which a program needs that lets go of the file."""
    for tensor in [tensor.clone() for tensor in load_file(path).values()]:
        _touch(tensor)


def read_packed(path: str) -> None:
    """Load a container to packed weights in memory, and touch every byte."""
    for tensor in load(path).values():
        _touch(tensor.data if isinstance(tensor, NFTensor) else tensor)


def _touch(tensor: torch.Tensor) -> None:
    tensor.contiguous().view(-1).view(torch.uint8).amax()


READERS = {"fp16_mapped": read_mapped, "fp16_copied": read_copied, "packed": read_packed}


def drop_from_cache(path: Path) -> None:
    """Ask the operating system to forget a file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def peak_resident_bytes(of_children: bool) -> int:
    """The most memory that this process, or the largest of those that it started, had so far."""
    # Not on Windows, where the tables can be made all the same.
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss * 1024


def time_reading(kind: str, path: Path) -> dict:
    """Seconds and peak resident bytes of one reading in a process of its own; imports are not counted in the time."""
    command = [sys.executable, "-m", "benchmarks.speed.fullsize", "--read", kind, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def convert(source: Path, target: Path) -> dict:
    """One conversion at the defaults: what the command reports, wall seconds and peak resident bytes."""
    command = [sys.executable, "-m", "nfq_core", "quantize", str(source), str(target), "--force", "--json"]
    result: dict = {}

    def run_command() -> None:
        result.update(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))

    wall = timed(run_command)
    return {"seconds": wall, "peak_resident_bytes": peak_resident_bytes(of_children=True), "report": result}


def run(folder: Path) -> dict:
    """All measurements, as written to the results."""
    source, target = folder / "sdxl.safetensors", folder / "sdxl.nfq.safetensors"
    if not source.exists():
        write_sdxl_unet(source)
    conversions = [convert(source, target) for _ in range(CONVERT_RUNS)]
    print(conversions, flush=True)
    info = subprocess.run(
        [sys.executable, "-m", "nfq_core", "info", str(target), "--json"], check=True, capture_output=True, text=True
    )
    facts = json.loads(info.stdout)
    reading: dict[str, dict] = {}
    for state in ("warm", "cold"):
        runs: dict[str, list[dict]] = {kind: [] for kind in READERS}
        for _ in range(READ_RUNS):
            for kind in READERS:
                path = target if kind == "packed" else source
                if state == "cold":
                    drop_from_cache(path)
                runs[kind].append(time_reading(kind, path))
        reading[state] = {kind: summary([one["seconds"] for one in found]) for kind, found in runs.items()}
        reading[state]["peak_resident_bytes"] = {
            kind: max(one["peak_resident_bytes"] for one in found) for kind, found in runs.items()
        }
        print(state, reading[state], flush=True)
    return {
        "weights": facts["weights"],
        "layers": len(facts["layers"]),
        "original_bytes": facts["original_bytes"],
        "file_bytes": facts["file_bytes"],
        "bits_per_weight": facts["bits_per_weight"],
        "packed_bits_per_weight": facts["packed_bits_per_weight"],
        "convert_seconds": summary([one["seconds"] for one in conversions]),
        "convert_peak_resident_bytes": max(one["peak_resident_bytes"] for one in conversions),
        "reading": reading,
    }


def table(results: dict) -> str:
    """The README's table."""

    def seconds(found: dict) -> str:
        return f"{found['median']:.2f} s ({found['min']:.2f} – {found['max']:.2f})"

    rows = [
        ["size", f"{results['original_bytes'] / 1e9:.2f} GB", "–", f"{results['file_bytes'] / 1e9:.2f} GB"],
        ["`nfq quantize`, defaults", "–", "–", seconds(results["convert_seconds"])],
        ["its peak resident memory", "–", "–", f"{results['convert_peak_resident_bytes'] / 1e9:.2f} GB"],
    ]
    for state, found in results["reading"].items():
        cells = [seconds(found[kind]) for kind in READERS]
        ratios = [found["packed"]["median"] / found[kind]["median"] for kind in ("fp16_mapped", "fp16_copied")]
        cells[-1] += f" = {ratios[0]:.2f} × mapped, {ratios[1]:.2f} × copied"
        rows.append([f"read, every byte touched, {state} page cache", *cells])
    machine = results["machine"]
    note = f"{machine['processors']} processors ({machine['processor']}), torch {machine['torch']}, {machine['date']}."
    return (
        markdown_table(
            [f"SDXL's UNet, {results['layers']} layers quantised", "fp16, mapped", "fp16, copied", "NFQ"], rows
        )
        + f"\n\n{note}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("fullsize-data"), help="where the files are, 7 GB")
    parser.add_argument("--read", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        kind, file = options.read
        elapsed = timed(lambda: READERS[kind](file))
        print(json.dumps({"seconds": elapsed, "peak_resident_bytes": peak_resident_bytes(of_children=False)}))
    else:
        options.dir.mkdir(exist_ok=True)
        print(write_results("fullsize", run(options.dir)))
