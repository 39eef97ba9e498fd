"""Weight-only layers, int8 activations and torch's dynamic int8 quantisation: `python -m benchmarks.speed.int8`.

On the demo model: the error of the UNet's output and of pictures, against the fp16 weights and against the same packed
weights with floating-point activations; the layers whose products lose most; the time of a step. In SDXL's shapes (1024
pixels, CFG): the time of a Linear layer. A CPU computes in fp32; `--device cuda` times the layers on a GPU in fp16.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from nfq_core import quantize, quantize_state_dict
from nfq_core.decibels import sqnr_db
from nfq_core.demo.calibrate import HELD_OUT_SEED
from nfq_core.demo.model import TinyPipeline, build_pipeline, load_weights
from nfq_core.layers import PackedLinear, pack_layers, packed_layers
from nfq_core.packed.op import dequantize_for_one_use
from nfq_core.report.metrics import psnr_db

from ..article import Model, demo_model
from ..quality.worlds import OUTPUT_BATCH, SHAPES
from ..shared import argument_parser, machine, markdown_table, milliseconds, spread, write_results
from .int8_layers import dynamic_int8, fits, int8_layers, round_rows

LEVELS, TIMED_LEVELS = (32, 16, 7), 16  # Levels of Linear weights; convolutions have 32
ROUNDS = 9
STEP_BATCH = 16  # Pictures in a step: eight, with the caption and without
# Tokens, columns and rows of SDXL's Linear layers.
LINEAR_SHAPES = (
    (8192, 640, 640),
    (8192, 640, 5120),
    (8192, 2560, 640),
    (2048, 1280, 1280),
    (2048, 1280, 10240),
    (2048, 5120, 1280),
    (154, 2048, 1280),
)
FP, PACKED, INT8, DYNAMIC = "floating point", "packed", "packed, int8 activations", "torch's dynamic int8"
# The part of INT8 that decodes the weight and rounds its rows; a layer that kept the rows would not need it.
MAKING_ROWS = "int8 rows"

Batch = tuple[torch.Tensor, ...]


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
    calls = {name: partial(layer, x) for name, layer in layers.items()}
    layer = layers[INT8][0]
    decoded = partial(dequantize_for_one_use, layer.buffer, layer.format_id, layer.weight_shape, torch.float32)
    calls[MAKING_ROWS] = lambda: round_rows(decoded(), overwrite=True)
    return milliseconds(calls, device, rounds)


def with_text(unet: nn.Module) -> TinyPipeline:
    """The demo model's pipeline with this UNet."""
    return TinyPipeline(unet, build_pipeline(load_weights()).text)


@torch.no_grad()
def judged(model: Model, unet: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A UNet's output for the noisy pictures, and its pictures for the captions."""
    return with_text(unet)(*batch), torch.from_numpy(model.draw(unet))


def against(reference: tuple[torch.Tensor, torch.Tensor], found: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """`output_db` and `picture_db` of what `judged` returns."""
    return {"output_db": sqnr_db(reference[0], found[0]), "picture_db": psnr_db(reference[1], found[1], 255)}


@torch.no_grad()
def layer_errors(unet: nn.Module, batch: Batch) -> dict:
    """What int8 loses in each Linear layer's product.

    Returns:
        `in_int8` and `not_in_int8` (counts), `median_db` and `worst`, three layers: `name`, `db` (SQNR of the product)
        and `peak` (largest magnitude of a token over its root mean square, median of the tokens).
    """
    found: list[dict] = []

    def compare(name: str, layer: PackedLinear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        x = inputs[0]
        if fits(x, layer.out_features):
            exact = nn.functional.linear(x, layer.dense_weight(x.dtype), layer.bias)
            peaks = x.abs().amax(dim=-1) / x.square().mean(dim=-1).sqrt()
            found.append({"name": name, "db": sqnr_db(exact, output), "peak": peaks.median().item()})

    layers = {name: layer for name, layer in packed_layers(unet).items() if isinstance(layer, PackedLinear)}
    handles = [layer.register_forward_hook(partial(compare, name)) for name, layer in layers.items()]
    with_text(unet)(*batch)
    for handle in handles:
        handle.remove()
    found.sort(key=lambda row: row["db"])
    counts = {"in_int8": len(found), "not_in_int8": len(layers) - len(found)}
    return {**counts, "median_db": found[len(found) // 2]["db"], "worst": found[:3]}


def demo(steps: int | None = None, levels: tuple[int, ...] = LEVELS, rounds: int = ROUNDS) -> dict:
    """Errors and step times on the demo model; `levels` include TIMED_LEVELS."""
    model, batch = demo_model(steps), SHAPES.noisy_batch(OUTPUT_BATCH, HELD_OUT_SEED)
    weights, original = model.weights(), judged(model, model.unet, batch)
    rows, unets = [], {FP: model.unet, DYNAMIC: dynamic_int8(model.unet)}
    for count in levels:
        state = quantize_state_dict(weights, count)
        unet, switched = model.with_weights(state), model.with_weights(state)
        int8_layers(switched)
        packed, int8 = judged(model, unet, batch), judged(model, switched, batch)
        int8_row = against(original, int8) | {"against_packed": against(packed, int8)}
        rows.append({"levels": count, PACKED: against(original, packed), INT8: int8_row})
        if count == TIMED_LEVELS:
            unets |= {PACKED: unet, INT8: switched}
            rows[-1]["layers"] = layer_errors(switched, batch)
    few = [part[:STEP_BATCH] for part in batch]
    with torch.no_grad():
        calls = {name: partial(with_text(unet), *few) for name, unet in unets.items()}
        step_ms = milliseconds(calls, torch.device("cpu"), rounds)
    dynamic = against(original, judged(model, unets[DYNAMIC], batch))
    return {"steps": model.steps, "levels": rows, DYNAMIC: dynamic, "step_ms": step_ms}


def table(results: dict) -> str:
    """Errors on the demo model; times of its step and of SDXL's layers."""
    errors = []
    for row in results["demo"]["levels"]:
        pairs = [row[PACKED], row[INT8], row[INT8]["against_packed"]]
        cells = [f"{pair[figure]:.1f}" for figure in ("output_db", "picture_db") for pair in pairs]
        errors.append([f"{row['levels']} levels", *cells])
    dynamic = results["demo"][DYNAMIC]
    errors.append([DYNAMIC, "–", f"{dynamic['output_db']:.1f}", "–", "–", f"{dynamic['picture_db']:.1f}", "–"])
    columns = ("weights only", "int8 activations", "between them")
    header = ["", *(f"{what}: {column}, dB" for what in ("output", "pictures") for column in columns)]
    times = [("demo model, a step", results["demo"]["step_ms"])]
    times += [(f"{tokens} tokens, {c} → {r}", ms) for (tokens, c, r), ms in results["layers"]]
    names, rows = (FP, PACKED, INT8, DYNAMIC, MAKING_ROWS), []
    for label, found in times:
        ratios = {name: f" = {ms['median'] / found[FP]['median']:.2f} ×" for name, ms in found.items() if name != FP}
        rows.append([label, *(spread(found[name]) + ratios.get(name, "") if name in found else "–" for name in names)])
    return f"{markdown_table(header, errors)}\n\n{markdown_table(['ms', *names], rows)}"


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="device of the layers' times; results go to int8-DEVICE.json")
    device = torch.device(parser.parse_args().device)
    print(machine())
    layers = [(shape, layer_times(shape, device)) for shape in LINEAR_SHAPES]
    results = {"device": str(device), "threads": torch.get_num_threads(), "demo": demo(), "layers": layers}
    print(write_results("int8" if device.type == "cpu" else f"int8-{device.type}", results))
