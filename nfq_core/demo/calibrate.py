"""Calibrate the demo model: sample random captions and collect statistics of its layers' inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from ..calibration.collector import collect
from ..calibration.statistics import Calibration
from ..errors import OVERWRITE, TargetExistsError
from ..parallel import Progress, no_progress
from .model import SCHEDULER_CONFIG, STEPS, build_pipeline, import_diffusers, load_weights, sample
from .shapes import describe, draw, random_scene, tokenise

BATCH = 8
"""Number of captions sampled at once."""

CALIBRATION_SEED, HELD_OUT_SEED = 1, 2
"""Seeds of the captions for calibration and for measurements; the two sets do not overlap."""

FIRST_NOISE_SEED = 10_000

NOISY_BATCHES, NOISY_BATCH = 2, 4
"""Number of batches of noisy pictures for sensitivities, and pictures per batch, at evenly spread timesteps."""

LAYERS_PER_BATCH = 1000
"""Most layers tried per batch: more than the model has, so all of them."""


def random_caption(rng: np.random.Generator) -> str:
    """The caption of a random scene."""
    return describe(random_scene(rng))


def random_captions(
    count: int,
    seed: int = CALIBRATION_SEED,
    without: Container[str] = (),
    make: Callable[[np.random.Generator], str] = random_caption,
) -> tuple[str, ...]:
    """`count` different captions that `make` draws at random, except those in `without`."""
    rng = np.random.default_rng(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = make(rng)
        if caption not in without:
            captions[caption] = None
    return tuple(captions)


def add_noise(pictures: torch.Tensor, timesteps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [n, size, size, 3] in 0..1 with noise added, as `TinyPipeline` takes them: fp32 [n, 3, size, size]."""
    pictures = pictures.permute(0, 3, 1, 2) * 2 - 1
    noise = torch.randn(pictures.shape, generator=generator)
    return import_diffusers().DDPMScheduler(**SCHEDULER_CONFIG).add_noise(pictures, noise, timesteps)


def collect_demo(prompts: int, *, sensitivities: bool = True, progress: Progress = no_progress) -> Calibration:
    """Collect the demo model's statistics, with Hessians, from random captions sampled as in the demo.

    Sensitivities are measured on noisy training pictures at several timesteps at once, which takes fewer calls.

    Args:
        prompts: number of captions.
        sensitivities: whether to measure sensitivities.
        progress: called with the number of captions sampled, the total number, and the last caption.
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
            pictures = torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes]))
            ids = torch.from_numpy(tokenise([describe(scene) for scene in scenes]))
            timesteps = spread[number::NOISY_BATCHES]
            pipeline(add_noise(pictures, timesteps, generator), timesteps, ids)
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
    """Write the calibration from `collect_demo` to a file.

    Returns:
        `target`, `weights`, `prompts` and `sensitivities` (counts), `file_bytes` and `seconds`.

    Raises:
        NFQError: the target exists or cannot be written.
        ImportError: diffusers is missing.
    """
    started = perf_counter()
    if Path(target).exists() and not overwrite:
        raise TargetExistsError(f"{target} exists already; {OVERWRITE} overwrites it")
    calibration = collect_demo(prompts, sensitivities=sensitivities, progress=progress)
    return {
        "target": str(target),
        "weights": len(calibration.inputs),
        "prompts": prompts,
        "sensitivities": len(calibration.sensitivities),
        "file_bytes": calibration.save(target, overwrite=overwrite),
        "seconds": round(perf_counter() - started, 1),
    }
