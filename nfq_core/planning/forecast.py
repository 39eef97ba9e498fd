"""What a conversion will make, estimated before it is made: bytes on disk, error and time.

A scalar format's bytes depend on the weights, so a sample of each weight is quantised. The other constants are of
Gaussian weights; `python -m benchmarks.quality.forecast` measures them. Times are scaled to this machine by `pace`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from statistics import median

import torch

from ..decibels import pooled_sqnr_db
from ..files.container import Facts
from ..files.safetensors_io import aligned_entries
from ..files.writer import Plan, longest_header_bytes
from ..fitting.backends import search_backend
from ..fitting.codebook import EFFORTS, STORED_BITS
from ..fitting.quantizer import quantize
from ..fitting.trellis_fit import other_scales
from ..models.sensitivities import layer_sensitivities
from ..models.unet import UNetInfo, is_unet_key
from ..packed.codec import stored_code_bits
from ..packed.layout import BLOCK, BlockFormat
from ..parallel import default_threads, ordered_map
from .allocation import EXPECTED_SQNR_DB, predicted_output_db

SAMPLE_BLOCKS = 512
"""Blocks of a weight that are quantised to estimate its bytes on disk. Of a smaller weight, all are."""

MANY_LEVELS = 256
"""Number of levels from which four times as many blocks are sampled."""

SCALES_LIKE = "nf16_b64"
"""Format whose scales a trellis format's are like, at a hundredth of the time."""

PACE_WEIGHTS = 1 << 19
"""Weights that `pace` quantises."""

PACE_RUNS = 12
"""How often each processor quantises them; fewer runs differ by a quarter from one measurement to the next."""

PACE_SECONDS = 0.038
"""Seconds that these weights take on the machine where all seconds below were measured."""

SCALAR_SECONDS = 0.01
"""Seconds of one processor to quantise and write a million weights in a scalar format."""

PASS_SECONDS = {
    "numba": {"t2w8_b64": 0.014, "t3w8_b64": 0.013, "t4w8_b64": 0.012, "t5w9_b64": 0.020, "t6w9_b64": 0.020},
    "torch": {"t2w8_b64": 0.075, "t3w8_b64": 0.068, "t4w8_b64": 0.070, "t5w9_b64": 0.144, "t6w9_b64": 0.150},
}
"""Seconds of one processor for one pass of a trellis search over a million weights, by `search_backend` and format."""

SEARCH_PASSES = 2.5
"""What finding the codes takes after the first pass, in passes."""

LAYER_SECONDS = 0.02
"""Seconds that a layer of any size takes at least."""

FITTING_SECONDS = {"fast": 0.02, "best": 0.6}
"""Seconds to fit the levels of a layer of a million weights or more in a scalar format, by effort."""

FITTING_MILLIONS = 0.5
"""Millions of weights whose codes are searched to fit the levels of a layer in a trellis format."""

SCALAR_FEEDBACK_SECONDS = 0.025
"""Seconds of one processor that error feedback adds for a million weights in a scalar format."""

_measuring = threading.Lock()

TRELLIS_FEEDBACK_SECONDS = {"numba": {"fast": 1.3, "best": 3.2}, "torch": {"fast": 2.3, "best": 5.5}}
"""Seconds of one processor for a million weights in a trellis format with error feedback, by backend and effort."""


def stored_bytes(weight: torch.Tensor, fmt: BlockFormat, effort: str) -> float:
    """Expected bytes on disk of a weight in a writable format.

    Args:
        weight: the whole weight, any shape.
        fmt: the format.
        effort: see `Settings`.

    Raises:
        CannotQuantizeError: the sample has NaN, Inf or magnitudes beyond fp16.
    """
    count = weight.numel()
    blocks = weight.reshape(-1)[: count // BLOCK * BLOCK].view(-1, BLOCK)
    # Frequencies of many levels need a large sample, which then also gets levels of its own.
    wanted = SAMPLE_BLOCKS if fmt.levels < MANY_LEVELS or fmt.window else 4 * SAMPLE_BLOCKS
    sample = blocks[:: max(1, len(blocks) // wanted)]
    sampled = quantize(sample, format=SCALES_LIKE if fmt.window else fmt.id)
    whole = fmt.sections(count, fmt.expects_own_levels(count))
    scales, own = sampled.data[sampled.sections.scales : -2], sampled.sections
    scale_entropy, _, values = _entropy(scales)
    # The entropy of few samples is too low by this on average (Miller 1955). The coder's table takes about a byte each.
    scale_bits = scale_entropy + (values - 1) / (2 * len(scales) * math.log(2))
    scale_bytes = min(len(blocks), len(blocks) * scale_bits / 8 + values)
    if fmt.window:
        return whole.scales + scale_bytes
    planes = sampled.data[own.coarse : own.fine].int()
    digits = [planes // fmt.coarse_radix**place % fmt.coarse_radix for place in range(fmt.coarse_digits)]
    entropy, share, _ = _entropy(torch.cat(digits))
    # The largest of many counts is too high by about two standard deviations.
    share -= 2 * math.sqrt(share / sample.numel())
    code_bits = stored_code_bits(entropy, share, fmt, count)
    if EFFORTS[effort].limit_size:
        code_bits = min(code_bits, STORED_BITS.get(fmt.levels, math.inf))
    return whole.coarse + count * code_bits / 8 + scale_bytes


def _entropy(symbols: torch.Tensor) -> tuple[float, float, int]:
    """Entropy in bits, share of the most frequent symbol, and number of different symbols."""
    counts = torch.bincount(symbols.int()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum()), float(shares.amax()), len(shares)


def file_bytes(plans: Mapping[str, Plan], facts: Facts, extra: Mapping[str, str], quantized: float) -> int:
    """Expected bytes of the file that a `ContainerWriter` makes of these plans, facts and further metadata.

    Args:
        plans: see `ContainerWriter`, also for `facts` and `extra`.
        quantized: expected bytes on disk of all quantised weights.
    """
    kept = aligned_entries({key: (plan.dtype, plan.shape) for key, plan in plans.items() if not plan.format})
    header = longest_header_bytes(plans, facts, extra)
    return header + max((entry.end for entry in kept.values()), default=0) + round(quantized)


def expected_sqnr_db(plans: Mapping[str, Plan]) -> float | None:
    """Expected SQNR in dB of the quantised weights together; None if there are none."""
    quantized = [plan for plan in plans.values() if plan.format]
    return pooled_sqnr_db((prod(plan.shape), EXPECTED_SQNR_DB[plan.format.id]) for plan in quantized)


def expected_output_db(
    info: UNetInfo | None,
    plans: Mapping[str, Plan],
    measured: Mapping[str, float] | None,
    factors: Mapping[str, float] | None = None,
) -> float | None:
    """Expected SQNR in dB of the UNet's output, see `allocation.predicted_output_db`; None if it is not known.

    Args:
        info: the recognised UNet, if any.
        plans: what is quantised.
        measured: sensitivities that a calibration measured, if any.
        factors: see `allocation.predicted_output_db`.
    """
    formats = {key: plan.format for key, plan in plans.items() if plan.format and (not info or is_unet_key(info, key))}
    if not formats:
        return None
    shapes = {key: plans[key].shape for key in formats}
    return predicted_output_db(formats, layer_sensitivities(info, shapes, measured), factors)


def expected_seconds(plans: Mapping[str, Plan], effort: str, calibrated: bool = False) -> float:
    """Expected seconds of a conversion on this machine's processors.

    Args:
        plans: what is quantised.
        effort: see `Settings`.
        calibrated: whether statistics of the layers' inputs are used.
    """
    quantized = [plan for plan in plans.values() if plan.format]
    seconds = sum(_seconds(plan.format, prod(plan.shape) / 1e6, effort, calibrated) for plan in quantized)
    return seconds * pace() / default_threads()


def pace() -> float:
    """How long one of this machine's processors takes, in times of the one where the constants were measured."""
    # Two measurements at once would disturb each other.
    with _measuring:
        return _pace()


@lru_cache(1)
def _pace() -> float:
    return measure_pace() / PACE_SECONDS


def measure_pace() -> float:
    """Median seconds that quantising PACE_WEIGHTS weights takes here while all processors do the same.

    The first runs are slower, because they allocate memory. The fastest run had an idle core, which a conversion does
    not have.
    """
    weight = torch.randn(PACE_WEIGHTS // BLOCK, BLOCK, generator=torch.Generator().manual_seed(0)).half()

    def seconds(_: int) -> float:
        started = time.perf_counter()
        quantize(weight, format=SCALES_LIKE)
        return time.perf_counter() - started

    return median(ordered_map(seconds, range(PACE_RUNS * default_threads()), size=lambda _: 0))


def _seconds(fmt: BlockFormat, millions: float, effort: str, calibrated: bool) -> float:
    """Seconds of one processor for one layer of `millions` million weights."""
    device = torch.device("cpu")
    if fmt.window and calibrated:
        return LAYER_SECONDS + TRELLIS_FEEDBACK_SECONDS[search_backend(device)[0]][effort] * millions
    if fmt.window:
        tried = other_scales(effort, fmt, round(millions * 1e6), device).count
        # A layer of fewer weights than the sample is its own sample.
        fitting = FITTING_MILLIONS * min(1.0, millions) * (1 + SEARCH_PASSES)
        passes = millions * (tried + SEARCH_PASSES) + fitting
        return LAYER_SECONDS + PASS_SECONDS[search_backend(device)[0]][fmt.id] * passes
    rounding = SCALAR_SECONDS + (SCALAR_FEEDBACK_SECONDS if calibrated else 0.0)
    return LAYER_SECONDS + rounding * millions + FITTING_SECONDS[effort] * min(1.0, millions)
