"""What calibrating costs: `python -m benchmarks.speed.calibrating`.

The demo model: time of sampling 8 captions without collecting, with Hessians, and with sensitivities too; peak memory,
each in a process of its own. SDXL, without weights: operations of one call of the UNet with CFG at the size that
calibrations sample, those that collecting adds, and the bytes that it holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nfq_core import collect
from nfq_core.calibration.collector import RANK, Collector
from nfq_core.calibration.prompts import PROMPTS, SIDE, STEPS
from nfq_core.demo.calibrate import BATCH, random_captions
from nfq_core.demo.model import build_pipeline, load_weights, sample
from nfq_core.models.unet_keys import SDXL_BASE

from ..shared import argument_parser, json_of, markdown_table, process_status, spread, summary, timed, write_results

CAPTIONS, ROUNDS = 8, 3
LATENT_PIXELS, TOKENS = 8, 77
WAYS: dict[str, dict[str, bool] | None] = {
    "sampling alone": None,
    "with Hessians": {"hessians": True},
    "with Hessians and sensitivities": {"hessians": True, "sensitivities": True},
}


def demo(way: str) -> dict[str, Any]:
    """Sample the demo model's captions one way in this process: seconds, and peak resident memory in bytes."""
    pipeline, captions, options = build_pipeline(load_weights()), random_captions(CAPTIONS), WAYS[way]
    before = process_status()["VmHWM"]

    def draw() -> None:
        with nullcontext() if options is None else collect(pipeline.unet, **options) as collected:
            for first in range(0, CAPTIONS, BATCH):
                sample(pipeline, captions[first : first + BATCH], seed=first, steps=STEPS)
        if collected is not None:
            collected.calibration()

    return {"seconds": timed(draw), "peak_bytes": process_status()["VmHWM"] - before}


@contextmanager
def operations() -> Iterator[list[int]]:
    """Count the multiplications and additions of the products and convolutions inside the `with` block."""
    found: list[int] = []
    with FlopCounterMode(display=False) as counter:
        yield found
    found.append(counter.get_total_flops())


def sdxl() -> dict[str, Any]:
    """Operations of a call of SDXL's UNet, those that collecting adds to it, and the bytes held, on the meta device."""
    from diffusers import UNet2DConditionModel
    from samples import unet_config

    side = SIDE // LATENT_PIXELS
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(SDXL_BASE))
        context = torch.empty(2, TOKENS, 2048)
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        latents, time = torch.empty(2, 4, side, side), torch.empty(2)

    def call() -> None:
        with torch.no_grad():
            unet(latents, time, context, added_cond_kwargs=added)

    with operations() as plain:
        call()
    collector = Collector(unet, hessians=True)
    with operations() as collected, collector.watching():
        call()
    return {"operations": plain[0], "added_operations": collected[0] - plain[0], "held_bytes": collector.nbytes}


def run() -> dict[str, Any]:
    """All measurements, as written to the results."""
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, taken in found.items():
            taken.append(json_of("benchmarks.speed.calibrating", "--one", way))
    rows = {
        way: {name: summary([one[name] for one in taken]) for name in ("seconds", "peak_bytes")}
        for way, taken in found.items()
    }
    return {"captions": CAPTIONS, "steps": STEPS, "rank": RANK, "demo": rows, "calls": len(PROMPTS) * STEPS} | {
        "sdxl": sdxl()
    }


def table(results: Mapping[str, Any]) -> str:
    """Time and memory of the demo model, and what SDXL takes."""
    base = results["demo"]["sampling alone"]
    rows = []
    for way, found in results["demo"].items():
        ratio = found["seconds"]["median"] / base["seconds"]["median"]
        more = (found["peak_bytes"]["median"] - base["peak_bytes"]["median"]) / 1e6
        rows.append([way, f"{spread(found['seconds'], ' s', 1)} = {ratio:.2f} ×", f"{more:+.0f} MB"])
    one, calls = results["sdxl"], results["calls"]
    share = one["added_operations"] / one["operations"]
    return (
        markdown_table(["demo model, 8 captions", "time", "peak memory"], rows)
        + f"\n\nSDXL at {SIDE} × {SIDE} with CFG: {one['operations'] / 1e12:.1f} TFLOP a call, "
        f"{one['added_operations'] / 1e12:.2f} more to collect ({share:.0%}), {calls} calls; "
        f"{one['held_bytes'] / 1e6:.0f} MB held on the device."
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--one", choices=tuple(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(demo(options.one)))
    else:
        print(write_results("calibrating", run()))
