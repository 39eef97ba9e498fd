"""Errors of weights in decibels: of one tensor, of many layers together, and as text.

SQNR is the signal-to-quantisation-noise ratio: the variance of the weights divided by the mean squared error. More is
better; 6 dB are about one bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

EQUAL = "equal"
"""Shown instead of an infinite ratio."""


def sqnr_db(original: torch.Tensor, approximation: torch.Tensor) -> float:
    """SQNR of one tensor, ``10 * log10(var(original) / mse)`` in dB; infinite if both are equal.

    For a constant tensor, whose variance is 0, the mean square is used instead.
    """
    total = squares = error = 0.0
    for part, other in zip(original.reshape(-1).split(1 << 20), approximation.reshape(-1).split(1 << 20), strict=True):
        part = part.double()
        total += part.sum().item()
        squares += part.square().sum().item()
        error += (part - other.double()).square_().sum().item()
    if error == 0:
        return math.inf
    weights = original.numel()
    variance = squares - total * total / weights
    # A variance below the rounding error of the sums means that all weights are equal.
    signal = variance if variance > 1e-12 * squares else squares
    ratio = signal / error
    return 10 * math.log10(ratio) if ratio else -math.inf


def pooled_sqnr_db(layers: Iterable[tuple[int, float | None]]) -> float | None:
    """SQNR of several layers together, ``-10 * log10(Σ w * 10**(-dB / 10) / Σ w)`` in dB.

    Noise powers add up. A mean of decibels would hide the layers with the most noise.

    Args:
        layers: number of weights and SQNR in dB of each layer. None, like infinity, is an exact layer: its weights
            count, and add no noise.

    Returns:
        None if every layer is exact, or if there are no layers.
    """
    noise, total = 0.0, 0
    for weights, ratio in layers:
        total += weights
        noise += 0.0 if ratio is None else weights * 10 ** (-ratio / 10)
    return -10 * math.log10(noise / total) if noise else None


def ratio_in_words(ratio: float | None, digits: int = 2) -> str:
    """A ratio in dB as a text without the unit; None means infinite."""
    return EQUAL if ratio is None else f"{ratio:.{digits}f}"


def decibels_in_words(ratio: float | None, digits: int = 2) -> str:
    """A ratio in dB as a text with the unit; None means infinite."""
    return EQUAL if ratio is None else f"{ratio:.{digits}f} dB"
