"""The whole experiment of the article that this project starts from: `python -m benchmarks.article`.

Its eight prompts, its seed, its levels: 32, 24, 16, 12 and 7 for Linear layers, 32 for convolutions. Every level goes
through quantising, saving, loading and drawing, each of them timed. Beside them stand int8 activations under CFG and
DPM++, about which the article asks in the end, and torch's dynamic int8 quantisation, at which it looks too. By default
the bundled demo model draws, and captions that it can read stand in for the prompts; `--model DIR` takes SDXL in a
folder of diffusers' layout. The picture has a row for each model and a column for each prompt.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from nfq_core import NFQError, NFTensor, load, quantize_state_dict, save
from nfq_core.checkpoints.examine import file_info, sqnr_db
from nfq_core.checkpoints.state_dict import StateDict
from nfq_core.files.article import article_dequantize, article_disk_bytes, article_quantize
from nfq_core.packed.formats import LEVELS
from nfq_core.report.metrics import psnr_db
from nfq_core.report.sheet import check_pillow, comparison_sheet

from ..shared import RESULTS, ROOT, call_seconds, machine, markdown_table, summary, timed, write_results
from ..speed.int8_layers import int8_layers
from .models import PROMPTS, SEED, Model, demo_model, folder_model

CONV_LEVELS = 32
ACTIVATION_LEVELS = 16
"""Levels of the weights where activations are int8."""

INT8_ACTIVATIONS = f"{ACTIVATION_LEVELS} levels, int8 activations"
DYNAMIC_INT8 = "torch's dynamic int8"

STAGES = {
    "quantise": "quantise",
    "save": "save",
    "load": "load",
    "restore": "dequantise all, not needed",
    "place": "put into the UNet",
    "draw": "draw",
}

SMALL_SIDE, LARGE_SIDE = 128, 256
"""Sides of the grid's pictures, by which model draws them."""

RECORDED = {
    "all_stages": "about an hour",
    "of": "loading the model, quantising, saving, loading what was saved, restoring fp16, replacing the UNet's weights "
    "and drawing, SDXL, with the article's own code; no stage by itself",
    "size_of_fp16": {"32": "1/3", "12": "1/4", "7": "about 1/5"},
    "source": "the article's introduction: times read off its files' dates, sizes of the Linear layers' formats",
}
"""What the article says of its own times and sizes."""

ARTICLE_MAX_WEIGHTS = 100_000_000
"""Larger models are not written in the article's format: bz2 takes minutes for each level."""


def run(model: Model, folder: Path, picture: Path, levels: tuple[int, ...] = LEVELS) -> dict:
    """Do the experiment.

    Args:
        model: what is drawn with.
        folder: gets the quantised files.
        picture: where the grid is written, a PNG.
        levels: of Linear layers; ACTIVATION_LEVELS should be among them.

    Returns:
        What is measured, as written to the results.
    """
    started = perf_counter()
    check_pillow()
    weights = model.weights()
    original_bytes = sum(tensor.nbytes for tensor in weights.values())
    drawing = partial(_drawn, model)
    fp16, reference = drawing(model.unet)
    rows = [(f"fp16|{original_bytes / 1e6:,.1f} MB", reference)]
    found, side, side_rows = [], {}, []
    for count in levels:
        row, packed = _quantised(weights, count, folder / f"article-nf{count}.nfq.safetensors")
        placing = perf_counter()
        unet = model.with_weights(packed)
        row["seconds"]["place"] = perf_counter() - placing
        drawn, pictures = drawing(unet, reference)
        row["seconds"]["draw"] = drawn.pop("draw_seconds")
        row |= {"article": _as_article(weights, count), **drawn}
        found.append(row)
        rows.append((_label(f"{count} levels", row), pictures))
        if count == ACTIVATION_LEVELS:
            int8_layers(unet)
            drawn, pictures = drawing(unet, reference)
            side["int8_activations"] = {key: row[key] for key in ("levels", "file_bytes", "sqnr_db")} | drawn
            side_rows.append((_label(INT8_ACTIVATIONS, side["int8_activations"]), pictures))
        print(f"{count} levels done, {perf_counter() - started:.0f} s", flush=True)
    if model.device.type == "cpu":
        side["torch_dynamic_int8"], pictures = _dynamic(model, weights, drawing, reference)
        side_rows.append((_label(DYNAMIC_INT8, side["torch_dynamic_int8"]), pictures))
    else:
        side["torch_dynamic_int8"] = {"skipped": "torch's dynamic int8 quantisation computes on CPUs only"}
    write_grid(picture, model, rows + side_rows)
    return {
        "model": model.name,
        "note": model.note,
        "captions": [{"prompt": p, "drawn": c} for p, c in zip(PROMPTS, model.captions, strict=True)],
        "seed": SEED,
        "steps": model.steps,
        "guidance": model.guidance,
        "sampler": "DPM++ 2M",
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "article": RECORDED,
        "weights": sum(tensor.numel() for tensor in weights.values()),
        "original_bytes": original_bytes,
        "fp16": fp16,
        "levels": found,
        **side,
        "total_seconds": round(perf_counter() - started, 1),
    }


def _quantised(weights: dict[str, torch.Tensor], levels: int, path: Path) -> tuple[dict, StateDict]:
    """Quantise, save and load; what the file is and the seconds of each stage, and what was loaded."""
    made: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], object]) -> float:
        return timed(lambda: made.update({name: work()}))

    settings = {"levels": levels, "conv_levels": CONV_LEVELS}
    seconds = {
        "quantise": stage("packed", lambda: quantize_state_dict(weights, **settings)),
        "save": stage("bytes", lambda: save(made["packed"], path, settings=settings, overwrite=True)),
        "load": stage("loaded", lambda: load(path)),
    }
    loaded = made["loaded"]
    packed = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, NFTensor)}
    seconds["restore"] = timed(lambda: [tensor.dequantize() for tensor in packed.values()])
    info = file_info(path)
    row = {
        "levels": levels,
        "conv_levels": CONV_LEVELS,
        "file_bytes": info["file_bytes"],
        "bits_per_weight": info["bits_per_weight"],
        "packed_bits_per_weight": info["packed_bits_per_weight"],
        "quantized_weights": info["weights"],
        "sqnr_db": _mean_db({name: (weights[name], tensor.dequantize()) for name, tensor in packed.items()}),
        "seconds": seconds,
    }
    return row, loaded


def _mean_db(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean signal-to-quantisation-noise ratio of the weights, each layer counted by its weights."""
    counts = [original.numel() for original, _ in pairs.values()]
    return float(np.average([sqnr_db(*pair) for pair in pairs.values()], weights=counts))


def _as_article(weights: dict[str, torch.Tensor], levels: int) -> dict | None:
    """Bytes and error of the UNet's tensors in the article's own format and by its own rule; None for large models."""
    if sum(tensor.numel() for tensor in weights.values()) > ARTICLE_MAX_WEIGHTS:
        return None
    total, pairs = 0, {}
    for name, tensor in weights.items():
        if tensor.dim() == 4 or (tensor.dim() == 2 and "emb" not in name):
            quantised = article_quantize(tensor, levels if tensor.dim() == 2 else CONV_LEVELS)
            pairs[name] = tensor, article_dequantize(quantised)
            total += article_disk_bytes(quantised)
        else:
            total += tensor.nbytes
    return {"bytes": total, "sqnr_db": _mean_db(pairs)}


def _drawn(model: Model, unet: nn.Module, reference: np.ndarray | None = None) -> tuple[dict, np.ndarray]:
    """Draw everything: seconds of the whole and of the UNet's calls, PSNR to `reference`; and the pictures."""
    pictures: list[np.ndarray] = []
    with torch.no_grad(), call_seconds(unet) as calls:
        seconds = timed(lambda: pictures.append(model.draw(unet)))
    drawn = {"draw_seconds": seconds, "step_seconds": summary(calls)}
    if reference is not None:
        drawn["psnr_db"] = psnr_db(torch.from_numpy(reference), torch.from_numpy(pictures[0]), 255)
    return drawn, pictures[0]


def dynamic_int8(unet: nn.Module) -> nn.Module:
    """A copy of an fp32 UNet on the CPU, its Linear layers quantised by torch to dynamic int8, as in the article."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        # It is deprecated in favour of another package, and is what the article used.
        warnings.simplefilter("ignore")
        return quantize_dynamic(copy.deepcopy(unet), {nn.Linear}, dtype=torch.qint8)


def _dynamic(
    model: Model, weights: dict[str, torch.Tensor], drawing: Callable, reference: np.ndarray
) -> tuple[dict, np.ndarray]:
    unet = dynamic_int8(model.unet)
    layers = {
        f"{name}.weight": layer.weight().dequantize()
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear)
    }
    drawn, pictures = drawing(unet, reference)
    saved = sum(weights[name].nbytes - weights[name].numel() for name in layers)
    return {
        # A byte for each weight of a Linear layer; all else as in the source, whatever torch holds it in.
        "file_bytes": sum(tensor.nbytes for tensor in weights.values()) - saved,
        "sqnr_db": _mean_db({name: (weights[name], weight) for name, weight in layers.items()}),
        **drawn,
    }, pictures


def _label(name: str, row: dict) -> str:
    quality = "same pictures" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    return f"{name}|{row['file_bytes'] / 1e6:,.1f} MB, {quality}"


def write_grid(path: Path, model: Model, rows: list[tuple[str, np.ndarray]]) -> None:
    """Write the grid: a row for each model, a column for each caption."""
    grid = np.stack([pictures for _, pictures in rows], axis=1)
    columns = list(zip(model.captions, grid, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    side = LARGE_SIDE if max(grid.shape[2:4]) > LARGE_SIDE else SMALL_SIDE
    sheet = comparison_sheet([label for label, _ in rows], columns, side=side, note=model.note)
    sheet.save(path, "PNG", optimize=True)


def table(results: dict) -> str:
    """The README's tables: sizes and errors, then times."""
    return f"{_sizes_table(results)}\n\n{_times_table(results)}\n\n{_remarks(results)}"


def _sizes_table(results: dict) -> str:
    original = results["original_bytes"]
    base = results["fp16"]["step_seconds"]["median"]

    def cells(name: str, row: dict, recorded: str = "–") -> list[str]:
        article = row.get("article")
        step = row["step_seconds"]
        quality = [f"{row[key]:.1f}" if row.get(key) is not None else "–" for key in ("sqnr_db", "psnr_db")]
        spread = f"{step['median']:.3f} s ({step['min']:.3f} – {step['max']:.3f})"
        return [
            name,
            f"{row['file_bytes'] / 1e6:,.2f} MB = {row['file_bytes'] / original:.2f}",
            f"{article['bytes'] / 1e6:.2f} MB, {article['sqnr_db']:.1f} dB" if article else "–",
            recorded,
            *quality,
            f"{spread} = {step['median'] / base:.2f} ×",
        ]

    recorded = results["article"]["size_of_fp16"]
    rows = [cells("fp16", {"file_bytes": original, **results["fp16"]})]
    rows += [cells(f"{r['levels']} levels", r, recorded.get(str(r["levels"]), "–")) for r in results["levels"]]
    for name, label in (("int8_activations", INT8_ACTIVATIONS), ("torch_dynamic_int8", DYNAMIC_INT8)):
        if "file_bytes" in results.get(name, {}):
            rows.append(cells(label, results[name]))
    header = [f"UNet of {results['model']}", "size, of fp16's", "as the article stores it", "the article says of SDXL"]
    return markdown_table([*header, "weights, dB", "pictures, dB", "a step"], rows)


def _times_table(results: dict) -> str:
    levels = results["levels"]
    rows = [[label, *(f"{row['seconds'][name]:.2f}" for row in levels), "–"] for name, label in STAGES.items()]
    total = [f"{sum(row['seconds'].values()):.2f}" for row in levels]
    rows.append(["together", *total, f"{results['article']['all_stages']}, SDXL"])
    by_hand = json.loads((RESULTS / "article_by_hand.json").read_text(encoding="utf-8"))["seconds_per_million_weights"]
    for stage, label in (("quantise", "quantise, save"), ("load", "load, dequantise all")):
        scaled = [
            f"{median(by_hand[str(row['levels'])][stage]) * row['quantized_weights'] / 1e6:.2f}"
            if str(row["levels"]) in by_hand
            else "–"
            for row in levels
        ]
        rows.append([f"the article's code¹: {label}", *scaled, "–"])
    return markdown_table(["seconds", *(f"{row['levels']} levels" for row in levels), "the article says"], rows)


def _remarks(results: dict) -> str:
    found = results["machine"]
    said = f"{len(results['captions'])} pictures, {results['steps']} steps of {results['sampler']}, guidance "
    said += f"{results['guidance']:g}, seed {results['seed']} for each. {results['note']} ¹ Scaled by the number of "
    said += "weights from what it took for a Gaussian sample, `benchmarks/results/article_by_hand.json`. "
    said += f"{found['processors']} processors ({found['processor']}), threads: {results['threads']}, "
    return f"{said}torch {found['torch']}, {found['date']}."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 1 and one line on stderr where something given is unfit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a diffusers folder of SDXL; by default the bundled demo model")
    parser.add_argument("--out", type=Path, help="folder for the picture, the results and the quantised files")
    parser.add_argument("--device", help="where to draw with --model; by default cuda where it is there")
    parser.add_argument("--steps", type=int, help="of the sampler")
    given = parser.parse_args(arguments)
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if (given.model or given.steps) and not given.out:
        parser.error("--model and --steps need --out: the repository holds the demo model's results at all its steps")
    print(machine())
    try:
        if given.model:
            model = folder_model(given.model, device=given.device, steps=given.steps)
        else:
            model = demo_model(given.steps)
        with tempfile.TemporaryDirectory() as temporary:
            folder = given.out or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            picture = folder / "article-grid.png" if given.out else ROOT / "docs" / "images" / "article-grid.png"
            results = run(model, folder, picture)
    except (NFQError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    path = given.out / "article.json" if given.out else None
    print(write_results("article", results, path), picture, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
