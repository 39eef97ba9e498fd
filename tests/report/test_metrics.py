"""PSNR and cosine by hand; SSIM against its definition written out window by window."""

import math

import numpy as np
import pytest
import torch

from nfq_core.report.metrics import cosine, psnr_db, ssim, ssim_uniform


def test_psnr_by_hand():
    reference = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    # One value of twelve is off by 51 = 255 / 5: the mean squared error is 255² / 300.
    other = reference.clone()
    other[0, 0, 0, 0] = 51
    assert psnr_db(reference, other, 255) == pytest.approx(10 * math.log10(300))
    assert psnr_db(reference, reference, 255) is None


def test_cosine_by_hand():
    # 3·4 + 4·3 = 24, and both are 5 long; the shape does not matter.
    assert cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])) == pytest.approx(24 / 25, rel=1e-12)
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])) == pytest.approx(-1, rel=1e-12)
    # In fp16, 300² overflows.
    assert cosine(torch.full((2, 2), 300.0).half(), torch.full((2, 2), 1.0).half()) == pytest.approx(1, rel=1e-12)


def gaussian(side: int) -> np.ndarray:
    distance = np.arange(side) - side // 2
    weights = np.exp(-(distance[:, None] ** 2 + distance[None, :] ** 2) / (2 * 1.5**2))
    return weights / weights.sum()


def ssim_by_definition(
    x: np.ndarray, y: np.ndarray, peak: float, weights: np.ndarray, correction: float = 1.0
) -> float:
    """One channel; every position of the window by itself, with centred moments times the correction."""
    side = len(weights)
    values = []
    for row in range(x.shape[0] - side + 1):
        for column in range(x.shape[1] - side + 1):
            a, b = (picture[row : row + side, column : column + side] for picture in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (
                correction * (weights * (v - v_mean) ** 2).sum() for v, v_mean in ((a, mean_a), (b, mean_b))
            )
            covariance = correction * (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * covariance + c2) / (variance_a + variance_b + c2))
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width", "side"), [(16, 20, 11), (11, 11, 11), (8, 9, 7), (10, 30, 9), (1, 5, 1)])
def test_ssim_is_its_definition(height, width, side):
    generator = np.random.default_rng(height)
    pictures = generator.random((2, 2, 3, height, width))
    expected = np.mean(
        [
            ssim_by_definition(*pictures[:, count, channel], 1.0, gaussian(side))
            for count in range(2)
            for channel in range(3)
        ]
    )
    found = ssim(torch.from_numpy(pictures[0]), torch.from_numpy(pictures[1]), 1.0)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("height", "width", "side"), [(8, 9, 3), (3, 3, 3), (8, 8, 7)])
def test_uniform_ssim_is_that_of_scikit_image(height, width, side):
    """Uniform weights, and sample moments: those of n values times n / (n - 1)."""
    pictures = np.random.default_rng(height).random((2, 1, 2, height, width))
    uniform, n = np.full((side, side), 1 / side**2), side**2
    expected = np.mean(
        [ssim_by_definition(*pictures[:, 0, channel], 1.0, uniform, n / (n - 1)) for channel in range(2)]
    )
    found = ssim_uniform(torch.from_numpy(pictures[0]), torch.from_numpy(pictures[1]), 1.0, side)
    assert found == pytest.approx(expected, rel=1e-9)


def test_ssim_of_equal_pictures_is_one_and_noise_lowers_it():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 32, 32, generator=generator)
    noise = torch.randn(picture.shape, generator=generator)
    assert ssim(picture, picture, 1.0) == pytest.approx(1.0)
    little, much = ssim(picture, picture + 0.01 * noise, 1.0), ssim(picture, picture + 0.2 * noise, 1.0)
    assert 1.0 > little > 0.99 > much


def test_ssim_scales_with_its_peak():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 1, 1, 16, 16, generator=generator)
    assert ssim(first * 7, second * 7, 7.0) == pytest.approx(ssim(first, second, 1.0))
