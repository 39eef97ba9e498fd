"""What the GPU benchmark's parts share: results as they come, timing, CUDA graphs, layers of random codes."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from time import monotonic, perf_counter
from typing import TypeVar

import torch

from nfq_core import NFTensor
from nfq_core.files.safefile import Entry
from nfq_core.models.unet_keys import SDXL_BASE, UNetArchitecture, tensor_shapes
from nfq_core.packed.formats import BLOCK, SCALE_STEPS_PER_OCTAVE, BlockFormat, Scales
from nfq_core.packed.packing import pack_codes
from nfq_core.planning.policy import DEFAULTS, Settings, plan_tensors

from ...shared import summary

SMALL = replace(
    SDXL_BASE,
    name="small",
    channels=(32, 64),
    down_depths=((0, 0), (1, 1)),
    middle_depth=1,
    up_depths=((1, 1, 1), (0, 0, 0)),
    context_width=64,
    added_width=32 + 6 * 8,
)
"""Stands in for SDXL where only the script itself is tried."""

PACKAGES = ("triton", "diffusers", "safetensors", "zstandard", "numpy", "bitsandbytes")

SMALLEST_SCALE = 2.0**-14
"""The smallest scale of `random_packed`'s buffers, whose parameters are exponent -14, stride 2."""

Result = TypeVar("Result")


@dataclass
class Part:
    """One part at work: where, how long it may take, and what came of it so far, which is kept in a file.

    Args:
        device: what is measured.
        small: whether shapes are tiny, to try the script.
        deadline: a `monotonic` reading after which nothing new is begun.
        path: the file of results, written anew whenever there are more.
    """

    device: torch.device
    small: bool
    deadline: float
    path: Path
    results: dict = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether there are CUDA graphs, Triton and a memory of its own."""
        return self.device.type == "cuda"

    @property
    def architecture(self) -> UNetArchitecture:
        """The UNet that is measured."""
        return SMALL if self.small else SDXL_BASE

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - monotonic()

    def note(self, **results: object) -> None:
        """Add results."""
        self.results.update(results)
        self.save()

    def target(self, name: str, got: float, at_most: float, unit: str = "×") -> None:
        """Note a figure beside what was wanted of it."""
        self.targets.append({"name": name, "got": got, "at_most": at_most, "unit": unit, "met": got <= at_most})
        self.save()

    def skip(self, name: str, reason: str) -> None:
        """Note what is not measured, and why."""
        self.skipped[name] = reason
        self.save()

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """What `work` returns; where it fails, None, and the failure is noted: what follows still runs."""
        try:
            return work()
        except Exception as error:
            self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        """Note a failure, with the innermost places it came through."""
        places = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(place.filename).name}:{place.lineno}" for place in reversed(places))
        self.failures[name] = f"{type(error).__name__}: {str(error).strip()[:600]} ({where})"
        self.save()

    def save(self) -> None:
        """Write what there is."""
        told = {"skipped": self.skipped, "failures": self.failures, "targets": self.targets}
        text = json.dumps({**self.results, **{name: value for name, value in told.items() if value}})
        partial = self.path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)


def without_device(device: torch.device) -> str:
    """Why nothing can be measured on a device; empty where it can."""
    if device.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        without = "--device cpu --small --out FILE tries the script without"
        return f"cannot measure {device}: torch sees no CUDA device here; {without}"
    count = torch.cuda.device_count()
    return "" if (device.index or 0) < count else f"cannot measure {device}: there are CUDA devices 0 to {count - 1}"


def describe(device: torch.device) -> dict:
    """The device, its driver, and the versions of what is used."""
    told: dict[str, object] = {"name": str(device)}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        told = {
            "name": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "multiprocessors": facts.multi_processor_count,
            "l2_mib": getattr(facts, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": _ask_driver(device.index or 0),
        }
    return told | {"versions": {name: _version(name) for name in PACKAGES}}


def _ask_driver(index: int) -> str:
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu"
    command = ["nvidia-smi", "-i", str(index), f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def synchronize(device: torch.device) -> None:
    """Wait until a device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(part: Part, works: Mapping[str, Callable[[], object]], rounds: int, repeat: int = 1) -> dict[str, dict]:
    """Run contestants in turns; milliseconds of a run, and of the host's share in it, as `summary`.

    The first round warms up. Rounds end early, after three, when the part's time is up.

    Args:
        part: the part at work.
        works: what to run, by name.
        rounds: how often.
        repeat: runs within one reading, for short ones.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for number in range(rounds + 1):
        if number > 3 and part.left() < 0:
            break
        for name, work in works.items():
            synchronize(part.device)
            started = perf_counter()
            for _ in range(repeat):
                work()
            issued = perf_counter()
            synchronize(part.device)
            if number:
                readings = (perf_counter() - started, issued - started)
                samples[name].append(tuple(1e3 * reading / repeat for reading in readings))
    return {
        name: {"ms": summary([total for total, _ in found]), "host_ms": statistics.median(host for _, host in found)}
        for name, found in samples.items()
    }


def graphed(device: torch.device, work: Callable[[], object], pool: tuple | None = None) -> Callable[[], object]:
    """`work` as the replay of a CUDA graph; on a device without them, `work`.

    Args:
        device: where it works.
        work: reads and writes the same memory whenever it is called.
        pool: memory shared with other graphs, none of which runs beside it; see `torch.cuda.graph_pool_handle`.
    """
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def added_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes of a CUDA device's memory that a run takes at its peak, beyond what is there before."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def layer_formats(
    architecture: UNetArchitecture, settings: Settings = DEFAULTS
) -> dict[str, tuple[tuple[int, ...], BlockFormat | None]]:
    """Shape and format (None: kept) of every tensor of a UNet by its diffusers name."""
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in tensor_shapes(architecture, "diffusers").items()}
    return {name: (plan.shape, plan.format) for name, plan in plan_tensors(entries, settings)[1].items()}


def random_packed(
    shape: Iterable[int], fmt: BlockFormat, generator: torch.Generator, std: float | None = None
) -> NFTensor:
    """A packed weight of random codes on the generator's device.

    Args:
        shape: of the weight.
        fmt: any format.
        generator: the source.
        std: about the weight's standard deviation; by default scales are drawn from all that there are.
    """
    shape = tuple(shape)
    device, weights = generator.device, prod(shape)
    sections, blocks = fmt.sections(weights), -(-weights // BLOCK)

    def bytes_below(limit: int, count: int) -> torch.Tensor:
        return torch.randint(0, limit, (count,), dtype=torch.uint8, device=device, generator=generator)

    data = torch.zeros(sections.end, dtype=torch.uint8, device=device)
    data[: 2 * fmt.levels].view(torch.float16).copy_(torch.linspace(-1, 1, fmt.levels))
    if fmt.coarse_radix**fmt.coarse_digits == 256 and fmt.coarse_radix << fmt.fine_bits == fmt.codes:
        data[sections.coarse : sections.superblock_scales] = bytes_below(
            256, sections.superblock_scales - sections.coarse
        )
    else:
        coarse, fine = pack_codes(bytes_below(fmt.codes, blocks * BLOCK).view(blocks, BLOCK), fmt)
        data[sections.coarse : sections.fine] = coarse.view(-1)
        if fmt.fine_bits:
            data[sections.fine : sections.superblock_scales] = fine.view(-1)
    scale_codes = bytes_below(256, blocks)
    if fmt.scales is Scales.ARTICLE:
        maxima = data[sections.superblock_scales : sections.block_scales].view(torch.float32)
        maxima.uniform_(0.001, 3, generator=generator)
    else:
        data[2 * fmt.levels : 2 * fmt.levels + 2] = torch.tensor([256 - 14, 2], dtype=torch.uint8, device=device)
        if std is not None:
            # Levels evenly spread over ±1 have a variance of a third.
            octaves = math.log2(std * 3**0.5 / SMALLEST_SCALE)
            scale_codes = 1 + round(octaves * SCALE_STEPS_PER_OCTAVE / 2) + bytes_below(5, blocks) - 2
    data[sections.block_scales :] = scale_codes
    return NFTensor(data, fmt, shape, torch.float16)


def fan_in_std(shape: tuple[int, ...]) -> float:
    """The standard deviation of a weight under which activations neither vanish nor explode."""
    return prod(shape[1:]) ** -0.5


def random_unet(
    architecture: UNetArchitecture, generator: torch.Generator, settings: Settings = DEFAULTS
) -> dict[str, NFTensor | torch.Tensor]:
    """A UNet under diffusers names, codes random, kept tensors fp16, on the generator's device."""
    made: dict[str, NFTensor | torch.Tensor] = {}
    for name, (shape, fmt) in layer_formats(architecture, settings).items():
        if fmt is not None:
            made[name] = random_packed(shape, fmt, generator, fan_in_std(shape))
            continue
        made[name] = torch.empty(shape, dtype=torch.float16, device=generator.device)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        made[name].normal_(float(is_norm), fan_in_std(shape) if len(shape) > 1 else 0.05, generator=generator)
    return made
