"""Train one of the small models on the CPU: `python -m benchmarks.quality.train WORLD --out FILE`.

Starts from random weights, a fine-tune from the demo model's. Writes the averaged weights as fp16 to --out every five
minutes. The learning rate decays with the clock. With --steps the run has a fixed length and is repeatable to the bit
on one machine. If other programs compete for the cores, set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from nfq_core.demo.model import SCHEDULER_CONFIG, import_diffusers, merge_weights

from ..shared import argument_parser
from .worlds import INVERTED, WORLDS, World

TRAINABLE = {**WORLDS, INVERTED.name: INVERTED}

BATCH_SIZE, CAPTION_DROPOUT = 32, 0.1
LEARNING_RATE, WARM_UP_STEPS, EMA_DECAY = 1e-3, 200, 0.999
CHECKPOINT_MINUTES = 5


def make_batch(world: World, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scenes: pictures of shape (n, 3, size, size) in -1..1 and word ids of shape (n, MAX_WORDS)."""
    scenes = [world.random_scene(rng) for _ in range(BATCH_SIZE)]
    pictures = torch.from_numpy(np.stack([world.draw(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)
    captions = ["" if rng.random() < CAPTION_DROPOUT else world.describe(scene) for scene in scenes]
    return pictures * 2 - 1, torch.from_numpy(world.tokenise(captions))


def average_weights(averages: list[torch.Tensor], weights: list[torch.Tensor], count: torch.Tensor) -> None:
    """Move the averages towards the weights; faster at first, to forget the random start."""
    decay = min(EMA_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def train(options: Namespace) -> None:
    """Train for the given minutes or steps, and write checkpoints."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    diffusers = import_diffusers()
    noising = diffusers.DDPMScheduler(**SCHEDULER_CONFIG)
    world = TRAINABLE[options.world]
    pipeline = world.build(load_file(world.start) if world.start else None).train()
    # Plain matmuls: the backward pass of the CPU's fused attention takes a quarter of a step.
    pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    averaged = AveragedModel(pipeline, multi_avg_fn=average_weights)
    optimiser = torch.optim.AdamW(pipeline.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    started, step, minutes, checkpoints, mean_loss = time.monotonic(), 0, 0.0, 0, 1.0

    def write_checkpoint() -> None:
        half = {name: tensor.detach().half().contiguous() for name, tensor in merge_weights(averaged.module).items()}
        facts = {"steps": str(step), "minutes": f"{minutes:.1f}", "loss": f"{mean_loss:.4f}", "seed": str(options.seed)}
        metadata = {"format": "pt", "license": "Apache-2.0", "title": f"ComfyUI-NFQ {world.name}", **facts}
        temporary = options.out.with_suffix(".partial")
        save_file(half, temporary, metadata=metadata)
        temporary.replace(options.out)
        print(json.dumps(facts), flush=True)

    while (progress := step / options.steps if options.steps else minutes / options.minutes) < 1:
        # A linear warm-up times half a cosine over the run.
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * factor
        pictures, ids = make_batch(world, rng)
        noise = torch.randn(pictures.shape)
        # One random timestep from each n-th of the range: the loss has less noise than with independent ones.
        fractions = (torch.arange(BATCH_SIZE) + torch.rand(BATCH_SIZE)) / BATCH_SIZE
        timesteps = (fractions * noising.config.num_train_timesteps).long()
        noisy = noising.add_noise(pictures, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = pipeline(noisy, timesteps, ids)
        loss = functional.mse_loss(prediction.float(), noising.get_velocity(pictures, noise, timesteps))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipeline.parameters(), 1.0)
        optimiser.step()
        averaged.update_parameters(pipeline)
        step += 1
        mean_loss += (loss.item() - mean_loss) * max(0.01, 1 / step)
        minutes = (time.monotonic() - started) / 60
        if minutes >= (checkpoints + 1) * CHECKPOINT_MINUTES:
            checkpoints += 1
            write_checkpoint()
    write_checkpoint()


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "world", choices=tuple(TRAINABLE), help="what it draws; shapes is the demo model, inverted its fine-tune"
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run (default: 60)")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
