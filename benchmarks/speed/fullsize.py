"""SDXL's UNet through the command line: `python -m benchmarks.speed.fullsize --dir DIR`.

Writes a synthetic fp16 file of SDXL's shapes (5.14 GB) to DIR if there is none, converts it at the defaults, without a
calibration and with a synthetic one, and reads both files, every byte touched, with the files in the page cache and
after a request to drop them. For Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from nfq_core import Calibration, NFTensor, load
from nfq_core.calibration.collector import RANK
from nfq_core.calibration.statistics import MIN_ROWS, LayerInputs
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes

from ..shared import argument_parser, dated_table, json_of, spread, summary, timed, write_results, write_sdxl_unet

READ_RUNS, CONVERT_RUNS = 5, 3
# By name in the results: map a safetensors file, as its library does; load it into memory of its own, which a program
# needs if it closes the file; load a container to packed weights.
READERS: dict[str, Callable[[str], Iterable[torch.Tensor]]] = {
    "fp16_mapped": lambda path: load_file(path).values(),
    "fp16_copied": lambda path: [tensor.clone() for tensor in load_file(path).values()],
    "packed": lambda path: [t.data if isinstance(t, NFTensor) else t for t in load(path).values()],
}


def read_all(kind: str, path: str) -> None:
    """Read a file in one of the ways, and touch every byte."""
    for tensor in READERS[kind](path):
        tensor.contiguous().view(-1).view(torch.uint8).amax()


def drop_from_cache(path: Path) -> None:
    """Ask the operating system to drop a file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def peak_resident_bytes(of_children: bool) -> int:
    """The most memory that this process, or the largest of its children, has had."""
    # Windows has no such module, but makes tables too.
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss * 1024


def read(source: Path, target: Path, cold: bool) -> dict[str, dict]:
    """Seconds (imports not included) and peak resident bytes of each reader, in turns."""
    runs: dict[str, list[dict]] = {kind: [] for kind in READERS}
    for _ in range(READ_RUNS):
        for kind, found in runs.items():
            path = target if kind == "packed" else source
            if cold:
                drop_from_cache(path)
            found.append(json_of("benchmarks.speed.fullsize", "--read", kind, str(path)))
    peaks = {kind: max(one["peak_resident_bytes"] for one in found) for kind, found in runs.items()}
    seconds = {kind: summary([one["seconds"] for one in found]) for kind, found in runs.items()}
    return {**seconds, "peak_resident_bytes": peaks}


def write_calibration(path: Path) -> None:
    """Write a calibration of SDXL's UNet whose inputs share half of their power with random directions."""
    inputs, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in tensor_shapes(SDXL_BASE, "ldm").items():
        if len(shape) >= 2:
            columns = math.prod(shape[1:])
            directions = torch.nn.functional.normalize(torch.randn(columns, min(RANK, columns), generator=generator))
            power = torch.rand(shape[1], generator=generator) + 0.5
            inputs[name] = LayerInputs(power, MIN_ROWS, (directions * 0.5**0.5).half())
    Calibration(inputs, SDXL_BASE.name).save(path, overwrite=True)


def run(folder: Path) -> dict:
    """All measurements, as written to the results."""
    names = ("sdxl.safetensors", "sdxl.nfq.safetensors", "calibrated.nfq.safetensors", "calibration")
    source, target, other, statistics = (folder / name for name in names)
    if not source.exists():
        write_sdxl_unet(source)
    write_calibration(statistics)
    commands = {"convert": (str(target),), "calibrated": (str(other), "--calibration", str(statistics))}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, int] = {}
    # The one with a calibration comes second, because a peak is that of the largest process so far.
    for _ in range(CONVERT_RUNS):
        for name, words in commands.items():
            arguments = ("nfq_core", "quantize", str(source), *words, "--force", "--json")
            taken[name].append(timed(lambda arguments=arguments: json_of(*arguments)))
            peaks.setdefault(name, peak_resident_bytes(of_children=True))
    seconds = {name: summary(found) for name, found in taken.items()}
    print(seconds, peaks, flush=True)
    facts = json_of("nfq_core", "info", str(target), "--json")
    kept = ("weights", "original_bytes", "file_bytes", "bits_per_weight", "packed_bits_per_weight")
    return {
        "layers": len(facts["layers"]),
        **{name: facts[name] for name in kept},
        "convert_seconds": seconds["convert"],
        "convert_peak_resident_bytes": peaks["convert"],
        "calibrated_seconds": seconds["calibrated"],
        "calibrated_peak_resident_bytes": peaks["calibrated"],
        "reading": {state: read(source, target, state == "cold") for state in ("warm", "cold")},
    }


def table(results: dict) -> str:
    """Size, conversion and reading, compared with the fp16 file."""
    calibrated = results["calibrated_seconds"]
    ratio = calibrated["median"] / results["convert_seconds"]["median"]
    rows = [
        ["size", f"{results['original_bytes'] / 1e9:.2f} GB", "–", f"{results['file_bytes'] / 1e9:.2f} GB"],
        ["`nfq quantize`, defaults", "–", "–", spread(results["convert_seconds"], " s")],
        ["its peak resident memory", "–", "–", f"{results['convert_peak_resident_bytes'] / 1e9:.2f} GB"],
        ["the same with a calibration", "–", "–", f"{spread(calibrated, ' s')} = {ratio:.2f} × without"],
        ["its peak resident memory", "–", "–", f"{results['calibrated_peak_resident_bytes'] / 1e9:.2f} GB"],
    ]
    for state, found in results["reading"].items():
        cells = [spread(found[kind], " s") for kind in READERS]
        ratios = [found["packed"]["median"] / found[kind]["median"] for kind in ("fp16_mapped", "fp16_copied")]
        cells[-1] += f" = {ratios[0]:.2f} × mapped, {ratios[1]:.2f} × copied"
        rows.append([f"read, every byte touched, {state} page cache", *cells])
    header = [f"SDXL's UNet, {results['layers']} layers quantised", "fp16, mapped", "fp16, copied", "NFQ"]
    return dated_table(header, rows, results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, default=Path("fullsize-data"), help="folder for the files, 7 GB")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        elapsed = timed(lambda: read_all(*options.read))
        print(json.dumps({"seconds": elapsed, "peak_resident_bytes": peak_resident_bytes(of_children=False)}))
    else:
        options.dir.mkdir(exist_ok=True)
        print(write_results("fullsize", run(options.dir)))
