"""Other 4-bit layers on a GPU: bitsandbytes' NF4, and Q4_0 decoded in torch operations, as GGUF plugins do."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

Q4_0_BLOCK = 32


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
