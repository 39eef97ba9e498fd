"""Correctness and speed on a GPU, in one run of less than eight minutes: `python -m benchmarks.speed.gpu`.

Checks the bits of every format; measures the decode, steps of SDXL's UNet at 1024² with CFG, converting a file of its
size at both efforts, and loading. Each part has its own process and time budget: if it fails, breaks the GPU's context
or runs out of time, the other parts and what it had found are still reported. Results are written after each part; the
exit status is 1 if anything failed. `--device cpu --small --out FILE` tries the script without a GPU. Needs diffusers
and 9 GB of disk; bitsandbytes is used if installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..shared import ROOT, argument_parser, left_out, markdown_table, spread, write_json, write_results
from . import gpu_parts
from .gpu_parts import Part

GRACE_SECONDS = 10  # After its budget, what a part may take for the work in hand

# Most important first, with the seconds that each may take.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "bits": (gpu_parts.bits, 65),
    "decode": (gpu_parts.decode, 55),
    "step": (gpu_parts.step, 150),
    "convert": (gpu_parts.convert, 110),
    "load": (gpu_parts.load, 40),
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


def work_on(name: str, part: Part, path: Path) -> None:
    """Run one part in this process; what it finds is written to `path` after each piece of work."""

    def save(part: Part) -> None:
        # The process may be stopped at any time.
        write_json(path.with_suffix(".part"), {**part.results, "skipped": part.skipped, "failures": part.failures})
        path.with_suffix(".part").replace(path)

    part.save, (work, _) = save, PARTS[name]
    part.attempt(name, lambda: work(part))


def run_part(name: str, device: torch.device, small: bool, folder: Path, budget: float) -> dict:
    """Run one part in a process of its own, which is stopped when its time is over; returns what it has found."""
    path, started = folder / f"{name}.json", time.time()
    words = ["--device", str(device), "--part", name, str(path), str(started + budget), *["--small"][:small]]
    problem = ""
    try:
        status = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.gpu", *words], cwd=ROOT, timeout=budget + GRACE_SECONDS
        ).returncode
        problem = f"its process ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {budget + GRACE_SECONDS:.0f} s"
    found = {"skipped": {}, "failures": {}} | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    if problem:
        found["failures"][name] = problem
    return {"seconds": round(time.time() - started, 1), **found}


def run(device: torch.device, small: bool, out: Path | None, only: Sequence[str] = tuple(PARTS)) -> bool:
    """Run parts and write the results after each; returns whether nothing failed."""
    results = {"small": small, "device": describe(device), "parts": {}}
    with TemporaryDirectory() as folder:
        for name in only:
            found = results["parts"][name] = run_part(name, device, small, Path(folder), PARTS[name][1])
            write_results("gpu", results, out)
            print(f"{name}: {found['seconds']} s", {"skipped": found["skipped"], "failures": found["failures"]})
    return not any(found["failures"] for found in results["parts"].values())


def table(results: dict) -> str:
    """Steps; the decode; conversion and loading; then lines about bits, what is missing, and the device."""
    parts, facts, device = results["parts"], results["machine"], results["device"]
    failed = [f"{part}, {name}" for part, found in parts.items() for name in found["failures"]]
    skipped = {name: why for found in parts.values() for name, why in found["skipped"].items()}
    texts = [
        _step_table(parts.get("step", {}).get("contestants", {}), results["small"]),
        _format_table(parts.get("decode", {})),
        _other_table(parts),
        _bits_line(parts.get("bits", {})),
        f"Failed: {'; '.join(failed)}." if failed else "",
        left_out(skipped),
        f"{device['name']}, torch {facts['torch']}, {facts['date']}.",
    ]
    return "\n\n".join(text for text in texts if text)


def _step_table(steps: dict, small: bool) -> str:
    rows, dense = [], steps.get("fp16", {}).get("ms")
    for name, one in steps.items():
        if "ms" in one:
            ratio = f" = {one['ms']['median'] / dense['median']:.3f} ×" if dense and name != "fp16" else ""
            own, peak = (f"{one[key] / 1e9:.2f} GB" if key in one else "–" for key in ("own_bytes", "step_bytes"))
            rows.append([name, spread(one["ms"], " ms") + ratio, own, peak])
    title = "tiny shapes, to try the script" if small else "SDXL's UNet, 1024 px, CFG"
    return markdown_table([title, "a step", "weights in VRAM", "a step's peak memory"], rows) if rows else ""


def _format_table(found: dict) -> str:
    rows = []
    for name, one in found.get("formats", {}).items():
        ratio = one["decode"]["median"] / one["copies"]["median"]
        cells = [spread(one[work], " ms", 3) for work in ("decode", "copies", "torch")]
        rows.append([f"`{name}`", f"{cells[0]} = {ratio:.2f} ×", *cells[1:]])
    title = f"a layer of {found.get('weights', 0):,} weights"
    return markdown_table([title, "decode", "copies of as many bytes", "decode in plain torch"], rows) if rows else ""


def _other_table(parts: dict) -> str:
    decode, loading = parts.get("decode", {}), parts.get("load", {}).get("ms", {})
    rows = [
        [f"all {decode['layers']} layers: {name}", spread(ms, " ms")] for name, ms in decode.get("model", {}).items()
    ]
    for effort in gpu_parts.EFFORTS:
        if one := parts.get("convert", {}).get(effort):
            done = "" if one["fraction"] == 1 else f" for {one['fraction']:.0%} of the bytes, then stopped"
            rows.append([f"convert the fp16 file, effort `{effort}`", f"{one['seconds']:.1f} s{done}"])
    rows += [[f"load from page cache: {name}", spread(ms, " ms")] for name, ms in loading.items()]
    return markdown_table(["work", "time"], rows) if rows else ""


def _bits_line(found: dict) -> str:
    if not found.get("checked"):
        return ""
    wrong = f"{len(found['wrong'])} of them differ" if found["wrong"] else "all have the reference's bits"
    return f"Bits: {found['checked']:,} decodes by `torch` and the back-end in use, `{found['backend']}`; {wrong}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda:0", help="default: cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/gpu.json)")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        name, path, deadline = options.part
        if options.device.type == "cuda":
            torch.cuda.set_device(options.device)
        if options.small:
            # With tiny shapes, several threads mostly wait for each other.
            torch.set_num_threads(1)
        work_on(name, Part(options.device, options.small, Path(path).parent, float(deadline)), Path(path))
        return 0
    if (options.small or len(options.only) < len(PARTS)) and not options.out:
        parser.error("--small and --only need --out: the repository holds the results of all parts at SDXL's shapes")
    if problem := without_device(options.device):
        parser.error(problem)
    return 0 if run(options.device, options.small, options.out, options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
