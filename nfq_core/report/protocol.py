"""Series of samples that are drawn with each model, and Apple's: latents after one step.

Apple measured palettised SDXL models by the PSNR of latents: eight prompts, one denoising step, pictures of 768 × 768,
the pipeline's own scheduler and guidance, mean over the prompts. The prompts and seeds are this project's own, so
figures are similar to Apple's (mixed-bit palettisation in `ml-stable-diffusion`) but not exactly comparable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Series:
    """The samples to draw with each model."""

    prompts: tuple[str, ...]
    """The prompt of each sample."""
    seeds: tuple[int, ...]
    """The seed of each sample's noise; as many as prompts."""
    steps: int
    """Denoising steps of each sample."""
    side: int
    """Width and height, in pixels."""
    guidance: float | None = None
    """CFG scale; None for the pipeline's default."""
    sampler: str | None = None
    """Sampler and schedule by ComfyUI's names; None for the pipeline's own."""
    decoded: bool = True
    """Whether latents are decoded to pictures."""

    def all_steps(self) -> int:
        """Denoising steps of all samples."""
        return self.steps * len(self.prompts)


@dataclass(frozen=True)
class Sample:
    """What a model drew."""

    latent: torch.Tensor | None
    """The final latent, fp32, shape (channels, height, width); None if the model has no latents."""
    picture: np.ndarray | None
    """uint8, shape (height, width, 3); None if it was not decoded."""


SIDE = 768
"""Width and height of Apple's pictures, in pixels."""

STEPS = 1

PROMPTS = (
    "a lighthouse on a rocky coast under storm clouds, oil painting",
    "two children flying a kite on a wide meadow",
    "a bowl of ripe cherries on a wooden kitchen table, macro photograph",
    "a red tram crossing an old stone bridge in the rain",
    "portrait of an elderly fisherman with a grey beard, soft window light",
    "a robot watering plants in a greenhouse, children's book illustration",
    "snow-covered mountains mirrored in a still lake at dawn",
    "a market street at night with paper lanterns and many people",
)

APPLE_SDXL = (
    (6.55, 79.9),
    (5.52, 78.2),
    (4.89, 76.8),
    (4.41, 75.5),
    (4.04, 73.2),
    (3.67, 72.2),
    (3.32, 71.4),
    (3.08, 69.6),
    (2.98, 68.6),
    (2.83, 67.0),
    (2.71, 66.3),
)
"""Bits per weight and dB that Apple published for SDXL base 1.0; the bits count codes only."""


def apple(seed: int) -> Series:
    """The series of samples for Apple's measure; sample i starts from the noise of seed `seed + i`."""
    return Series(PROMPTS, consecutive(seed, len(PROMPTS)), STEPS, SIDE, decoded=False)


def consecutive(seed: int, count: int) -> tuple[int, ...]:
    """`count` seeds from `seed` on."""
    return tuple(range(seed, seed + count))


def latent_psnr_db(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """``20 * log10(max|other| / rmse)`` in dB; None if both are equal.

    Args:
        reference: a latent of any shape.
        other: the latent to compare, same shape.
    """
    error = (reference.double() - other.double()).square().mean().sqrt().item()
    return 20 * math.log10(other.double().abs().max().item() / error) if error else None
