"""Calibrating the demo model: statistics of its layers' inputs while captions of its own world are sampled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from ..calibration.collector import collect
from ..calibration.statistics import Calibration
from ..errors import TargetExistsError
from ..parallel import Progress, no_progress
from .model import SCHEDULER_CONFIG, STEPS, build_pipeline, import_diffusers, load_weights, sample
from .shapes import Scene, describe, draw, random_scene, tokenise

BATCH = 8
"""Captions sampled at once."""

CALIBRATION_SEED, HELD_OUT_SEED = 1, 2
"""Where the captions for calibrating and for measuring are drawn from; none of the latter is among the former."""

FIRST_NOISE_SEED = 10_000

NOISY_BATCHES, NOISY_BATCH = 2, 4
"""Noisy pictures, at timesteps spread evenly, on which sensitivities are measured ..."""

LAYERS_PER_BATCH = 1000
"""... of so many layers each: all of them."""


def random_captions(count: int, seed: int = CALIBRATION_SEED, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Different captions of random scenes, none of them in `without`."""
    rng = np.random.default_rng(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = describe(random_scene(rng))
        if caption not in without:
            captions[caption] = None
    return tuple(captions)


def noisy_pictures(
    scenes: Sequence[Scene], timesteps: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `TinyPipeline` is called with: scenes drawn and noised up to `timesteps`, these, and their captions' ids."""
    pictures = torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes])).permute(0, 3, 1, 2) * 2 - 1
    noise = torch.randn(pictures.shape, generator=generator)
    noisy = import_diffusers().DDPMScheduler(**SCHEDULER_CONFIG).add_noise(pictures, noise, timesteps)
    return noisy, timesteps, torch.from_numpy(tokenise([describe(scene) for scene in scenes]))


def collect_demo(prompts: int, *, sensitivities: bool = True, progress: Progress = no_progress) -> Calibration:
    """The demo model's statistics with Hessians, from random captions sampled with DPM++ 2M and CFG as in the demo.

    Sensitivities are measured on pictures of the training's kind, at all timesteps at once: that takes fewer calls.

    Args:
        prompts: how many captions.
        sensitivities: whether they are measured.
        progress: is called with the number of captions sampled, their number in all, and the last one.
    """
    captions = random_captions(prompts)
    pipeline = build_pipeline(load_weights())
    with collect(pipeline.unet, hessians=True) as collected:
        for first in range(0, prompts, BATCH):
            batch = captions[first : first + BATCH]
            sample(pipeline, batch, seed=FIRST_NOISE_SEED + first, steps=STEPS)
            progress(first + len(batch), prompts, batch[-1])
    calibration = collected.calibration(prompts=prompts, steps=STEPS)
    if not sensitivities:
        return calibration
    rng, generator = np.random.default_rng(CALIBRATION_SEED), torch.Generator().manual_seed(FIRST_NOISE_SEED)
    spread = torch.linspace(0, SCHEDULER_CONFIG["num_train_timesteps"] - 1, NOISY_BATCHES * NOISY_BATCH).long()
    with collect(pipeline.unet, sensitivities=True, passes=LAYERS_PER_BATCH) as measured, torch.no_grad():
        for number in range(NOISY_BATCHES):
            scenes = [random_scene(rng) for _ in range(NOISY_BATCH)]
            timesteps = spread[number::NOISY_BATCHES]
            pipeline(*noisy_pictures(scenes, timesteps, rng, generator))
            progress(prompts, prompts, f"sensitivities {number + 1} of {NOISY_BATCHES}")
    return replace(calibration, sensitivities=measured.calibration().sensitivities)


def calibrate_demo(
    target: str | os.PathLike,
    prompts: int,
    *,
    sensitivities: bool = True,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Write what `collect_demo` collects.

    Returns:
        `target`, `weights`, `prompts` and `sensitivities` (counts), `file_bytes` and `seconds`.

    Raises:
        NFQError: the target exists or cannot be written.
        ImportError: diffusers is missing.
    """
    started = perf_counter()
    if Path(target).exists() and not overwrite:
        raise TargetExistsError(f"{target} exists already; --force overwrites it")
    calibration = collect_demo(prompts, sensitivities=sensitivities, progress=progress)
    return {
        "target": str(target),
        "weights": len(calibration.inputs),
        "prompts": prompts,
        "sensitivities": len(calibration.sensitivities),
        "file_bytes": calibration.save(target, overwrite=overwrite),
        "seconds": round(perf_counter() - started, 1),
    }
