"""PSNR of latents after one step, as Apple measured palettised SDXL models, and Apple's figures.

Eight prompts, one denoising step, pictures of 768 × 768, the pipeline's own scheduler and guidance, mean over the
prompts. The prompts and seeds are this project's own, so figures are similar to Apple's (mixed-bit palettisation in
`ml-stable-diffusion`) but not exactly comparable.
"""

from __future__ import annotations

import math

import torch

SIDE = 768
"""Width and height of the pictures, in pixels."""

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


def latent_psnr_db(reference: torch.Tensor, other: torch.Tensor) -> float | None:
    """``20 * log10(max|other| / rmse)`` in dB; None if both are equal.

    Args:
        reference: a latent of any shape.
        other: the latent to compare, same shape.
    """
    error = (reference.double() - other.double()).square().mean().sqrt().item()
    return 20 * math.log10(other.double().abs().max().item() / error) if error else None
