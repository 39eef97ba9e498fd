"""Everything that has to be known of a GPU, in one run of nine minutes: `python -m benchmarks.gpu`.

Are the bits right; how fast is the decode beside copies; what does a whole step of SDXL's UNet take, packed, with
LoRAs, resident, compiled, beside fp16, bitsandbytes' NF4 and Q4_0 in torch operations; how long do quantising and
loading take; with `--host` and COMFYUI_PATH, some tests in a real ComfyUI. Every part is a process of its own: one that fails,
hangs or breaks the GPU's context leaves the others. Results are written after each part, failures and what was skipped
with them; the exit status is 1 where anything failed.

`--device cpu --small` tries the script without a GPU. Needs diffusers; bitsandbytes takes part where it is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from .gpu_bench import Part, describe
from .gpu_decode import correctness, decode, tuning
from .gpu_files import files
from .gpu_host import host
from .gpu_step import compiled, step
from .report import RESULTS, write_results

BUDGET = 540
"""Seconds for everything."""

LEAVE = 5
"""Seconds by which a part's own deadline lies before the end of its process."""


@dataclass(frozen=True)
class Plan:
    """A part: what it does, and the seconds it is not begun without and is stopped after."""

    work: Callable[[Part], None]
    at_least: int
    at_most: int


PARTS = {
    "correctness": Plan(correctness, 30, 150),
    "decode": Plan(decode, 25, 90),
    "step": Plan(step, 45, 150),
    "files": Plan(files, 30, 180),
    "tuning": Plan(tuning, 30, 60),
    "compile": Plan(compiled, 60, 300),
    "host": Plan(host, 60, 300),
}
"""In the order of what matters most."""


def run_part(name: str, device: str, small: bool, seconds: float, path: Path) -> int:
    """Do one part in this process, its results in `path`; returns the exit status."""
    part = Part(torch.device(device), small, monotonic() + seconds, path)
    part.save()
    if part.on_gpu:
        torch.cuda.set_device(part.device)
    if small:
        # With tiny shapes, several threads mostly wait for each other.
        torch.set_num_threads(1)
    part.attempt(name, lambda: PARTS[name].work(part))
    return 1 if part.failures else 0


def run_apart(name: str, options: argparse.Namespace, seconds: float) -> dict:
    """Do one part in a process of its own; what came of it, also where it was stopped or broke down."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", options.device]
        command += ["--out", str(path), "--budget", str(seconds - LEAVE), *(["--small"] if options.small else [])]
        started = monotonic()
        failure = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
            if done.returncode not in (0, 1):
                failure = f"ended with status {done.returncode}: {done.stderr[-1500:]}"
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not path.exists():
            failure = failure or f"did not begin: {done.stderr[-1500:]}"
    if failure:
        found["failures"] = {**found.get("failures", {}), name: failure}
    status = "failed" if found.get("failures") else "ok"
    return {"status": status, "seconds": round(monotonic() - started, 1), **found}


def run(options: argparse.Namespace) -> bool:
    """All parts; whether none of them failed."""
    begun = monotonic()
    results = {
        "small": options.small,
        "budget_s": options.budget,
        "device": describe(torch.device(options.device)),
        "parts": {},
    }
    for name, plan in PARTS.items():
        left = options.budget - (monotonic() - begun)
        if name == "host" and not options.host:
            found = {"status": "skipped", "reason": "not asked for: --host"}
        elif options.only and name not in options.only:
            found = {"status": "skipped", "reason": "not asked for: --only"}
        elif left < plan.at_least:
            found = {"status": "skipped", "reason": f"{left:.0f} s were left, it takes {plan.at_least} at least"}
        else:
            found = run_apart(name, options, min(left, plan.at_most))
        results["parts"][name] = found
        results["seconds"] = round(monotonic() - begun, 1)
        write_results("gpu", "python -m benchmarks.gpu", results, options.out)
        told = found.get("reason") or f"{found['seconds']} s"
        print(f"{name}: {found['status']}, {told}", *_lines(found), sep="\n  ", flush=True)
    return all(found["status"] != "failed" for found in results["parts"].values())


def _lines(found: dict) -> list[str]:
    lines = [f"FAILED {name}: {told}" for name, told in found.get("failures", {}).items()]
    lines += [f"skipped {name}: {told}" for name, told in found.get("skipped", {}).items()]
    for one in found.get("targets", []):
        lines.append(
            f"{'' if one['met'] else 'MISSED '}{one['name']}: {one['got']:.3f} {one['unit']}, "
            f"wanted at most {one['at_most']}"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="where the results go")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; by default all")
    parser.add_argument("--host", action="store_true", help="also run tests in the ComfyUI that COMFYUI_PATH names")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sys.exit(run_part(options.part, options.device, options.small, options.budget, options.out))
    sys.exit(0 if run(options) else 1)
