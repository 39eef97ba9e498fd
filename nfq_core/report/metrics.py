"""PSNR and SSIM of pictures, and cosine of latents, against a reference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WINDOW = 11
"""Side of SSIM's Gaussian window, odd."""

WINDOW_SIGMA = 1.5


def psnr_db(reference: torch.Tensor, other: torch.Tensor, peak: float) -> float | None:
    """Peak signal-to-noise ratio, ``10 * log10(peak**2 / mse)`` in dB; None if both are equal.

    Args:
        reference: any shape and dtype.
        other: same shape.
        peak: the largest possible value.
    """
    error = (reference.double() - other.double()).square().mean().item()
    return 10 * math.log10(peak**2 / error) if error else None


def ssim(reference: torch.Tensor, other: torch.Tensor, peak: float) -> float:
    """Mean structural similarity, 1 for equal pictures.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity" (2004):
    an 11 × 11 Gaussian window of sigma 1.5 at every position where it fits, K1 = 0.01, K2 = 0.03, population moments,
    each channel separately. Smaller pictures use the largest odd window that fits.

    Args:
        reference: shape (count, channels, height, width), any floating dtype.
        other: same shape.
        peak: the largest possible value.
    """
    window = _gaussian(min(WINDOW, *(side - 1 + side % 2 for side in reference.shape[2:])))
    return _ssim(reference, other, peak, window, 1.0)


def ssim_uniform(reference: torch.Tensor, other: torch.Tensor, peak: float, side: int = 3) -> float:
    """Mean structural similarity in uniform windows of side × side, as `structural_similarity` of scikit-image.

    Sample moments (divided by the number of values less one); the rest as in `ssim`.

    Args:
        reference: shape (count, channels, height, width), no side smaller than the window; any floating dtype.
        other: same shape.
        peak: the largest possible value.
        side: side of the window, in pixels.
    """
    window = torch.full((side,), 1 / side, dtype=torch.float64)
    return _ssim(reference, other, peak, window, side**2 / (side**2 - 1))


def cosine(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Cosine of the angle between two tensors, flattened, in fp64; 1 for equal directions.

    Args:
        reference: any shape, not all zero.
        other: same shape, not all zero.
    """
    one, two = reference.double().flatten(), other.double().flatten()
    return (one @ two / (one.norm() * two.norm())).clamp(-1, 1).item()


def _ssim(reference: torch.Tensor, other: torch.Tensor, peak: float, window: torch.Tensor, correction: float) -> float:
    """SSIM with a separable window; `correction` multiplies the variances and the covariance."""
    x, y = (picture.double().flatten(0, 1).unsqueeze(1) for picture in (reference, other))
    mean_x, mean_y = _blurred(x, window), _blurred(y, window)
    variance_x = correction * (_blurred(x * x, window) - mean_x * mean_x)
    variance_y = correction * (_blurred(y * y, window) - mean_y * mean_y)
    covariance = correction * (_blurred(x * y, window) - mean_x * mean_y)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean().item()


def _gaussian(side: int) -> torch.Tensor:
    distance = torch.arange(side, dtype=torch.float64) - side // 2
    weights = torch.exp(-distance.square() / (2 * WINDOW_SIGMA**2))
    return weights / weights.sum()


def _blurred(picture: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Weighted mean of each window position that fits; `picture` has shape (count, 1, height, width)."""
    return F.conv2d(F.conv2d(picture, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
