"""What every benchmark shares: the machine, what is missing on it, medians with spread, JSON, Markdown tables."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from nfq_core.report.markdown import markdown_table as markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict:
    """Processor, number of usable processors, memory and versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def process_status(pid: int | str = "self") -> dict[str, int]:
    """The numbers that Linux tells of a process by their names in /proc/<pid>/status, memory in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {
        name: int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
        for name, words in fields.items()
        if words and words[0].isdecimal()
    }


def unavailable(package: str) -> str:
    """Why a package cannot be used; empty where it can."""
    if find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{package} cannot be imported ({type(error).__name__}: {error})"
    return ""


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = perf_counter()
    work()
    return perf_counter() - started


def in_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: Callable[[Callable[[], object]], float] = timed,
) -> dict[str, list[float]]:
    """Seconds of each contestant's calls, one a round, the contestants in turns, after a round that warms up.

    Args:
        contestants: what to call, by name.
        rounds: those that count.
        seconds: makes one call and tells how long it took.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            samples[name].append(seconds(call))
    return {name: taken[1:] for name, taken in samples.items()}


@contextmanager
def call_seconds(module: nn.Module) -> Iterator[list[float]]:
    """The seconds that each of a module's calls takes until the device has finished it."""
    seconds: list[float] = []
    started = 0.0

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return perf_counter()

    def before(*_: object) -> None:
        nonlocal started
        started = now()

    hooks = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(lambda *_: seconds.append(now() - started)),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def summary(samples: Sequence[float]) -> dict:
    """Minimum, median and maximum of repeated measurements."""
    return {"min": min(samples), "median": statistics.median(samples), "max": max(samples), "runs": len(samples)}


def command(name: str) -> str:
    """The command that runs this benchmark with this process's arguments; of a path, its last component alone."""

    def told(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return option + equals + (Path(value).name or value)

    return shlex.join(["python", "-m", f"benchmarks.{name}", *map(told, sys.argv[1:])])


def with_origin(name: str, results: dict) -> dict:
    """A benchmark's results, after the command and the machine that made them."""
    return {"command": command(name), "machine": machine(), **results}


def write_json(path: Path, results: dict) -> None:
    """Write results as JSON, into a folder that is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_results(name: str, results: dict, path: Path | None = None) -> Path:
    """Write the results `with_origin` of `benchmarks.<name>`; in RESULTS by default."""
    path = path or RESULTS / f"{name}.json"
    write_json(path, with_origin(name, results))
    return path
