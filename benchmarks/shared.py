"""What every benchmark uses: facts about the machine, timing, results files, table cells, random weights."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from nfq_core.files.atomic import AtomicFile
from nfq_core.files.safetensors_io import aligned_entries, header_bytes, tensor_bytes
from nfq_core.models.unet_keys import SDXL_BASE, Layout, Shape, tensor_shapes
from nfq_core.parallel import default_threads
from nfq_core.report.markdown import markdown_table as markdown_table

ROOT = Path(__file__).resolve().parent.parent

IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
WEIGHT_STD = 0.03  # Typical standard deviation of an SDXL weight


def machine() -> dict:
    """Processor, number of usable processors, memory and versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    hardware = {"processor": model, "processors": default_threads(), "memory_gib": round(memory / 2**30, 1)}
    software = {"system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
    return {**hardware, **software, "date": date.today().isoformat()}


def process_status(pid: int | str = "self") -> dict[str, int]:
    """Numbers in Linux's /proc/<pid>/status by name, memory in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {
        name: int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
        for name, words in fields.items()
        if words and words[0].isdecimal()
    }


def unavailable(package: str) -> str:
    """Why a package cannot be used; empty if it can."""
    if find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"{package} cannot be imported ({type(error).__name__}: {error})"
    return ""


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = perf_counter()
    work()
    return perf_counter() - started


def in_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: Callable[[Callable[[], object]], float] = timed,
) -> dict[str, list[float]]:
    """Call the contestants in turns, `rounds` times each after a warm-up round; `seconds` times one call.

    Returns:
        The seconds of every call that counts, by contestant.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            samples[name].append(seconds(call))
    return {name: taken[1:] for name, taken in samples.items()}


def synchronize(device: torch.device) -> None:
    """Wait until a device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(works: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, dict]:
    """Call the works in turns; the `summary` of each one's milliseconds until the device has finished it."""

    def finished(work: Callable[[], object]) -> float:
        return timed(lambda: (work(), synchronize(device)))

    taken = in_turns(works, rounds, finished)
    return {name: summary([1000 * seconds for seconds in found]) for name, found in taken.items()}


@contextmanager
def call_seconds(module: nn.Module) -> Iterator[list[float]]:
    """Collect the seconds of each of a module's calls, until the device has finished it."""
    started, seconds, device = [0.0], [], next(module.parameters()).device

    def now() -> float:
        synchronize(device)
        return perf_counter()

    before = module.register_forward_pre_hook(lambda *_: started.append(now()))
    after = module.register_forward_hook(lambda *_: seconds.append(now() - started[-1]))
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


def summary(samples: Sequence[float]) -> dict:
    """Minimum, median and maximum of repeated measurements."""
    return {"min": min(samples), "median": statistics.median(samples), "max": max(samples), "runs": len(samples)}


def spread(found: Mapping[str, float], unit: str = "", digits: int = 2, scale: float = 1) -> str:
    """A `summary` in a table's cell: the median, then the extremes in brackets."""
    median, low, high = (f"{found[which] / scale:.{digits}f}" for which in ("median", "min", "max"))
    return f"{median}{unit} ({low} – {high})"


def left_out(skipped: Mapping[str, str]) -> str:
    """One sentence about the peers left out, each with its reason; empty if there are none."""
    return f"Left out: {'; '.join(f'{name} ({why})' for name, why in skipped.items())}." if skipped else ""


def origin_line(results: dict, *programs: str) -> str:
    """The machine of a results file and the versions of programs (by default torch's), in one line."""
    facts = results["machine"]
    words = ", ".join(programs) or f"torch {facts['torch']}"
    return f"{facts['processors']} processors ({facts['processor']}), {words}, {facts['date']}."


def dated_table(header: Sequence[str], rows: Sequence[Sequence[str]], results: dict, *programs: str) -> str:
    """A table with its `origin_line` below."""
    return f"{markdown_table(header, rows)}\n\n{origin_line(results, *programs)}"


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of a command line that shows a module's docstring as its help."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=shlex.join(_program()), description=doc, formatter_class=formatter)


def run_command(doc: str | None, name: str, run: Callable[[], dict]) -> None:
    """The command line of a benchmark without options: show the machine, measure, write `results/<name>.json`."""
    argument_parser(doc).parse_args()
    print(machine())
    print(write_results(name, run()))


def json_of(*module: str) -> dict:
    """Run `python -m MODULE ARGUMENTS` in a process of its own; returns the JSON that it prints."""
    done = subprocess.run([sys.executable, "-m", *module], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _program() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    module = ".".join(script.with_suffix("").parts).removesuffix(".__main__")
    return ["python", "-m", module] if script.parts[0] == "benchmarks" else ["python", script.as_posix()]


def command() -> str:
    """The command line of this process; each path in it is shortened to its last part."""

    def shortened(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return option + equals + (Path(value).name or value)

    return shlex.join([*_program(), *map(shortened, sys.argv[1:])])


def with_origin(results: dict) -> dict:
    """Results after the command and the machine that made them."""
    return {"command": command(), "machine": machine(), **results}


def write_json(path: Path, results: dict) -> None:
    """Write results as JSON; the folder is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_results(name: str, results: dict, path: Path | None = None) -> Path:
    """Write results and their origin to `path`, by default to `benchmarks/results/<name>.json`; returns the path."""
    path = path or RESULTS / f"{name}.json"
    write_json(path, with_origin(results))
    return path


def read_results(name: str) -> dict:
    """The results in `benchmarks/results/<name>.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def gaussian(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Gaussian weights, fp16."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * WEIGHT_STD).half()


def student_t(shape: tuple[int, ...], seed: int, freedom: int = 5) -> torch.Tensor:
    """Student-t weights of `freedom` degrees of freedom, fp16: a normal over the root of a chi-square's mean."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(shape, generator=generator)
    squares = torch.zeros(shape)
    for _ in range(freedom):
        squares += torch.randn(shape, generator=generator).square_()
    return (normals * (squares / freedom).rsqrt_() * WEIGHT_STD).half()


def channel_spread(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Gaussian weights whose output rows and input channels differ log-normally, with some outliers, fp16."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    rows = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator).mul_(0.35).exp_()
    columns = torch.randn(1, shape[1], *[1] * (len(shape) - 2), generator=generator).mul_(0.35).exp_()
    weight *= rows
    weight *= columns
    outliers = torch.randint(0, weight.numel(), (weight.numel() // 5000,), generator=generator)
    weight.view(-1)[outliers] *= 6
    return weight.mul_(WEIGHT_STD).half()


def write_sdxl_unet(path: Path, layout: Layout = "ldm") -> None:
    """Write a synthetic UNet of SDXL's names and shapes in fp16 (5.14 GB)."""
    write_synthetic(path, tensor_shapes(SDXL_BASE, layout))


def write_synthetic(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Write random fp16 weights under these names."""
    entries = aligned_entries({name: ("F16", shape) for name, shape in shapes.items()})
    header = header_bytes(entries, {"format": "pt"})
    with AtomicFile(path) as file:
        file.write_at(0, header)
        for seed, entry in enumerate(entries.values()):
            make = channel_spread if len(entry.shape) > 1 else gaussian
            file.write_at(len(header) + entry.start, tensor_bytes(make(entry.shape, seed)))
        file.commit()
