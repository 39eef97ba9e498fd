"""The whole experiment of the article that this project starts from: `python -m benchmarks.article`.

The article's prompts, seed and levels: 32, 24, 16, 12 and 7 for Linear layers, 32 for convolutions. Each level is
quantised, saved, loaded and drawn, and each stage is timed. Also drawn: int8 activations, which the article asks about,
and torch's dynamic int8 quantisation, which it tries. The default model is the bundled demo model, with captions that
it can read. `--model DIR` takes SDXL in a folder of diffusers' layout. The picture has a row for each model and a
column for each prompt.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from nfq_core import NFQError, NFTensor, load, quantize_state_dict, save
from nfq_core.checkpoints.examine import file_info, sqnr_db
from nfq_core.files.article import article_dequantize, article_disk_bytes, article_quantize
from nfq_core.packed.formats import LEVELS
from nfq_core.report.metrics import psnr_db
from nfq_core.report.sheet import check_pillow, comparison_sheet

from ..shared import ROOT, argument_parser, call_seconds, machine, summary, timed, write_results
from ..speed.int8_layers import dynamic_int8, int8_layers
from .models import PROMPTS, SEED, Model, demo_model, folder_model
from .tables import ACTIVATION_LEVELS, DYNAMIC_INT8, INT8_ACTIVATIONS, RECORDED

CONV_LEVELS = 32
SMALL_SIDE, LARGE_SIDE = 128, 256  # Sides of the grid's pictures, for the demo model and for SDXL
# Larger models are not stored in the article's format: bz2 takes minutes for each level.
ARTICLE_MAX_WEIGHTS = 100_000_000

Tensors = dict[str, torch.Tensor]


def run(model: Model, folder: Path, picture: Path, levels: tuple[int, ...] = LEVELS) -> dict:
    """Do the experiment.

    Args:
        model: draws the pictures.
        folder: gets the quantised files.
        picture: the grid's path, a PNG.
        levels: of Linear layers; ACTIVATION_LEVELS should be among them.

    Returns:
        The measurements, as written to the results.
    """
    started = perf_counter()
    check_pillow()
    weights = model.weights()
    original_bytes = sum(tensor.nbytes for tensor in weights.values())
    fp16, reference = _drawn(model, model.unet)
    rows, extra_rows = [(f"fp16|{original_bytes / 1e6:,.1f} MB", reference)], []
    found, extra = [], {}
    for count in levels:
        row, packed = _quantised(weights, count, folder / f"article-nf{count}.nfq.safetensors")
        placing = perf_counter()
        unet = model.with_weights(packed)
        row["seconds"]["place"] = perf_counter() - placing
        drawn, pictures = _drawn(model, unet, reference)
        row["seconds"]["draw"] = drawn.pop("draw_seconds")
        row |= {"article": _as_article(weights, count), **drawn}
        found.append(row)
        rows.append((_label(f"{count} levels", row), pictures))
        if count == ACTIVATION_LEVELS:
            int8_layers(unet)
            drawn, pictures = _drawn(model, unet, reference)
            extra["int8_activations"] = {key: row[key] for key in ("levels", "file_bytes", "sqnr_db")} | drawn
            extra_rows.append((_label(INT8_ACTIVATIONS, extra["int8_activations"]), pictures))
        print(f"{count} levels done, {perf_counter() - started:.0f} s", flush=True)
    if model.device.type == "cpu":
        extra["torch_dynamic_int8"], pictures = _dynamic(model, weights, reference)
        extra_rows.append((_label(DYNAMIC_INT8, extra["torch_dynamic_int8"]), pictures))
    else:
        extra["torch_dynamic_int8"] = {"skipped": "torch's dynamic int8 quantisation computes on CPUs only"}
    write_grid(picture, model, rows + extra_rows)
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
        **extra,
        "total_seconds": round(perf_counter() - started, 1),
    }


def _quantised(weights: Tensors, levels: int, path: Path) -> tuple[dict, dict[str, NFTensor | torch.Tensor]]:
    """Quantise, save and load; the file's facts with the seconds of each stage, and the loaded tensors."""
    made: dict[str, Any] = {}
    settings = {"levels": levels, "conv_levels": CONV_LEVELS}
    works: dict[str, Callable[[], object]] = {
        "quantise": lambda: quantize_state_dict(weights, **settings),
        "save": lambda: save(made["quantise"], path, settings=settings, overwrite=True),
        "load": lambda: load(path),
    }
    seconds = {name: timed(lambda name=name, work=work: made.update({name: work()})) for name, work in works.items()}
    packed = {name: tensor for name, tensor in made["load"].items() if isinstance(tensor, NFTensor)}
    seconds["restore"] = timed(lambda: [tensor.dequantize() for tensor in packed.values()])
    info = file_info(path)
    facts = {key: info[key] for key in ("file_bytes", "bits_per_weight", "packed_bits_per_weight")}
    error = _mean_db({name: (weights[name], tensor.dequantize()) for name, tensor in packed.items()})
    row = {**settings, **facts, "quantized_weights": info["weights"], "sqnr_db": error, "seconds": seconds}
    return row, made["load"]


def _mean_db(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The layers' SQNR in dB, averaged over weights."""
    counts = [original.numel() for original, _ in pairs.values()]
    return float(np.average([sqnr_db(*pair) for pair in pairs.values()], weights=counts))


def _as_article(weights: Tensors, levels: int) -> dict | None:
    """Bytes and error of the UNet in the article's own format, by the article's choice of layers; None if too large."""
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


def _dynamic(model: Model, weights: Tensors, reference: np.ndarray) -> tuple[dict, np.ndarray]:
    """Size, error and pictures with torch's dynamic int8; a Linear weight counts a byte, all else as in the source."""
    unet = dynamic_int8(model.unet)
    layers = {
        f"{name}.weight": layer.weight().dequantize()
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear)
    }
    drawn, pictures = _drawn(model, unet, reference)
    total = sum(tensor.numel() if name in layers else tensor.nbytes for name, tensor in weights.items())
    error = _mean_db({name: (weights[name], weight) for name, weight in layers.items()})
    return {"file_bytes": total, "sqnr_db": error, **drawn}, pictures


def _label(name: str, row: dict) -> str:
    quality = "same pictures" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    return f"{name}|{row['file_bytes'] / 1e6:,.1f} MB, {quality}"


def write_grid(path: Path, model: Model, rows: list[tuple[str, np.ndarray]]) -> None:
    """Write the grid: a row for each model, a column for each caption."""
    grid = np.stack([pictures for _, pictures in rows], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    side = LARGE_SIDE if max(grid.shape[2:4]) > LARGE_SIDE else SMALL_SIDE
    columns = list(zip(model.captions, grid, strict=True))
    sheet = comparison_sheet([label for label, _ in rows], columns, side=side, note=model.note)
    sheet.save(path, "PNG", optimize=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 1 and one line on stderr if the model cannot be used."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="a diffusers folder of SDXL (default: the bundled demo model)")
    parser.add_argument("--steps", type=int, help="steps of the sampler")
    parser.add_argument("--out", type=Path, help="folder for the picture, the results and the quantised files")
    given = parser.parse_args(arguments)
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if (given.model or given.steps) and not given.out:
        parser.error("--model and --steps need --out: the repository holds the demo model's results at all its steps")
    print(machine())
    try:
        model = folder_model(given.model, steps=given.steps) if given.model else demo_model(given.steps)
        with tempfile.TemporaryDirectory() as temporary:
            folder = given.out or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            picture = (given.out or ROOT / "docs" / "images") / "article-grid.png"
            results = run(model, folder, picture)
    except (NFQError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    path = given.out / "article.json" if given.out else None
    print(write_results("article", results, path), picture, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
