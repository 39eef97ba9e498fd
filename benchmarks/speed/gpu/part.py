"""What the parts of the GPU benchmark share: results and failures, random weights, CUDA graphs, memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from models import packed_unet
from samples import TINY

from nfq_core import NFTensor
from nfq_core.models.unet_keys import SDXL_BASE, UNetArchitecture
from nfq_core.planning.settings import DEFAULTS, Settings

from ...shared import synchronize

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
