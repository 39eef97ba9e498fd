"""What the parts of the GPU benchmark share: results and failures, CUDA graphs, memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from models import packed_unet
from samples import TINY

from nfq_core import NFTensor
from nfq_core.models.unet_keys import SDXL_BASE, UNetArchitecture
from nfq_core.planning.settings import DEFAULTS, Settings

from ...shared import synchronize

PACKAGES = ("triton", "diffusers", "safetensors", "zstandard", "numpy", "bitsandbytes")

Result = TypeVar("Result")
State = Mapping[str, NFTensor | torch.Tensor]


@dataclass
class Part:
    """One part at work: the device, whether shapes are tiny (to try the script), and what it has found so far."""

    device: torch.device
    small: bool
    results: dict = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether there are CUDA graphs, Triton and separate memory."""
        return self.device.type == "cuda"

    @property
    def architecture(self) -> UNetArchitecture:
        """The UNet to measure."""
        return TINY if self.small else SDXL_BASE

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """Return what `work` returns; if it fails, record the failure and return None, so that the rest still runs."""
        try:
            return work()
        except Exception as error:
            places = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(place.filename).name}:{place.lineno}" for place in reversed(places))
            self.failures[name] = f"{type(error).__name__}: {str(error).strip()[:600]} ({where})"
            return None


@lru_cache
def _random_state(architecture: UNetArchitecture, settings: Settings) -> State:
    return packed_unet(architecture, "diffusers", settings)


def random_state(part: Part, settings: Settings = DEFAULTS) -> State:
    """A UNet's tensors on the device, quantised by the usual rules, with random codes."""
    return {name: tensor.to(part.device) for name, tensor in _random_state(part.architecture, settings).items()}


def without_device(device: torch.device) -> str:
    """Why nothing can be measured on a device; empty if it can."""
    if device.type != "cuda" or (device.index or 0) < torch.cuda.device_count():
        return ""
    hint = "try the script with --device cpu --small --out FILE"
    return f"cannot measure {device}: torch sees {torch.cuda.device_count()} CUDA devices here; {hint}"


def describe(device: torch.device) -> dict:
    """The device, and the versions of the packages used."""
    facts: dict[str, object] = {"name": str(device)}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        memory, cuda = round(found.total_memory / 2**30, 1), torch.version.cuda or torch.version.hip
        facts = {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_gib": memory, "cuda": cuda}
    return facts | {"versions": {name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def graphed(device: torch.device, work: Callable[[], object]) -> Callable[[], object]:
    """`work`, which uses the same memory at every call, as the replay of a CUDA graph; `work` on a CPU."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def added_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Peak of a CUDA device's memory during a run, in bytes, less what was in use before."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
