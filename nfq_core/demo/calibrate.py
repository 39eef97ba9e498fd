"""Calibrating the demo model: statistics of its layers' inputs while captions of its own world are sampled."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

import numpy as np

from ..calibration import Calibration
from ..collector import collect
from ..errors import TargetExistsError
from ..parallel import Progress, no_progress
from .model import build_pipeline, load_weights, sample
from .shapes import describe, random_scene

STEPS = 20
BATCH = 8
"""Captions sampled at once."""

CALIBRATION_SEED, HELD_OUT_SEED = 1, 2
"""Where the captions for calibrating and for measuring are drawn from; none of the latter is among the former."""

FIRST_NOISE_SEED = 10_000


def random_captions(count: int, seed: int = CALIBRATION_SEED, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Different captions of random scenes, none of them in `without`."""
    rng = np.random.default_rng(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = describe(random_scene(rng))
        if caption not in without:
            captions[caption] = None
    return tuple(captions)


def collect_demo(prompts: int, *, progress: Progress = no_progress) -> Calibration:
    """The demo model's statistics with Hessians, from random captions sampled with DPM++ 2M and CFG as in the demo.

    `progress` is called with the number of captions sampled, their number in all, and the last one.
    """
    captions = random_captions(prompts)
    pipeline = build_pipeline(load_weights())
    with collect(pipeline.unet, hessians=True) as collected:
        for first in range(0, prompts, BATCH):
            batch = captions[first : first + BATCH]
            sample(pipeline, batch, seed=FIRST_NOISE_SEED + first, steps=STEPS)
            progress(first + len(batch), prompts, batch[-1])
    return collected.calibration(prompts=prompts, steps=STEPS)


def calibrate_demo(
    target: str | os.PathLike, prompts: int, *, overwrite: bool = False, progress: Progress = no_progress
) -> dict:
    """Write what `collect_demo` collects.

    Returns:
        `target`, `weights` and `prompts` (counts), `file_bytes` and `seconds`.

    Raises:
        NFQError: the target exists or cannot be written.
        ImportError: diffusers is missing.
    """
    started = perf_counter()
    if Path(target).exists() and not overwrite:
        raise TargetExistsError(f"{target} exists already; --force overwrites it")
    calibration = collect_demo(prompts, progress=progress)
    return {
        "target": str(target),
        "weights": len(calibration.inputs),
        "prompts": prompts,
        "file_bytes": calibration.save(target, overwrite=overwrite),
        "seconds": round(perf_counter() - started, 1),
    }
