"""What calibration gains on the demo model: `python -m benchmarks.calibrated`.

Statistics come from 32 captions sampled with DPM++ and CFG; everything is measured on other captions. Output dB is the
signal-to-noise ratio of the whole UNet's output on noisy pictures at random timesteps, against the fp16 weights';
picture dB the PSNR of 24 captions drawn with the same seeds. Every weight is at the given number of levels,
convolutions too; the first and last convolution are kept throughout, for the article's format as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from nfq_core import NFTensor, quantize
from nfq_core.article import article_dequantize, article_disk_bytes, article_quantize
from nfq_core.calibration import Calibration
from nfq_core.codec import encode
from nfq_core.demo.calibrate import HELD_OUT_SEED, collect_demo, noisy_pictures, random_captions
from nfq_core.demo.model import SCHEDULER_CONFIG, TinyPipeline, build_pipeline, load_weights, sample
from nfq_core.demo.run import GUIDANCE, STEPS
from nfq_core.demo.shapes import describe as describe_scene
from nfq_core.demo.shapes import random_scene
from nfq_core.examine import sqnr_db
from nfq_core.formats import LEVELS
from nfq_core.metrics import psnr_db
from nfq_core.policy import DEFAULTS, plan_tensors
from nfq_core.state import describe
from nfq_core.unet import detect

from .report import machine, markdown_table, write_results

PROMPTS, HELD_OUT = 32, 24
OUTPUT_BATCH = 128
"""Noisy pictures in the held-out batch."""

Weights = dict[str, torch.Tensor]


class Judge:
    """Compares models of other weights with the original's outputs and pictures."""

    def __init__(self, weights: Weights) -> None:
        calibrated = random_captions(PROMPTS)
        rng = np.random.default_rng(HELD_OUT_SEED)
        scenes = [random_scene(rng) for _ in range(2 * OUTPUT_BATCH)]
        scenes = [scene for scene in scenes if describe_scene(scene) not in calibrated][:OUTPUT_BATCH]
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        timesteps = torch.randint(SCHEDULER_CONFIG["num_train_timesteps"], (OUTPUT_BATCH,), generator=generator)
        self._batch = noisy_pictures(scenes, timesteps, rng, HELD_OUT_SEED)
        self._captions = random_captions(HELD_OUT, HELD_OUT_SEED, without=calibrated)
        self._output, self._pictures = self._run(build_pipeline(weights))

    @torch.no_grad()
    def _run(self, pipeline: TinyPipeline) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = sample(pipeline, self._captions, seed=0, steps=STEPS, guidance=GUIDANCE)
        return pipeline(*self._batch), torch.from_numpy(pictures)

    def judge(self, weights: Weights) -> dict:
        """`output_db` and `picture_db`."""
        output, pictures = self._run(build_pipeline(weights))
        return {"output_db": sqnr_db(self._output, output), "picture_db": psnr_db(self._pictures, pictures, 255)}


def measure(
    judge: Judge, weights: Weights, keys: list[str], make: Callable[[str], tuple[torch.Tensor, int, int]]
) -> dict:
    """Bits per weight and both errors where `make` gives a weight as decoded, its bytes on disk and its packed ones."""
    made = {key: make(key) for key in keys}
    total = sum(weights[key].numel() for key in keys)
    stored, packed = (8 * sum(parts[i] for parts in made.values()) / total for i in (1, 2))
    figures = judge.judge(weights | {key: parts[0] for key, parts in made.items()})
    return {"bits_per_weight": stored, "packed_bits_per_weight": packed, **figures}


def sizes(tensor: NFTensor) -> tuple[torch.Tensor, int, int]:
    """A weight as decoded, its bytes on disk and its packed ones."""
    frames = encode(tensor.data, tensor.format.sections(tensor.numel()))
    return tensor.dequantize(), sum(map(len, frames)), tensor.nbytes


def run(calibration: Calibration) -> dict:
    """All measurements, as written to the results."""
    weights = load_weights()
    plans = plan_tensors(describe(weights), DEFAULTS)[1]
    keys = [key for key, plan in plans.items() if plan.format]
    found, warnings = calibration.for_plans(detect({key: tensor.shape for key, tensor in weights.items()}), plans)
    for warning in warnings:
        print(warning)
    judge = Judge(weights)
    importance = {key: {"importance": inputs.importance} for key, inputs in found.items()}
    feedback = {key: inputs.arguments() for key, inputs in found.items()}
    rows = []
    for levels in LEVELS:

        def article(key: str, levels: int = levels) -> tuple[torch.Tensor, int, int]:
            tensor = article_quantize(weights[key], levels)
            nbytes = article_disk_bytes(tensor)
            return article_dequantize(tensor), nbytes, nbytes

        row = {"levels": levels, "article": measure(judge, weights, keys, article)}
        for name, arguments in (("fast", {}), ("importance", importance), ("feedback", feedback)):

            def ours(key: str, arguments: dict = arguments, levels: int = levels) -> tuple[torch.Tensor, int, int]:
                return sizes(quantize(weights[key], levels, **arguments.get(key, {})))

            row[name] = measure(judge, weights, keys, ours)
        rows.append(row)
        print(row, flush=True)
    return {"prompts": calibration.prompts, "held_out": HELD_OUT, "output_batch": OUTPUT_BATCH, "rows": rows}


def table(results: dict) -> str:
    """The README's table."""
    names = ("article", "fast", "importance", "feedback")
    rows = []
    for row in results["rows"]:
        cells = [str(row["levels"]), f"{row['article']['bits_per_weight']:.2f}"]
        cells += [f"{row['fast']['bits_per_weight']:.2f}", f"{row['feedback']['bits_per_weight']:.2f}"]
        for figure in ("output_db", "picture_db"):
            base = row["article"][figure]
            cells += [
                f"{base:.1f}",
                *(f"{row[name][figure]:.1f} ({row[name][figure] - base:+.1f})" for name in names[1:]),
            ]
        rows.append(cells)
    header = ["levels", "article, bits", "without, bits", "feedback, bits"]
    header += ["output: article, dB", "without", "importance", "feedback"]
    header += ["pictures: article, dB", "without", "importance", "feedback"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", help="a file that `nfq calibrate-demo` wrote; by default it is collected anew")
    path = parser.parse_args().calibration
    print(machine())
    results = run(Calibration.load(path) if path else collect_demo(PROMPTS))
    print(write_results("calibrated", "python -m benchmarks.calibrated", results))
