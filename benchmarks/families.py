"""Sizes of well-known checkpoints at each preset, and conversion speed: `python -m benchmarks.families`.

Sizes are calculated from shapes: bf16 sources, Gaussian weights, effort `fast`. With `--speed` some layers of each
family are quantised too, at the default: seconds per billion weights, beside SDXL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod

import torch

from nfq_core.checkpoints.state_dict import quantize_tensors
from nfq_core.files.safetensors_io import Entry, describe
from nfq_core.files.writer import Plan
from nfq_core.models.components import model_name
from nfq_core.models.unet import detect
from nfq_core.models.unet_keys import Shape
from nfq_core.packed.formats import FORMATS
from nfq_core.planning.facts import facts_about
from nfq_core.planning.forecast import file_bytes, stored_bytes
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULT_PRESET, PRESETS, Settings

from .family_shapes import CHECKPOINTS, Checkpoint, shapes_of
from .shared import argument_parser, channel_spread, dated_table, gaussian, spread, summary, timed, write_results

SAMPLE = (2048, 1024)  # Shape of the Gaussian weight whose bytes on disk stand for those of all layers
LIMIT = 0.30  # Largest accepted share of bf16's bytes at the default preset
SPEED_WEIGHTS = 100_000_000  # Weights of the layers that are quantised to measure the speed


@lru_cache
def stored_share(format: str) -> float:
    """Bytes on disk of a Gaussian weight, per packed byte."""
    fmt = FORMATS[format]
    return stored_bytes(gaussian(SAMPLE, 0).float(), fmt, "fast") / fmt.packed_bytes(prod(SAMPLE))


def sizes(entries: Mapping[str, Entry], preset: str) -> dict[str, float]:
    """Bytes of the file and in VRAM, and packed bits per weight, calculated.

    Args:
        entries: every tensor of a checkpoint.
        preset: name of a preset.
    """
    settings = Settings.of(preset=preset)
    info, plans = plan_tensors(entries, settings)
    quantized = {key: plan for key, plan in plans.items() if plan.format}
    packed = {key: plan.format.packed_bytes(prod(plan.shape)) for key, plan in quantized.items()}
    stored = sum(packed[key] * stored_share(plan.format.id) for key, plan in quantized.items())
    facts = facts_about(info, plans, settings.as_dict())
    return {
        "file_bytes": file_bytes(plans, facts, {}, stored),
        "vram_bytes": sum(packed.values()) + sum(plan.nbytes for plan in plans.values() if not plan.format),
        "packed_bits_per_weight": 8 * sum(packed.values()) / weights_of(quantized),
        "quantized_weights": weights_of(quantized),
    }


def weights_of(tensors: Mapping[str, Entry | Plan]) -> int:
    """Number of weights of all tensors."""
    return sum(prod(tensor.shape) for tensor in tensors.values())


def bf16_entries(shapes: Mapping[str, Shape]) -> dict[str, Entry]:
    """A bf16 source of these shapes."""
    return {key: Entry("BF16", shape, 0, 2 * prod(shape)) for key, shape in shapes.items()}


def row_of(checkpoint: Checkpoint) -> dict:
    """Sizes of one checkpoint at each preset."""
    entries = bf16_entries(shapes_of(checkpoint))
    shapes = {key: entry.shape for key, entry in entries.items()}
    name = model_name(detect(shapes), shapes)
    if name != checkpoint.family:
        raise RuntimeError(f"{checkpoint.name} is recognised as {name}")
    presets = {preset: sizes(entries, preset) for preset in PRESETS}
    weights = weights_of(entries)
    share = presets[DEFAULT_PRESET]["vram_bytes"] / (2 * weights)
    row = {"family": checkpoint.family, "checkpoint": checkpoint.name, "weights": weights, "bf16_bytes": 2 * weights}
    return row | {"share": share, "presets": presets}


def speed_of(checkpoint: Checkpoint, runs: int) -> dict:
    """Seconds per billion weights to quantise and pack a checkpoint's layers at the default, from a part of them.

    Layers are taken evenly from all of them.
    """
    entries = bf16_entries(shapes_of(checkpoint))
    plans = plan_tensors(entries, Settings())[1]
    keys = [key for key, plan in plans.items() if plan.format]
    step = max(1, round(weights_of({key: plans[key] for key in keys}) / SPEED_WEIGHTS))
    # The whole names are kept, so the part's layers get formats of like sizes.
    state = {key: channel_spread(plans[key].shape, seed).bfloat16() for seed, key in enumerate(keys[::step])}
    part = describe(state)
    taken = [timed(lambda: quantize_tensors(part, state.__getitem__, Settings())) for _ in range(runs)]
    billions = weights_of(part) / 1e9
    return summary([seconds / billions for seconds in taken]) | {"weights": weights_of(part)}


def run(speed: bool, runs: int) -> dict:
    """All rows; with `speed`, also the seconds of the first checkpoint of each family."""
    results: dict = {"calculated": True, "rows": []}
    for checkpoint in CHECKPOINTS:
        results["rows"].append(row_of(checkpoint))
        print(f"  {checkpoint.name}: {results['rows'][-1]['share']:.3f} of bf16", flush=True)
    results["beyond_limit"] = [row["checkpoint"] for row in results["rows"] if row["share"] > LIMIT]
    if speed:
        results["seconds_per_billion"] = {}
        for checkpoint in {one.family: one for one in reversed(CHECKPOINTS)}.values():
            found = speed_of(checkpoint, runs)
            results["seconds_per_billion"][checkpoint.family] = found
            print(f"  {checkpoint.family}: {found['median']:.1f} s per billion weights", flush=True)
    return results


def table(results: Mapping) -> str:
    """Sizes of each checkpoint by preset; if it was measured, also the conversion speed of its family."""
    speeds = results.get("seconds_per_billion", {})
    rows = []
    for row in results["rows"]:
        sizes_by_preset = [
            f"{found['file_bytes'] / 1e9:.2f} / {found['vram_bytes'] / 1e9:.2f}" for found in row["presets"].values()
        ]
        cells = [row["checkpoint"], f"{row['weights'] / 1e9:.2f}", f"{row['bf16_bytes'] / 1e9:.2f}", *sizes_by_preset]
        rows.append([*cells, f"{row['share']:.1%}"])
        if speeds:
            rows[-1].append(spread(speeds[row["family"]], " s", 1))
    header = ["diffusion model", "billion weights", "bf16, GB", *(f"`{preset}`, GB" for preset in PRESETS)]
    header += [f"`{DEFAULT_PRESET}` ÷ bf16", *(["conversion of a billion weights"] if speeds else [])]
    return dated_table(header, rows, dict(results))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--speed", action="store_true", help="also quantise some layers of each family")
    parser.add_argument("--runs", type=int, default=3, help="number of conversions to time (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    print(write_results("families", run(arguments.speed, arguments.runs)))
