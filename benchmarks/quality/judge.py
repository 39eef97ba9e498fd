"""How far the demo model with other weights is from the original: output, pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nfq_core.checkpoints.examine import sqnr_db
from nfq_core.demo.calibrate import HELD_OUT_SEED, noisy_pictures, random_captions
from nfq_core.demo.model import SCHEDULER_CONFIG, TinyPipeline, build_pipeline, sample
from nfq_core.demo.shapes import describe, random_scene
from nfq_core.report.metrics import psnr_db, ssim

PROMPTS, HELD_OUT = 32, 24
"""Captions that a calibration saw, and others that are drawn."""

OUTPUT_BATCH = 128
"""Noisy pictures in the held-out batch."""

PEAK = 255

Weights = dict[str, torch.Tensor]


def held_out_batch(calibrated: Sequence[str] = ()) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `TinyPipeline` takes: noisy pictures, timesteps and the ids of captions that are none of those given."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    scenes = [random_scene(rng) for _ in range(2 * OUTPUT_BATCH)]
    scenes = [scene for scene in scenes if describe(scene) not in calibrated][:OUTPUT_BATCH]
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    timesteps = torch.randint(SCHEDULER_CONFIG["num_train_timesteps"], (OUTPUT_BATCH,), generator=generator)
    return noisy_pictures(scenes, timesteps, rng, generator)


class Judge:
    """Compares models of other weights with the original's outputs and pictures."""

    def __init__(self, weights: Weights) -> None:
        calibrated = random_captions(PROMPTS)
        self._batch = held_out_batch(calibrated)
        self._captions = random_captions(HELD_OUT, HELD_OUT_SEED, without=calibrated)
        self._output, self._pictures = self._run(build_pipeline(weights))

    @torch.no_grad()
    def _run(self, pipeline: TinyPipeline) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = sample(pipeline, self._captions, seed=0)
        return pipeline(*self._batch), torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def judge(self, weights: Weights) -> dict:
        """`output_db` (signal to noise of the output), `picture_db` (PSNR) and `ssim` of the pictures, all over all.

        Safe to call on several threads.
        """
        output, pictures = self._run(build_pipeline(weights))
        return {
            "output_db": sqnr_db(self._output, output),
            "picture_db": psnr_db(self._pictures, pictures, PEAK),
            "ssim": ssim(self._pictures.float(), pictures.float(), PEAK),
        }
