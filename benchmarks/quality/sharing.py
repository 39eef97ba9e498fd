"""What is lost by using another model's calibration: `python -m benchmarks.quality.sharing`.

A fine-tune of the demo model, quantised without a calibration, with its own and with the demo model's. The demo model
with a LoRA made of that fine-tune, its weights quantised with calibrations that were sampled without the LoRA and with
it. `python -m benchmarks.quality.train inverted --steps 150 --out build/inverted.safetensors` makes the fine-tune.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nfq_core import Calibration
from nfq_core.demo.calibrate import CALIBRATION_SEED
from nfq_core.planning.settings import Settings

from ..shared import markdown_table, run_command
from .worlds import INVERTED, SHAPES, Judge, World, quantized

PRESET, PROMPTS, CAPTIONS, SEEDS = "balanced", 32, 16, (0, 1000)
LORA_RANK = 16


def lora(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of each Linear weight of a fine-tune's transformers at rank LORA_RANK, fp32, by name."""
    changes = {}
    for name, weight in before.items():
        if ".attentions." in name and weight.dim() == 2:
            left, sizes, right = torch.linalg.svd(after[name].float() - weight.float(), full_matrices=False)
            changes[name] = left[:, :LORA_RANK] * sizes[:LORA_RANK] @ right[:LORA_RANK]
    return changes


def judged(
    world: World, base: Path, changes: Mapping[str, torch.Tensor], calibrations: Mapping[str, Calibration | None]
) -> dict[str, dict]:
    """The figures of `base` quantised with each calibration, with `changes` added, against the world's weights."""
    judge = Judge(world, world.captions(PROMPTS, CALIBRATION_SEED), CAPTIONS, SEEDS)
    found = {}
    for name, calibration in calibrations.items():
        dense, _ = quantized(base, Settings.of(preset=PRESET), calibration)
        dense |= {key: (dense[key].float() + change).half() for key, change in changes.items()}
        found[name] = judge.figures(dense)
        print(f"  {world.name}, {name}: {found[name]['output_db']:.1f} dB", flush=True)
    return found


def run() -> dict:
    """Figures of the fine-tune and of the demo model with the LoRA, by calibration."""
    original = SHAPES.calibrate(PROMPTS)
    tuned = {"none": None, "its own": INVERTED.calibrate(PROMPTS), "the demo model's": original}
    found = {"fine-tune": judged(INVERTED, INVERTED.weights, {}, tuned)}
    before = load_file(SHAPES.weights)
    changes = lora(before, load_file(INVERTED.weights))
    with tempfile.TemporaryDirectory() as folder:
        applied = Path(folder) / "applied.safetensors"
        save_file(before | {key: (before[key].float() + change).half() for key, change in changes.items()}, applied)
        world = replace(INVERTED, name="demo model and LoRA", weights=applied)
        with_lora = {"none": None, "sampled with the LoRA": world.calibrate(PROMPTS), "sampled without": original}
        found["LoRA"] = judged(world, SHAPES.weights, changes, with_lora)
    return {"preset": PRESET, "captions": CAPTIONS, "seeds": len(SEEDS), "rank": LORA_RANK, **found}


def table(results: Mapping) -> str:
    """Output and pictures by model and calibration."""
    rows = [
        [model, name, f"{figures['output_db']:.1f}", f"{figures['picture_db']:.1f}"]
        for model in ("fine-tune", "LoRA")
        for name, figures in results[model].items()
    ]
    return markdown_table(["model", "calibration", "output, dB", "pictures, dB"], rows)


if __name__ == "__main__":
    run_command(__doc__, "sharing", run)
