"""What one would pick instead of ours on a GPU: bitsandbytes' NF4; Q4_0 in torch operations, as GGUF plugins decode."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from ...shared import unavailable

Q4_0_BLOCK = 32
Q4_0_BYTES = 2 + Q4_0_BLOCK // 2


def without_bitsandbytes() -> str:
    """Why bitsandbytes takes no part; empty where it does."""
    return unavailable("bitsandbytes")


def random_q4_0(shape: Sequence[int], std: float, generator: torch.Generator) -> torch.Tensor:
    """Q4_0 blocks of random codes with about this standard deviation, uint8 of shape (blocks, 18)."""
    blocks, device = -(-prod(shape) // Q4_0_BLOCK), generator.device
    data = torch.randint(0, 256, (blocks, Q4_0_BYTES), dtype=torch.uint8, device=device, generator=generator)
    # Codes are -8 … 7, all alike often: a variance of 21.25.
    data[:, :2] = torch.full((1,), std / 21.25**0.5, dtype=torch.float16, device=device).view(torch.uint8)
    return data


def dequantize_q4_0(data: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Q4_0 blocks as fp16 of `shape`, one torch operation after the other, the shifts made anew for every call."""
    scales, codes = data.split([2, Q4_0_BLOCK // 2], dim=1)
    shifts = torch.tensor([0, 4], device=data.device, dtype=torch.uint8).view(1, 2, 1)
    digits = (codes.unsqueeze(1) >> shifts) & 15
    values = digits.view(len(data), Q4_0_BLOCK).to(torch.int8) - 8
    return (scales.view(torch.float16) * values).view(-1)[: prod(shape)].view(tuple(shape))


class Q4Linear(nn.Module):
    """A Linear layer whose weight is dequantised from Q4_0 blocks whenever it runs."""

    def __init__(self, layer: nn.Linear, blocks: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.bias = tuple(layer.weight.shape), layer.bias
        self.register_buffer("blocks", blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the dequantised weight."""
        return nn.functional.linear(x, dequantize_q4_0(self.blocks, self.shape), self.bias)


class Q4Conv2d(nn.Module):
    """A Conv2d layer of SDXL's kinds, its weight likewise."""

    def __init__(self, layer: nn.Conv2d, blocks: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.bias = tuple(layer.weight.shape), layer.bias
        self.stride, self.padding = layer.stride, layer.padding
        self.register_buffer("blocks", blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution with the dequantised weight."""
        weight = dequantize_q4_0(self.blocks, self.shape)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def q4_0_layer(layer: nn.Module, generator: torch.Generator, std: float) -> nn.Module:
    """A Q4_0 layer of random codes in the place of a Linear or Conv2d."""
    blocks = random_q4_0(layer.weight.shape, std, generator)
    return (Q4Linear if isinstance(layer, nn.Linear) else Q4Conv2d)(layer, blocks)


def nf4_layer(layer: nn.Linear, device: torch.device) -> nn.Module:
    """bitsandbytes' 4-bit layer in the place of a dense fp16 one on `device`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, torch.float16, quant_type="nf4", device="meta"
    )
    packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(device)
    packed.bias = layer.bias
    return packed
