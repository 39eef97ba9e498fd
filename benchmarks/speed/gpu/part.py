"""What the parts of the GPU benchmark share: results, random weights, CUDA graphs, memory, other 4-bit layers."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from models import packed_unet
from samples import TINY
from torch import nn

from nfq_core import NFTensor
from nfq_core.models.unet_keys import SDXL_BASE, UNetArchitecture
from nfq_core.planning.settings import Formats, Settings

from ...shared import synchronize

Q4_0_BLOCK = 32
BY_LEVELS = Settings(Formats())  # 16 levels, 32 for convolutions

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
        """Whether there are CUDA graphs, a kernel that decodes and separate memory."""
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


def random_state(part: Part, settings: Settings = BY_LEVELS) -> State:
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


def random_q4_0(shape: Sequence[int], std: float, device: torch.device) -> torch.Tensor:
    """Q4_0 blocks of random codes with about this standard deviation: uint8 of shape (blocks, 18)."""
    size = -(-prod(shape) // Q4_0_BLOCK), 2 + Q4_0_BLOCK // 2
    data = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    # Codes are -8 … 7, all equally likely: a variance of 21.25.
    data[:, :2] = torch.full((1,), std / 21.25**0.5, dtype=torch.float16, device=device).view(torch.uint8)
    return data


def dequantize_q4_0(data: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Q4_0 blocks as fp16 of `shape`; as in the plugins, each call makes the shifts anew."""
    scales, codes = data.split([2, Q4_0_BLOCK // 2], dim=1)
    shifts = torch.tensor([0, 4], device=data.device, dtype=torch.uint8).view(1, 2, 1)
    digits = (codes.unsqueeze(1) >> shifts) & 15
    values = digits.view(len(data), Q4_0_BLOCK).to(torch.int8) - 8
    return (scales.view(torch.float16) * values).view(-1)[: prod(shape)].view(tuple(shape))


class Q4Layer(nn.Module):
    """A Linear or Conv2d layer that dequantises its weight from random Q4_0 blocks at every call."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.shape, self.bias = tuple(layer.weight.shape), layer.bias
        self.convolution = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        blocks = random_q4_0(self.shape, prod(self.shape[1:]) ** -0.5, layer.weight.device)
        self.register_buffer("blocks", blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result with the dequantised weight."""
        weight = dequantize_q4_0(self.blocks, self.shape)
        if self.convolution is None:
            return nn.functional.linear(x, weight, self.bias)
        return nn.functional.conv2d(x, weight, self.bias, *self.convolution)


def nf4_layer(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' 4-bit layer with the weight of a dense fp16 one."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    packed = Linear4bit(*sizes, torch.float16, quant_type="nf4", device="meta")
    packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(layer.weight.device)
    packed.bias = layer.bias
    return packed
