"""The whole experiment of the article that this project starts from: `python -m benchmarks.article`.

The article's prompts, seed and levels: 32, 24, 16, 12 and 7 for Linear layers, 32 for convolutions. Each level is
quantised, saved, loaded and drawn, and each stage is timed. Also drawn: int8 activations, and torch's dynamic int8
quantisation. The default model is the bundled demo model, with captions that it can read. `--model DIR` takes SDXL in a
folder of diffusers' layout. The picture has a row for each model and a column for each prompt.
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
    found, extra, grid = [], {}, {f"fp16|{original_bytes / 1e6:,.1f} MB": reference}

    def draw(name: str, unet: nn.Module, row: dict) -> dict:
        drawn, pictures = _drawn(model, unet)
        psnr = psnr_db(torch.from_numpy(reference), torch.from_numpy(pictures), 255)
        quality = "same pictures" if psnr is None else f"{psnr:.1f} dB"
        grid[f"{name}|{row['file_bytes'] / 1e6:,.1f} MB, {quality}"] = pictures
        print(f"{name} done, {perf_counter() - started:.0f} s", flush=True)
        return row | drawn | {"psnr_db": psnr}

    for count in levels:
        row, unet = _quantised(model, weights, count, folder / f"article-nf{count}.nfq.safetensors")
        row = draw(f"{count} levels", unet, row | {"article": _as_article(weights, count)})
        row["seconds"]["draw"] = row.pop("draw_seconds")
        found.append(row)
    for row in (row for row in found if row["levels"] == ACTIVATION_LEVELS):
        unet = model.with_weights(load(folder / f"article-nf{ACTIVATION_LEVELS}.nfq.safetensors"))
        int8_layers(unet)
        kept = {key: row[key] for key in ("levels", "file_bytes", "sqnr_db")}
        extra["int8_activations"] = draw(INT8_ACTIVATIONS, unet, kept)
    if model.device.type == "cpu":
        unet = dynamic_int8(model.unet)
        extra["torch_dynamic_int8"] = draw(DYNAMIC_INT8, unet, _dynamic_size(unet, weights))
    else:
        extra["torch_dynamic_int8"] = {"skipped": "torch's dynamic int8 quantisation computes on CPUs only"}
    columns = list(zip(model.captions, np.stack(list(grid.values()), axis=1), strict=True))
    picture.parent.mkdir(parents=True, exist_ok=True)
    side = 256 if max(reference.shape[1:3]) > 256 else 128
    comparison_sheet(list(grid), columns, side=side, note=model.note).save(picture, "PNG", optimize=True)
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


def _quantised(model: Model, weights: Tensors, levels: int, path: Path) -> tuple[dict, nn.Module]:
    """Quantise, save and load; the file's facts, the seconds of each stage, and the UNet with the tensors."""
    settings, seconds = {"levels": levels, "conv_levels": CONV_LEVELS}, {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        made = []
        seconds[name] = timed(lambda: made.append(work()))
        return made[0]

    made = stage("quantise", lambda: quantize_state_dict(weights, **settings))
    stage("save", lambda: save(made, path, settings=settings, overwrite=True))
    loaded = stage("load", lambda: load(path))
    packed = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, NFTensor)}
    restored = stage("restore", lambda: {name: tensor.dequantize() for name, tensor in packed.items()})
    error = _mean_db(weights, restored)
    restored.clear()
    unet = stage("place", lambda: model.with_weights(loaded))
    info = file_info(path)
    facts = {key: info[key] for key in ("file_bytes", "bits_per_weight", "packed_bits_per_weight")}
    facts |= {"quantized_weights": info["weights"], "sqnr_db": error}
    return {**settings, **facts, "seconds": seconds}, unet


def _mean_db(weights: Tensors, restored: Tensors) -> float:
    """The layers' SQNR in dB, averaged over weights."""
    found = [sqnr_db(weights[name], weight) for name, weight in restored.items()]
    return float(np.average(found, weights=[weight.numel() for weight in restored.values()]))


def _as_article(weights: Tensors, levels: int) -> dict | None:
    """Bytes and error of the UNet in the article's own format, by the article's choice of layers; None if too large."""
    if sum(tensor.numel() for tensor in weights.values()) > ARTICLE_MAX_WEIGHTS:
        return None
    total, restored = 0, {}
    for name, tensor in weights.items():
        if tensor.dim() == 4 or (tensor.dim() == 2 and "emb" not in name):
            quantised = article_quantize(tensor, levels if tensor.dim() == 2 else CONV_LEVELS)
            restored[name] = article_dequantize(quantised)
            total += article_disk_bytes(quantised)
        else:
            total += tensor.nbytes
    return {"bytes": total, "sqnr_db": _mean_db(weights, restored)}


def _drawn(model: Model, unet: nn.Module) -> tuple[dict, np.ndarray]:
    """Draw everything: seconds of the whole and of the UNet's calls; and the pictures."""
    pictures: list[np.ndarray] = []
    with torch.no_grad(), call_seconds(unet) as calls:
        seconds = timed(lambda: pictures.append(model.draw(unet)))
    return {"draw_seconds": seconds, "step_seconds": summary(calls)}, pictures[0]


def _dynamic_size(unet: nn.Module, weights: Tensors) -> dict:
    """Size and error with torch's dynamic int8; a Linear weight counts a byte, all else as in the source."""
    layers = {
        f"{name}.weight": layer.weight().dequantize()
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear)
    }
    total = sum(tensor.numel() if name in layers else tensor.nbytes for name, tensor in weights.items())
    return {"file_bytes": total, "sqnr_db": _mean_db(weights, layers)}


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
            (given.out or Path(temporary)).mkdir(parents=True, exist_ok=True)
            picture = (given.out or ROOT / "docs" / "images") / "article-grid.png"
            results = run(model, given.out or Path(temporary), picture)
    except (NFQError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(write_results("article", results, given.out and given.out / "article.json"), picture, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
