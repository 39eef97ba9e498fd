"""Train the demo model from scratch on the CPU: python -m benchmarks.quality.train_demo --minutes 60 --out FILE

Writes the averaged weights as fp16 to --out every few minutes, and beside it a sheet of the demo captions'
pictures. The learning rate decays with the clock, so that any machine finishes in the given time; --steps replaces
the clock, which makes a run repeatable to the bit on one machine. Where other programs compete for the cores, set
OMP_WAIT_POLICY=PASSIVE, for otherwise the threads waste their time spinning.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from nfq_core.demo.model import (
    SCHEDULER_CONFIG,
    TinyPipeline,
    build_pipeline,
    import_diffusers,
    load_weights,
    merge_weights,
    sample,
)
from nfq_core.demo.shapes import CAPTIONS, IMAGE_SIZE, describe, draw, random_scene, tokenise

CAPTION_DROPOUT = 0.1
WARM_UP_STEPS = 200
EMA_DECAY = 0.999
SHEET_SCALE = 6


def make_batch(rng: np.random.Generator, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random scenes: pictures [n, 3, 32, 32] in -1..1 and word ids [n, MAX_WORDS], some only padding."""
    scenes = [random_scene(rng) for _ in range(batch_size)]
    pictures = torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)
    captions = ["" if rng.random() < CAPTION_DROPOUT else describe(scene) for scene in scenes]
    return pictures * 2 - 1, torch.from_numpy(tokenise(captions))


def stratified_timesteps(batch_size: int, timestep_count: int) -> torch.Tensor:
    """Draw timesteps [n], one from each n-th of the range: less noise in the loss than independent draws."""
    fractions = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
    return (fractions * timestep_count).long()


def average_weights(averages: list[torch.Tensor], weights: list[torch.Tensor], count: torch.Tensor) -> None:
    """Move the averages towards the weights; the average is short at first, to forget the random start."""
    decay = min(EMA_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def learning_rate_factor(step: int, progress: float) -> float:
    """Linear warm-up over the first steps times half a cosine over the run's progress, 0..1."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + np.cos(np.pi * min(1.0, progress)))


def write_checkpoint(averaged: TinyPipeline, out: Path, facts: dict[str, str]) -> None:
    """Write fp16 weights to out, and a sheet beside it: above the fp32 weights' pictures, below the fp16 ones'."""
    half = {name: tensor.detach().half().contiguous() for name, tensor in merge_weights(averaged).items()}
    metadata = {"format": "pt", "license": "Apache-2.0", "title": "ComfyUI-NFQ demo model", **facts}
    temporary = out.with_suffix(".partial")
    save_file(half, temporary, metadata=metadata)
    temporary.replace(out)
    averaged.eval()
    rows = [sample(pipeline, CAPTIONS, seed=0) for pipeline in (averaged, build_pipeline(half))]
    difference = np.abs(rows[0].astype(int) - rows[1]).max()
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    sheet = sheet.repeat(SHEET_SCALE, axis=0).repeat(SHEET_SCALE, axis=1)
    from PIL import Image

    Image.fromarray(sheet).save(out.with_name(f"{out.stem}-{int(facts['steps']):06}.png"))
    print(json.dumps({**facts, "fp16_max_difference": int(difference)}), flush=True)


def read_progress(checkpoint: Path) -> tuple[int, float]:
    """Read from a checkpoint's metadata how many steps and minutes it was trained."""
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    return int(metadata["steps"]), float(metadata["minutes"])


def train(
    out: Path,
    progress_of: Callable[[int, float], float],
    *,
    seed: int,
    batch_size: int,
    learning_rate: float,
    checkpoint_minutes: float,
    resume: Path | None = None,
) -> None:
    """Train until progress_of(step, elapsed minutes) reaches 1, writing checkpoints to out.

    Starts from random weights, or from an earlier checkpoint's, either way with a fresh optimiser.
    """
    earlier_steps, earlier_minutes = (0, 0.0) if resume is None else read_progress(resume)
    torch.manual_seed(seed + earlier_steps)
    rng = np.random.default_rng(seed + earlier_steps)
    diffusers = import_diffusers()
    noising = diffusers.DDPMScheduler(**SCHEDULER_CONFIG)
    pipeline = build_pipeline(None if resume is None else load_weights(resume)).train()
    # Plain matmuls: the backward pass of the CPU's fused attention takes a quarter of a step.
    pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    averaged = AveragedModel(pipeline, multi_avg_fn=average_weights)
    optimiser = torch.optim.AdamW(pipeline.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)

    def facts() -> dict[str, str]:
        return {
            "steps": str(earlier_steps + step),
            "minutes": f"{earlier_minutes + minutes:.1f}",
            "loss": f"{mean_loss:.4f}",
            "seed": str(seed),
        }

    start = time.monotonic()
    step, minutes, checkpoints, mean_loss = 0, 0.0, 0, 1.0
    while (progress := progress_of(step, minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, progress)
        pictures, ids = make_batch(rng, batch_size)
        noise = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        timesteps = stratified_timesteps(batch_size, noising.config.num_train_timesteps)
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
        minutes = (time.monotonic() - start) / 60
        if step % 100 == 0:
            print(f"step {step}  {minutes:.1f} min  loss {mean_loss:.4f}", flush=True)
        if minutes >= (checkpoints + 1) * checkpoint_minutes:
            checkpoints += 1
            write_checkpoint(averaged.module, out, facts())
    write_checkpoint(averaged.module, out, facts())


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write; sheets go beside it")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run (default: 60)")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of --minutes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()

    def progress_of(step: int, minutes: float) -> float:
        return step / arguments.steps if arguments.steps else minutes / arguments.minutes

    torch.set_num_threads(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    train(
        arguments.out,
        progress_of,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        checkpoint_minutes=arguments.checkpoint_minutes,
        resume=arguments.resume,
    )


if __name__ == "__main__":
    main()
