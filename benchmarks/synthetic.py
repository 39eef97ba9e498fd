"""Weights to measure on: random sources, and a whole UNet with SDXL's exact names and shapes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nfq_core.files.atomic import AtomicFile
from nfq_core.files.safetensors_io import aligned_entries, header_bytes, tensor_bytes
from nfq_core.models.unet_keys import SDXL_BASE, Layout, tensor_shapes

SCALE = 0.03
"""Typical standard deviation of an SDXL weight."""


def gaussian(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Gaussian weights, fp16."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * SCALE).half()


def student_t(shape: tuple[int, ...], seed: int, freedom: int = 5) -> torch.Tensor:
    """Student-t weights of `freedom` degrees of freedom, fp16: a normal over the root of a chi-square's mean."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(shape, generator=generator)
    squares = torch.zeros(shape)
    for _ in range(freedom):
        squares += torch.randn(shape, generator=generator).square_()
    return (normals * (squares / freedom).rsqrt_() * SCALE).half()


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
    return weight.mul_(SCALE).half()


def write_sdxl_unet(path: Path, layout: Layout = "ldm") -> int:
    """Write a synthetic UNet of SDXL's names and shapes in fp16 (5.14 GB); returns its number of weights."""
    entries = aligned_entries({name: ("F16", shape) for name, shape in tensor_shapes(SDXL_BASE, layout).items()})
    header = header_bytes(entries, {"format": "pt"})
    with AtomicFile(path) as file:
        file.write_at(0, header)
        for seed, entry in enumerate(entries.values()):
            make = channel_spread if len(entry.shape) > 1 else gaussian
            file.write_at(len(header) + entry.start, tensor_bytes(make(entry.shape, seed)))
        file.commit()
    return sum(entry.nbytes for entry in entries.values()) // 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=write_sdxl_unet.__doc__)
    parser.add_argument("path", type=Path)
    weights = write_sdxl_unet(parser.parse_args().path)
    print(f"{weights:,} weights")
