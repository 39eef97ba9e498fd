"""Everything that has to be known of a GPU, in one run of nine minutes: `python -m benchmarks.speed.gpu`.

Are the bits right; how fast is the decode beside copies; what does a whole step of SDXL's UNet take, packed, with
LoRAs, resident, compiled, beside fp16, bitsandbytes' NF4 and Q4_0 in torch operations; how long do quantising and
loading take; with `--host` and COMFYUI_PATH, some tests in a real ComfyUI. Every part is a process of its own: one that
fails, hangs or breaks the GPU's context leaves the others. Results are written after each part, failures and what was
skipped with them; the exit status is 1 where anything failed.

`--device cpu --small --out FILE` tries the script without a GPU. Needs diffusers; bitsandbytes takes part where
it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from ...shared import markdown_table, write_results
from .decode import correctness, decode, tuning
from .files import files
from .host import host
from .part import Part, describe, without_device
from .step import compiled, step

BUDGET = 540
"""Seconds for everything."""

UNNEEDED = ("peft", "torchvision", "transformers")
"""What diffusers imports where it is installed: a UNet needs none of it, and some versions do not go together."""

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
    "host": Plan(host, 60, 300),
    "tuning": Plan(tuning, 30, 60),
    "compile": Plan(compiled, 60, 300),
}
"""In the order of what matters most."""


def run_part(name: str, device: str, small: bool, seconds: float, path: Path) -> int:
    """Do one part in this process, its results in `path`; returns the exit status."""
    part = Part(torch.device(device), small, monotonic() + seconds, path)
    part.save()
    sys.modules.update(dict.fromkeys(UNNEEDED))
    if part.on_gpu:
        torch.cuda.set_device(part.device)
    if small:
        # With tiny shapes, several threads mostly wait for each other.
        torch.set_num_threads(1)
    part.attempt(name, lambda: PARTS[name].work(part))
    return 1 if part.failures else 0


def run_apart(name: str, options: argparse.Namespace, seconds: float) -> dict:
    """Do one part in a process of its own; what came of it, also where it was stopped or broke down."""
    started, failure = monotonic(), ""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "part.json", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "benchmarks.speed.gpu", "--part", name, "--device", options.device]
        command += ["--out", str(path), "--budget", str(seconds - LEAVE), *(["--small"] if options.small else [])]
        with log.open("wb") as told:
            # A session of its own, so that what it started is stopped with it.
            process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
        if not failure and process.returncode not in (0, 1):
            failure = f"ended with status {process.returncode}: {log.read_text(errors='replace')[-1500:]}"
        if not failure and not path.exists():
            failure = f"did not begin: {log.read_text(errors='replace')[-1500:]}"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if failure:
        found["failures"] = {**found.get("failures", {}), name: failure}
    status = "failed" if found.get("failures") else "ok"
    return {"status": status, "seconds": round(monotonic() - started, 1), **found}


def _end(process: subprocess.Popen) -> None:
    """Kill a part's process and its session; Windows has no sessions, there it is killed alone."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


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
        write_results("gpu", results, options.out)
        told = found.get("reason") or f"{found['seconds']} s"
        print(f"{name}: {found['status']}, {told}", *_lines(found), sep="\n  ", flush=True)
    return all(found["status"] != "failed" for found in results["parts"].values())


def _lines(found: dict) -> list[str]:
    lines = [f"FAILED {name}: {told}" for name, told in found.get("failures", {}).items()]
    lines += [f"skipped {name}: {told}" for name, told in found.get("skipped", {}).items()]
    return lines + [("" if one["met"] else "MISSED ") + _told(one) for one in found.get("targets", [])]


def _told(target: dict) -> str:
    return f"{target['name']}: {target['got']:.3f} {target['unit']}, wanted at most {target['at_most']}"


def table(results: dict) -> str:
    """The README's tables: a step, compiled, all else; a line each on bits and host; what was missed or failed."""
    parts = results["parts"]
    texts = [_step_table(parts["step"], results["small"]), _compile_table(parts["compile"]), _times_table(parts)]
    texts += [_correctness_line(parts["correctness"]), _host_line(parts["host"])]
    missed = [_told(one) for found in parts.values() for one in found.get("targets", []) if not one["met"]]
    failed = [f"{part}, {name}" for part, found in parts.items() for name in found.get("failures", {})]
    texts += [f"Missed: {'; '.join(missed)}."] if missed else []
    texts += [f"Failed: {'; '.join(failed)}."] if failed else []
    machine, device = results["machine"], results["device"]
    triton = device["versions"]["triton"]
    texts.append(f"{device['name']}, torch {machine['torch']}, Triton {triton}, {machine['date']}.")
    return "\n\n".join(text for text in texts if text)


def _milliseconds(reading: dict, base: dict | None = None) -> str:
    one = reading["ms"]
    text = f"{one['median']:.2f} ms ({one['min']:.2f} – {one['max']:.2f})"
    return f"{text} = {one['median'] / base['ms']['median']:.3f} ×" if base else text


def _step_table(found: dict, small: bool) -> str:
    contestants = {name: one for name, one in found.get("contestants", {}).items() if "ms" in one}
    if not contestants:
        return ""
    graphs, rows = found.get("graphs", {}), []
    for name, one in contestants.items():
        is_base = name == "fp16"
        graph = graphs.get(name)
        memory = f"{one['own_bytes'] / 1e9:.2f} GB"
        rows.append(
            [
                name,
                _milliseconds(one, None if is_base else contestants.get("fp16")),
                _milliseconds(graph, None if is_base else graphs.get("fp16")) if graph else "–",
                f"{memory} + {one['step_bytes'] / 1e9:.2f} GB" if "step_bytes" in one else memory,
            ]
        )
    header = [
        "tiny shapes, to try the script" if small else "SDXL's UNet, 1024 px, CFG",
        "a step",
        "as a CUDA graph",
        "weights + step's peak",
    ]
    return markdown_table(header, rows)


def _compile_table(found: dict) -> str:
    rows = []
    for way, contestants in found.get("compiled", {}).items():
        # Nothing but the first call is known of what was stopped after it.
        base = contestants.get("fp16") if "ms" in contestants.get("fp16", {}) else None
        for name, one in contestants.items():
            told = _milliseconds(one, None if name == "fp16" else base) if "ms" in one else "–"
            memory = f"{one['step_bytes'] / 1e9:.2f} GB" if "step_bytes" in one else "–"
            rows.append([f"{way}: {name}", told, f"{one['first_call_s']:.1f} s", memory])
    return markdown_table(["under torch.compile", "a step", "first call", "step's peak memory"], rows) if rows else ""


def _correctness_line(found: dict) -> str:
    if "checked" not in found:
        return ""
    line = f"Bits: {found['checked']} decodes ({found['backend']}), {len(found['wrong'])} with others than the CPU's"
    errors = [abs(one["cpu_db"] - one["device_db"]) for one in found.get("quantise", {}).values()]
    return f"{line}; quantised there, errors are within {max(errors):.3f} dB of the CPU's." if errors else f"{line}."


def _host_line(found: dict) -> str:
    tests = found.get("tests")
    if tests:
        return f"In a ComfyUI: {list(tests.values()).count('passed')} of {len(tests)} tests passed."
    reason = found.get("reason") or found.get("skipped", {}).get("host")
    return f"In a ComfyUI: no tests, {reason}." if reason else ""


LABELS = {
    "decode": "decode into one buffer",
    "copies": "copies and fills that read and write as many bytes",
    "even copies": "copies that move as many bytes, half of them read",
    "operation": "decode into new memory, as layers do",
    "torch": "decode in plain torch",
    "bitsandbytes NF4": "bitsandbytes' decode of NF4",
    "Q4_0 in torch": "decode of Q4_0 in torch, as GGUF plugins do",
}


def _times_table(parts: dict) -> str:
    decode, files = parts["decode"], parts["files"]
    graphs = decode.get("graph", {}).items()
    rows = [[f"{LABELS[name]}, as a CUDA graph", _milliseconds(one)] for name, one in graphs]
    rows += [
        [LABELS[name], f"{_milliseconds(one)}, {one['host_us_per_layer']:.1f} µs a layer on the host"]
        for name, one in decode.get("eager", {}).items()
    ]
    rows += [["quantise", _milliseconds(files["quantise"])]] if "quantise" in files else []
    rows += [[f"first load: {name}", f"{1e3 * one:.2f} ms"] for name, one in files.get("first_load_s", {}).items()]
    rows += [[f"load from page cache: {name}", _milliseconds(one)] for name, one in files.get("load", {}).items()]
    return markdown_table([f"all {decode.get('layers', '')} layers", "time"], rows) if rows else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="where the results go; by default among the benchmarks' results")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; by default all")
    parser.add_argument("--host", action="store_true", help="also run tests in the ComfyUI that COMFYUI_PATH names")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sys.exit(run_part(options.part, options.device, options.small, options.budget, options.out))
    if (options.small or options.only) and not options.out:
        parser.error("--small and --only need --out: the repository holds the results of all parts at SDXL's shapes")
    problem = without_device(torch.device(options.device))
    sys.exit(problem or (0 if run(options) else 1))
