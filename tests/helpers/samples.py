"""Weights, models and inputs of layers that several test files use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from independent_reader import common_levels
from reference import decode, pack_plane, parse

from nfq_core import NFTensor
from nfq_core.fitting.feedback import SecondMoment
from nfq_core.models.diffusers_config import diffusers_config
from nfq_core.models.unet_keys import UNetArchitecture, tensor_shapes
from nfq_core.packed.formats import format_by_id

TINY = UNetArchitecture(
    name="tiny",
    channels=(32, 64),
    down_depths=((0,), (1,)),
    middle_depth=1,
    up_depths=((1, 1), (0, 0)),
    context_width=48,
    added_width=80,
)

SMALLEST = replace(TINY, channels=(32,), down_depths=((0,),), middle_depth=None, up_depths=((0, 0),), context_width=0)
"""A UNet of SDXL's structure without attention, converted in an instant."""


def unet_config(architecture: UNetArchitecture = TINY) -> dict[str, Any]:
    """The settings of diffusers' UNet, with small pictures and, for small models, few numbers about them."""
    config = diffusers_config(architecture) | {"sample_size": 8}
    del config["_class_name"]
    return config if architecture.added_width >= 2048 else config | {"addition_time_embed_dim": 8}


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(*shape: int, seed: int = 0, sigma: float = 0.02) -> torch.Tensor:
    """Random weights as large as a trained model's are."""
    return random_weight(*shape, seed=seed) * sigma


def random_half(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_weight(*shape, seed=seed).half()


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of fp16 values, so that -0 differs from 0."""
    return values.view(torch.int16)


def random_unet(
    layout: str = "ldm", seed: int = 0, architecture: UNetArchitecture = SMALLEST
) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(architecture, layout)
    return {key: random_half(*shape, seed=seed + index) for index, (key, shape) in enumerate(shapes.items())}


SMALL_MODEL = {
    "linear.weight": random_half(64, 100),
    "conv.weight": random_half(16, 16, 3, 3, seed=1),
    "norm.bias": random_half(7, seed=2),
}


def random_buffer(format_id: str, weights: int, seed: int = 0, own_levels: bool = True) -> torch.Tensor:
    """A packed buffer of the format with random codes and scales, every scale code among them, and random levels."""
    rng = np.random.default_rng(seed)
    fmt = format_by_id(format_id)
    article, levels = parse(format_id)
    sections, blocks = fmt.sections(weights, own_levels), -(-weights // 64)
    codes = rng.integers(0, fmt.codes, (blocks, 64))
    data = np.zeros(sections.end, dtype=np.uint8)
    if own_levels:
        data[: 2 * levels].view(np.float16)[:] = rng.uniform(-1, 1, levels)
    data[sections.coarse : sections.fine] = pack_plane(codes >> fmt.fine_bits, fmt.coarse_radix, fmt.coarse_digits)
    if fmt.fine_bits:
        fine = pack_plane(codes % 2**fmt.fine_bits, 2**fmt.fine_bits, fmt.fine_digits)
        data[sections.fine : sections.scales] = fine
    if article:
        maxima = rng.uniform(0.001, 3, -(-blocks // 256)).astype(np.float32)
        data[sections.scales : -blocks] = maxima.view(np.uint8)
        scales = data[-blocks:]
    else:
        data[-2:] = [256 - 12, rng.integers(1, 4)]
        scales = data[sections.scales : -2]
    scales[:] = rng.permutation(np.arange(blocks) % 256)
    return torch.from_numpy(data)


def decoded_by_reference(tensor: NFTensor) -> np.ndarray:
    """The fp16 weights of a packed tensor, flat, by the reference; common levels are those of the document."""
    common = None if tensor.sections.coarse else common_levels()[tensor.format.id]
    return decode(tensor.data.numpy(), tensor.format.id, tensor.numel(), common)


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose columns are mixtures of a few sources, of unequal strength."""
    mixture = random_weight(max(2, columns // 4), columns, seed=seed)
    inputs = random_weight(rows, len(mixture), seed=seed + 1) @ mixture + 0.3 * random_weight(rows, columns, seed=seed)
    return inputs * random_weight(columns, seed=seed + 2).exp()


def second_moment(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def moment_matrix(moment: SecondMoment) -> torch.Tensor:
    """The whole matrix of a second moment."""
    correlation = moment.correlation.float()
    matrix = (correlation if moment.is_whole else correlation @ correlation.T).clone().fill_diagonal_(1)
    root = moment.diagonal.float().sqrt()
    return matrix * root * root[:, None]


def output_error(inputs: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared difference of the outputs that two weights, of any shape, give."""
    return float((inputs.double() @ (weight.double() - other.double()).flatten(1).T).square().mean())


SINGULAR = {
    "no input at all": torch.zeros(70, 70),
    "some columns without input": torch.diag((torch.arange(70) % 3 > 0).float()),
    "all inputs alike": torch.ones(70, 70),
    "one sample": second_moment(random_weight(1, 70)),
    "not positive semi-definite": torch.ones(70, 70) * 3 - 2 * torch.eye(70),
    "next to overflow": torch.ones(70, 70) * 3e38,
    "wide range": torch.diag(10.0 ** torch.linspace(-30, 30, 70)),
}
"""Second moments of 70 columns that have no inverse, or nearly none."""
