"""Weights and models that several test files use."""

from __future__ import annotations

import torch

from nfq_core.unet_keys import UNetArchitecture

TINY = UNetArchitecture(
    name="tiny",
    channels=(32, 64),
    down_depths=((0,), (1,)),
    middle_depth=1,
    up_depths=((1, 1), (0, 0)),
    context_width=48,
    added_width=80,
)


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_half(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_weight(*shape, seed=seed).half()


SMALL_MODEL = {
    "linear.weight": random_half(64, 100),
    "conv.weight": random_half(16, 16, 3, 3, seed=1),
    "norm.bias": random_half(7, seed=2),
}
