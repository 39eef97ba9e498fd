"""Weight-only beside int8 activations and torch's dynamic int8 quantisation: `python -m benchmarks.speed.int8`.

On the demo model: the error of the UNet's output on noisy pictures and of pictures drawn with DPM++ and CFG, against
the fp16 weights and against the same packed weights with activations in floating point; the layers whose products lose
most; the time of a step. At the shapes of SDXL's Linear layers (1024 × 1024 pixels, CFG), with random weights and
inputs: the time of a layer. All contestants take turns. A CPU computes in fp32, a GPU (`--device cuda`, the layers
alone) in fp16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from nfq_core import NFTensor, quantize, quantize_state_dict
from nfq_core.checkpoints.examine import sqnr_db
from nfq_core.demo.model import TinyPipeline, build_pipeline, load_weights
from nfq_core.layers import PackedLinear, pack_layers, packed_layers
from nfq_core.packed.op import dequantize_for_one_use
from nfq_core.report.metrics import psnr_db

from ..article.__main__ import dynamic_int8
from ..article.models import Model, demo_model
from ..quality.judge import held_out_batch
from ..shared import RESULTS, in_turns, machine, markdown_table, summary, write_results
from .gpu.part import synchronize
from .int8_layers import fits, int8_layers, round_rows

LEVELS = (32, 16, 7)
"""Levels of Linear weights; convolutions have 32."""

TIMED_LEVELS = 16
ROUNDS = 9
STEP_BATCH = 16
"""Pictures in a step: eight, with and without the caption."""

WORST = 3
"""Layers named for their error."""

SHAPES = (
    (8192, 640, 640),
    (8192, 640, 5120),
    (8192, 2560, 640),
    (2048, 1280, 1280),
    (2048, 1280, 10240),
    (2048, 5120, 1280),
    (154, 2048, 1280),
)
"""Tokens, columns and rows of SDXL's Linear layers."""

FP, PACKED, INT8, DYNAMIC = "floating point", "packed", "packed, int8 activations", "torch's dynamic int8"
MAKING_ROWS = "int8 rows"
"""A part of INT8: decoding the weight and rounding its rows, which it would not do if it kept them."""


def milliseconds(contestants: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, dict]:
    """Milliseconds of each contestant's call until the device has finished it, in turns."""

    def finished(call: Callable[[], object]) -> None:
        call()
        synchronize(device)

    taken = in_turns({name: partial(finished, call) for name, call in contestants.items()}, rounds)
    return {name: summary([1000 * seconds for seconds in found]) for name, found in taken.items()}


@torch.no_grad()
def layer_times(shape: tuple[int, int, int], device: torch.device, rounds: int = ROUNDS) -> dict[str, dict]:
    """Milliseconds of one Linear layer for each contestant."""
    tokens, columns, rows = shape
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    dense = nn.Sequential(nn.Linear(columns, rows))
    packed = {"0.weight": quantize(torch.randn(rows, columns, generator=generator) * 0.02, TIMED_LEVELS)}
    dense[0].weight = nn.Parameter(packed["0.weight"].dequantize(torch.float32))
    dense.requires_grad_(False)
    x = torch.randn(tokens, columns, generator=generator).to(device, dtype)
    layers = {FP: dense, PACKED: copy.deepcopy(dense), INT8: copy.deepcopy(dense)}
    for name in (PACKED, INT8):
        pack_layers(layers[name], packed)
    layers = {name: layer.to(device, dtype) for name, layer in layers.items()}
    int8_layers(layers[INT8])
    if device.type == "cpu":
        layers[DYNAMIC] = dynamic_int8(dense)
    calls = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    layer = layers[INT8][0]
    decoded = partial(dequantize_for_one_use, layer.buffer, layer.format_id, layer.weight_shape, torch.float32)
    calls[MAKING_ROWS] = lambda: round_rows(decoded(), overwrite=True)
    return milliseconds(calls, device, rounds)


class Judged:
    """What a UNet makes of the noisy pictures and of the captions."""

    @torch.no_grad()
    def __init__(self, model: Model, unet: nn.Module, batch: tuple[torch.Tensor, ...]) -> None:
        self.output = with_text(unet)(*batch)
        self.pictures = torch.from_numpy(model.draw(unet))

    def against(self, reference: Judged) -> dict:
        """`output_db` and `picture_db`."""
        pictures = psnr_db(reference.pictures, self.pictures, 255)
        return {"output_db": sqnr_db(reference.output, self.output), "picture_db": pictures}


def with_text(unet: nn.Module) -> TinyPipeline:
    """The demo model's pipeline with this UNet."""
    return TinyPipeline(unet, build_pipeline(load_weights()).text)


@torch.no_grad()
def layer_errors(unet: nn.Module, batch: tuple[torch.Tensor, ...]) -> dict:
    """What int8 loses in each Linear layer's product, and how far its inputs' tokens stick out.

    Returns:
        `in_int8` and `not_in_int8` (counts), `median_db` and `worst`: `name`, `db` (the output's signal-to-noise ratio)
        and `peak` (largest magnitude of a token over its root mean square, median of the tokens).
    """
    found: dict[str, dict] = {}

    def hook(name: str) -> Callable:
        def compare(layer: PackedLinear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x = inputs[0]
            if not fits(x, layer.out_features):
                return
            exact = nn.functional.linear(x, layer.dense_weight(x.dtype), layer.bias)
            peaks = x.abs().amax(dim=-1) / x.square().mean(dim=-1).sqrt()
            found[name] = {"name": name, "db": sqnr_db(exact, output), "peak": peaks.median().item()}

        return compare

    layers = {name: layer for name, layer in packed_layers(unet).items() if isinstance(layer, PackedLinear)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    with_text(unet)(*batch)
    for handle in handles:
        handle.remove()
    ordered = sorted(found.values(), key=lambda row: row["db"])
    return {
        "in_int8": len(found),
        "not_in_int8": len(layers) - len(found),
        "median_db": ordered[len(ordered) // 2]["db"],
        "worst": ordered[:WORST],
    }


def demo(steps: int | None = None, levels: tuple[int, ...] = LEVELS, rounds: int = ROUNDS) -> dict:
    """Errors and step times on the demo model; `levels` hold TIMED_LEVELS."""
    model = demo_model(steps)
    weights = model.weights()
    batch = held_out_batch()
    few = tuple(part[:STEP_BATCH] for part in batch)
    original = Judged(model, model.unet, batch)
    rows, unets = [], {FP: model.unet}
    for count in levels:
        state = quantize_state_dict(weights, count)
        unet = model.with_weights(state)
        weight_only = Judged(model, unet, batch)
        switched = model.with_weights(state)
        int8_layers(switched)
        int8 = Judged(model, switched, batch)
        row = {
            "levels": count,
            PACKED: weight_only.against(original),
            INT8: int8.against(original) | {"against_packed": int8.against(weight_only)},
        }
        if count == TIMED_LEVELS:
            unets |= {PACKED: unet, INT8: switched}
            row["layers"] = layer_errors(switched, batch)
            row["packed_bytes"] = sum(tensor.nbytes for tensor in state.values() if isinstance(tensor, NFTensor))
        rows.append(row)
        print(row, flush=True)
    unets[DYNAMIC] = dynamic_int8(model.unet)
    pipelines = {name: with_text(unet) for name, unet in unets.items()}
    with torch.no_grad():
        calls = {name: lambda pipeline=pipeline: pipeline(*few) for name, pipeline in pipelines.items()}
        step_ms = milliseconds(calls, torch.device("cpu"), rounds)
    dynamic = Judged(model, unets[DYNAMIC], batch).against(original)
    return {"steps": model.steps, "levels": rows, DYNAMIC: dynamic, "step_ms": step_ms}


def table(results: dict) -> str:
    """The README's tables: errors on the demo model; times of its step and of SDXL's layers."""
    errors = []
    for row in results["demo"]["levels"]:
        packed, int8 = row[PACKED], row[INT8]
        pairs = [packed, int8, int8["against_packed"]]
        cells = [f"{pair[figure]:.1f}" for figure in ("output_db", "picture_db") for pair in pairs]
        errors.append([f"{row['levels']} levels", *cells])
    dynamic = results["demo"][DYNAMIC]
    errors.append([DYNAMIC, "–", f"{dynamic['output_db']:.1f}", "–", "–", f"{dynamic['picture_db']:.1f}", "–"])
    columns = ("weights only", "int8 activations", "between them")
    header = ["", *(f"{what}: {column}, dB" for what in ("output", "pictures") for column in columns)]
    times = [_times("demo model, a step", results["demo"]["step_ms"])]
    times += [_times(f"{tokens} tokens, {c} → {r}", ms) for (tokens, c, r), ms in results["layers"]]
    names = (FP, PACKED, INT8, DYNAMIC, MAKING_ROWS)
    return f"{markdown_table(header, errors)}\n\n{markdown_table(['ms', *names], times)}"


def _times(label: str, found: dict[str, dict]) -> list[str]:
    base = found[FP]["median"]
    cells = [label]
    for name in (FP, PACKED, INT8, DYNAMIC, MAKING_ROWS):
        ms = found.get(name)
        spread = f"{ms['median']:.2f} ({ms['min']:.2f} – {ms['max']:.2f})" if ms else "–"
        cells.append(spread if name == FP or not ms else f"{spread} = {ms['median'] / base:.2f} ×")
    return cells


def results_path(device: torch.device) -> Path:
    """Where results go: those of another device do not replace the CPU's."""
    return RESULTS / ("int8.json" if device.type == "cpu" else f"int8-{device.type}.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="of the layers' times")
    parser.add_argument("--out", type=Path, help="where the results go; by default among the benchmarks' results")
    given = parser.parse_args()
    print(machine())
    layers = []
    for shape in SHAPES:
        layers.append((shape, layer_times(shape, torch.device(given.device))))
        print(layers[-1], flush=True)
    results = {"device": given.device, "threads": torch.get_num_threads(), "demo": demo(), "layers": layers}
    print(write_results("int8", results, given.out or results_path(torch.device(given.device))))
