"""The two small models that formats and calibrations are judged on: the demo model, and one that tuned nothing.

Both have SDXL's UNet architecture and draw captions of random scenes. The second one is trained by
`python -m benchmarks.quality.train landscapes`; its weights are not in the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nfq_core.demo import shapes
from nfq_core.demo.model import UNET_CONFIG, TinyPipeline, build_pipeline

from . import landscapes


@dataclass(frozen=True)
class World:
    """What a model draws, and its architecture.

    Args:
        name: name of the world.
        config: arguments of diffusers' `UNet2DConditionModel`.
        words: number of words in the vocabulary.
        random_scene: draws a scene at random.
        describe: the caption of a scene.
        draw: a picture of a scene, float32 [size, size, 3] in 0..1; the generator varies it.
        tokenise: word ids of captions, int64 [n, MAX_WORDS].
    """

    name: str
    config: Mapping[str, Any]
    words: int
    random_scene: Callable[[np.random.Generator], Any]
    describe: Callable[[Any], str]
    draw: Callable[[Any, np.random.Generator], np.ndarray]
    tokenise: Callable[..., np.ndarray]

    def build(self, weights: Mapping[str, torch.Tensor] | None = None) -> TinyPipeline:
        """The pipeline with these weights, or with random ones."""
        return build_pipeline(weights, self.config, self.words)

    def captions(self, count: int, seed: int, without: tuple[str, ...] = ()) -> tuple[str, ...]:
        """`count` different captions of random scenes, except those in `without`."""
        rng, found = np.random.default_rng(seed), dict[str, None]()
        while len(found) < count:
            caption = self.describe(self.random_scene(rng))
            if caption not in without:
                found[caption] = None
        return tuple(found)

    def ids(self, captions: tuple[str, ...]) -> torch.Tensor:
        """Word ids of captions, int64 [n, MAX_WORDS]."""
        return torch.from_numpy(self.tokenise(captions))


SHAPES = World(
    "shapes",
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

WORLDS = {world.name: world for world in (SHAPES, LANDSCAPES)}

SECOND_MODEL = Path(__file__).resolve().parents[2] / "build" / "landscapes.safetensors"
"""Where the second model's weights are expected; git ignores the folder."""
