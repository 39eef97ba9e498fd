"""Output and pictures of the demo model at each preset and effort: `python -m benchmarks.quality.presets`.

The demo model stands for any trained UNet that is not SDXL: layers get bits by the role that they have in SDXL. More
bits must give better pictures, and `best` better ones than `fast`. Pictures are of captions that no calibration uses,
each with several seeds; their errors are pooled as noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import torch

from nfq_core import load
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import file_info
from nfq_core.decibels import sqnr_db
from nfq_core.demo.calibrate import HELD_OUT_SEED, random_captions
from nfq_core.demo.model import build_pipeline, bundled_weights_path, load_weights
from nfq_core.demo.model import sample as draw
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.packed.tensor import NFTensor
from nfq_core.planning.settings import PRESETS, Settings
from nfq_core.report.metrics import psnr_db

from ..shared import markdown_table, run_command
from .demo import PEAK, held_out_batch

CAPTIONS, SEEDS = 24, (0, 1000)


@torch.no_grad()
def output_and_pictures(weights: dict[str, torch.Tensor], captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The UNet's output for a batch of noisy pictures; pictures of all captions, fp32 of shape (seeds, captions, …)."""
    pipeline = build_pipeline(weights)
    pictures = [torch.from_numpy(draw(pipeline, captions, seed=seed)).float() for seed in SEEDS]
    return pipeline(*held_out_batch()), torch.stack(pictures)


def run() -> dict:
    """A row for each effort and preset, largest first, as written to the results."""
    captions = random_captions(CAPTIONS, HELD_OUT_SEED)
    output, pictures = output_and_pictures(load_weights(), captions)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for effort, (preset, _) in product(EFFORTS, sorted(PRESETS.items(), key=lambda item: -item[1])):
            path = Path(folder) / f"{effort}-{preset}.nfq.safetensors"
            quantize_file(bundled_weights_path(), path, Settings.of(preset=preset, effort=effort))
            dense = {key: t.dequantize() if isinstance(t, NFTensor) else t for key, t in load(path).items()}
            found_output, found = output_and_pictures(dense, captions)
            by_seed = [psnr_db(theirs, ours, PEAK) for theirs, ours in zip(pictures, found, strict=True)]
            rows.append(
                {
                    "effort": effort,
                    "preset": preset,
                    "packed_bits_per_weight": file_info(path)["packed_bits_per_weight"],
                    "output_db": sqnr_db(output, found_output),
                    "picture_db": psnr_db(pictures.flatten(0, 1), found.flatten(0, 1), PEAK),
                    "picture_db_by_seed": sorted(by_seed),
                }
            )
            print(f"  {preset}, {effort}", flush=True)
    return {"captions": CAPTIONS, "seeds": len(SEEDS), "rows": rows, "out_of_order": out_of_order(rows)}


def out_of_order(rows: Sequence[dict]) -> list[str]:
    """What should not be: a larger preset with worse pictures than the next one, `best` with worse ones than `fast`."""
    found = {(row["effort"], row["preset"]): row["picture_db"] for row in rows}
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    faults = [
        f"{effort}: {larger} is worse than {smaller}"
        for effort, (larger, smaller) in product(EFFORTS, pairwise(presets))
        if found[effort, larger] < found[effort, smaller]
    ]
    return faults + [f"{one}: best is worse than fast" for one in presets if found["best", one] < found["fast", one]]


def table(results: dict) -> str:
    """Bits, output and pictures of each preset at both efforts."""
    lines = []
    for row in results["rows"]:
        low, high = row["picture_db_by_seed"][0], row["picture_db_by_seed"][-1]
        pictures = f"{row['picture_db']:.1f} ({low:.1f} – {high:.1f})"
        bits = f"{row['packed_bits_per_weight']:.2f}"
        lines.append([row["preset"], row["effort"], bits, f"{row['output_db']:.1f}", pictures])
    return markdown_table(["preset", "effort", "packed bits", "output, dB", "pictures, dB (by seed)"], lines)


if __name__ == "__main__":
    run_command(__doc__, "presets", run)
