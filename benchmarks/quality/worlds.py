"""The two small models that formats and calibrations are judged on: the demo model, and one that tuned nothing.

Both have SDXL's UNet architecture and draw captions of random scenes. The second one is trained by
`python -m benchmarks.quality.train landscapes`; its weights are not in the repository.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from nfq_core import Calibration, collect, load
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import file_info
from nfq_core.decibels import sqnr_db
from nfq_core.demo import shapes
from nfq_core.demo.calibrate import (
    BATCH,
    CALIBRATION_SEED,
    FIRST_NOISE_SEED,
    HELD_OUT_SEED,
    LAYERS_PER_BATCH,
    NOISY_BATCH,
    NOISY_BATCHES,
    add_noise,
    random_captions,
)
from nfq_core.demo.model import (
    SCHEDULER_CONFIG,
    STEPS,
    UNET_CONFIG,
    TinyPipeline,
    build_pipeline,
    bundled_weights_path,
    sample_ids,
)
from nfq_core.planning.settings import Settings
from nfq_core.report.metrics import psnr_db

from . import landscapes

OUTPUT_BATCH = 128
"""Noisy pictures for which outputs are compared."""

PEAK = 255

BUILT = Path(__file__).resolve().parents[2] / "build"
"""Folder of the weights that are not in the repository; git ignores it."""

CAPTIONS_SEEN = 64
"""Most captions of a calibration; none of them is judged."""


@dataclass(frozen=True)
class World:
    """What a model draws, and its architecture.

    Args:
        name: name of the world.
        weights: the model's fp16 weights.
        config: arguments of diffusers' `UNet2DConditionModel`.
        words: number of words in the vocabulary.
        random_scene: draws a scene at random.
        describe: the caption of a scene.
        draw: a picture of a scene, float32 [size, size, 3] in 0..1; the generator varies it.
        tokenise: word ids of captions, int64 [n, MAX_WORDS].
        start: the weights that training starts from; random ones if None.
    """

    name: str
    weights: Path
    config: Mapping[str, Any]
    words: int
    random_scene: Callable[[np.random.Generator], Any]
    describe: Callable[[Any], str]
    draw: Callable[[Any, np.random.Generator], np.ndarray]
    tokenise: Callable[..., np.ndarray]
    start: Path | None = None

    def build(self, weights: Mapping[str, torch.Tensor] | None = None) -> TinyPipeline:
        """The pipeline with these weights, or with random ones."""
        return build_pipeline(weights, self.config, self.words)

    def captions(self, count: int, seed: int, without: tuple[str, ...] = ()) -> tuple[str, ...]:
        """`count` different captions of random scenes, except those in `without`."""
        return random_captions(count, seed, without, lambda rng: self.describe(self.random_scene(rng)))

    def pictures(self, pipeline: TinyPipeline, captions: Sequence[str], **options: Any) -> torch.Tensor:
        """Pictures of captions, fp32 [n, 3, size, size] in 0..255; options as of `sample_ids`."""
        drawn = sample_ids(pipeline, torch.from_numpy(self.tokenise(captions)), **options)
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).float()

    def noisy_batch(
        self, count: int, seed: int, timesteps: torch.Tensor | None = None, without: Sequence[str] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments for `TinyPipeline`: noisy pictures of scenes not in `without`, timesteps, and captions' ids.

        Timesteps are random unless given.
        """
        rng, generator, scenes = np.random.default_rng(seed), torch.Generator().manual_seed(seed), []
        while len(scenes) < count:
            scene = self.random_scene(rng)
            if self.describe(scene) not in without:
                scenes.append(scene)
        pictures = torch.from_numpy(np.stack([self.draw(scene, rng) for scene in scenes]))
        if timesteps is None:
            timesteps = torch.randint(SCHEDULER_CONFIG["num_train_timesteps"], (count,), generator=generator)
        ids = torch.from_numpy(self.tokenise([self.describe(scene) for scene in scenes]))
        return add_noise(pictures, timesteps, generator), timesteps, ids

    def calibrate(self, prompts: int, steps: int = STEPS, *, sensitivities: bool = True, **options: Any) -> Calibration:
        """Collect statistics of the model's layers as `nfq_core.demo.calibrate` does.

        The captions are the first ones of CALIBRATION_SEED.

        Args:
            prompts: number of captions.
            steps: denoising steps of each.
            sensitivities: whether to measure sensitivities, on noisy pictures.
            options: as of `collect`.
        """
        captions, pipeline = self.captions(prompts, CALIBRATION_SEED), self.build(load_file(self.weights))
        with collect(pipeline.unet, **{"hessians": True, **options}) as collected:
            for first in range(0, prompts, BATCH):
                self.pictures(pipeline, captions[first : first + BATCH], seed=FIRST_NOISE_SEED + first, steps=steps)
        calibration = collected.calibration(prompts=prompts, steps=steps)
        if not sensitivities:
            return calibration
        spread = torch.linspace(0, SCHEDULER_CONFIG["num_train_timesteps"] - 1, NOISY_BATCHES * NOISY_BATCH).long()
        # The scenes of this seed are the first captions', which are not judged.
        noisy = self.noisy_batch(NOISY_BATCHES * NOISY_BATCH, CALIBRATION_SEED, spread)
        with collect(pipeline.unet, sensitivities=True, passes=LAYERS_PER_BATCH) as measured, torch.no_grad():
            for number in range(NOISY_BATCHES):
                pipeline(*(part[number::NOISY_BATCHES] for part in noisy))
        return replace(calibration, sensitivities=measured.calibration().sensitivities)


def quantized(
    weights: Path, settings: Settings, calibration: Calibration | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights in a file, quantised into another file and dequantised; what `file_info` says of that file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.nfq.safetensors"
        quantize_file(weights, path, settings, calibration=calibration)
        return load(path, memory="resident"), file_info(path)


class Judge:
    """Compares quantised weights of a world's model with the original: the UNet's output, and pictures.

    Args:
        world: the world.
        without: captions that are not judged: those of a calibration.
        captions: number of captions.
        seeds: the first seed of each series of pictures.
    """

    def __init__(self, world: World, without: Sequence[str], captions: int, seeds: Sequence[int]) -> None:
        self.world = world
        self.weights = load_file(world.weights)
        self._captions = world.captions(captions, HELD_OUT_SEED, without=tuple(without))
        self._seeds = seeds
        self._batch = world.noisy_batch(OUTPUT_BATCH, HELD_OUT_SEED, without=without)
        self._output, self._pictures = self._run(self.weights)

    def figures(self, weights: Mapping[str, torch.Tensor], pictures: bool = True) -> dict[str, Any]:
        """`output_db`: SQNR of the output. PSNR of all pictures together, by seed (ascending), of the median one."""
        output, drawn = self._run(self.weights | weights, pictures)
        found = {"output_db": sqnr_db(self._output, output)}
        if pictures:
            by_seed = [psnr_db(one, two, PEAK) for one, two in zip(self._pictures, drawn, strict=True)]
            originals, others = self._pictures.flatten(0, 1), drawn.flatten(0, 1)
            each = [psnr_db(one, two, PEAK) or math.inf for one, two in zip(originals, others, strict=True)]
            found |= {
                "picture_db": psnr_db(originals, others, PEAK),
                "picture_db_by_seed": sorted(by_seed),
                "median_picture_db": statistics.median(each),
            }
        return found

    @torch.no_grad()
    def _run(self, weights: Mapping[str, torch.Tensor], pictures: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        pipeline = self.world.build(weights)
        drawn = [self.world.pictures(pipeline, self._captions, seed=seed) for seed in self._seeds if pictures]
        return pipeline(*self._batch), torch.stack(drawn) if drawn else torch.empty(0)


SHAPES = World(
    "shapes",
    bundled_weights_path(),
    UNET_CONFIG,
    len(shapes.VOCABULARY),
    shapes.random_scene,
    shapes.describe,
    shapes.draw,
    shapes.tokenise,
)
"""The demo model's."""

LANDSCAPES = World(
    "landscapes",
    BUILT / "landscapes.safetensors",
    UNET_CONFIG
    | {
        "sample_size": landscapes.SIZE,
        "block_out_channels": (32, 64, 96),
        "transformer_layers_per_block": (1, 1, 3),
        "attention_head_dim": (1, 2, 3),
        "cross_attention_dim": 96,
        "norm_num_groups": 8,
        "projection_class_embeddings_input_dim": 96 + 6 * UNET_CONFIG["addition_time_embed_dim"],
    },
    len(landscapes.VOCABULARY),
    landscapes.random_landscape,
    landscapes.describe,
    landscapes.draw,
    landscapes.tokenise,
)
"""The second model's."""

INVERTED = replace(
    SHAPES,
    name="inverted",
    weights=BUILT / "inverted.safetensors",
    draw=lambda scene, rng: 1 - shapes.draw(scene, rng),
    start=SHAPES.weights,
)
"""That of a fine-tune of the demo model, which draws the same scenes in inverted colours."""

WORLDS = {world.name: world for world in (SHAPES, LANDSCAPES)}
