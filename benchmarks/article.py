"""The whole experiment of the article that this project starts from: `python -m benchmarks.article`.

The article's prompts, seed and levels: 32, 24, 16, 12 and 7 for Linear layers, 32 for convolutions. Each level is
quantised, saved, loaded and drawn, and each stage is timed. Also drawn: int8 activations, and torch's dynamic int8
quantisation. The default model is the bundled demo model, with captions that it can read. `--model DIR` takes SDXL in a
folder of diffusers' layout. The picture has a row for each model and a column for each prompt.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from nfq_core import NFQError, NFTensor, load, quantize_state_dict, save
from nfq_core.checkpoints.examine import file_info
from nfq_core.decibels import pooled_sqnr_db, sqnr_db
from nfq_core.demo.model import GUIDANCE as DEMO_GUIDANCE
from nfq_core.demo.model import STEPS as DEMO_STEPS
from nfq_core.demo.model import TinyPipeline, build_pipeline, import_diffusers, load_weights, sample, split_weights
from nfq_core.demo.shapes import CAPTIONS
from nfq_core.files.article import article_dequantize, article_disk_bytes, article_quantize
from nfq_core.layers import assign_state
from nfq_core.packed.formats import LEVELS
from nfq_core.report.metrics import psnr_db
from nfq_core.report.sheet import check_pillow, comparison_sheet

from . import shared
from .speed.int8_layers import dynamic_int8, int8_layers

# The article's seed, for each of its prompts, and the prompts to the letter.
SEED = 42
PROMPTS = (
    'An ice sculpture is made with the text "Happy Holidays". Christmas decorations in the bacground. Dslr photo.',
    "An origami of a monkey dressed as a monk riding a bike on a mountain.",
    'A storefront with "Text to Image" written on it.',
    "Greek statue of a man tripping over a cat.",
    "A portrait photo of a kangaroo wearing an orange hoodie and blue sunglasses standing on the grass in front of the "
    "Sydney Opera House holding a sign on the chest that says Welcome Friends!",
    "A map of the United States made out of sushi. It is on a table next to a glass of red wine.",
    "an armchair in the shape of an avocado",
    "A teddybear on a skateboard in Times Square.",
)
STEPS, GUIDANCE = 25, 5.0  # For SDXL; the guidance is the default of diffusers' pipeline, as in the article
# Where a folder's UNet may be; the first is the article's.
WEIGHT_FILES = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors")
DEMO_NOTE = "The demo model cannot read the article's prompts: captions that it can read stand in for them."
CONV_LEVELS = 32
# Larger models are not stored in the article's format: bz2 takes minutes for each level.
ARTICLE_MAX_WEIGHTS = 100_000_000
ACTIVATION_LEVELS = 16  # Levels of the weights where activations are int8
INT8_ACTIVATIONS, DYNAMIC_INT8 = f"{ACTIVATION_LEVELS} levels, int8 activations", "torch's dynamic int8"
STAGES = {
    "quantise": "quantise",
    "save": "save",
    "load": "load",
    "restore": "dequantise all, not needed",
    "place": "put into the UNet",
    "draw": "draw",
}
# The article's own figures: all stages together with SDXL, times read off its files' dates; sizes of the Linear layers.
RECORDED = {"all_stages": "about an hour", "size_of_fp16": {"32": "1/3", "12": "1/4", "7": "about 1/5"}}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A pipeline whose UNet can be exchanged."""

    name: str
    captions: tuple[str, ...]  # The texts to draw, one for each of PROMPTS
    note: str  # A remark for the reader; may be empty
    steps: int
    guidance: float
    unet: nn.Module  # The original, in the device's dtype for computing
    weights: Callable[[], dict[str, torch.Tensor]]  # Reads the UNet's state dict
    # Draws all captions with a UNet, each from SEED on the CPU: uint8 of shape (captions, height, width, 3).
    draw: Callable[[nn.Module], np.ndarray]

    @property
    def device(self) -> torch.device:
        """The UNet's device."""
        return next(self.unet.parameters()).device

    def with_weights(self, state: Mapping[str, NFTensor | torch.Tensor]) -> nn.Module:
        """A UNet of the same configuration with a file's tensors; packed weights get packed layers."""
        with torch.device("meta"):
            unet = type(self.unet).from_config(self.unet.config)
        dtype = next(self.unet.parameters()).dtype
        dense = {name: value.to(dtype) for name, value in state.items() if not isinstance(value, NFTensor)}
        assign_state(unet, {**state, **dense})
        return unet.to(self.device).eval().requires_grad_(False)


def demo_model(steps: int | None = None) -> Model:
    """The bundled model, in fp32 on the CPU; all captions in one batch."""
    pipeline, steps = build_pipeline(load_weights()).requires_grad_(False), steps or DEMO_STEPS

    def draw(unet: nn.Module) -> np.ndarray:
        seeds = [SEED] * len(CAPTIONS)
        return sample(TinyPipeline(unet, pipeline.text), CAPTIONS, seed=seeds, steps=steps, guidance=DEMO_GUIDANCE)

    def weights() -> dict[str, torch.Tensor]:
        return split_weights(load_weights())[0]

    name = "the bundled demo model"
    return Model(name, CAPTIONS, DEMO_NOTE, steps, DEMO_GUIDANCE, pipeline.unet, weights, draw)


def folder_model(folder: str | Path, *, steps: int | None = None) -> Model:
    """SDXL, or a relative of it, in a folder of diffusers' layout; one prompt at a time, as in the article.

    It computes in fp16 on CUDA if there is such a device, else in fp32 on the CPU. NFQError if the folder has
    no UNet in one safetensors file, or if diffusers cannot load the pipeline.
    """
    diffusers, folder = import_diffusers(), Path(folder)
    path = next((folder / "unet" / name for name in WEIGHT_FILES if (folder / "unet" / name).is_file()), None)
    if path is None:
        raise NFQError(f"{folder} holds no unet/{' or unet/'.join(WEIGHT_FILES)}; name a folder of diffusers' layout")
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    variant = "fp16" if ".fp16." in path.name else None
    try:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise NFQError(f"diffusers makes no SDXL pipeline of {folder}: {str(error).splitlines()[0]}") from error
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    # Some versions load a part in the dtype of its file.
    pipeline.to(device, dtype).set_progress_bar_config(disable=True)
    steps = steps or STEPS

    def draw(unet: nn.Module) -> np.ndarray:
        pipeline.unet = unet
        settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "np"}
        seeds = (torch.Generator("cpu").manual_seed(SEED) for _ in PROMPTS)
        pictures = [pipeline(p, generator=seed, **settings).images[0] for p, seed in zip(PROMPTS, seeds, strict=True)]
        return (np.stack(pictures) * 255).round().astype(np.uint8)

    return Model(folder.resolve().name, PROMPTS, "", steps, GUIDANCE, pipeline.unet, lambda: load_file(path), draw)


def run(model: Model, folder: Path, picture: Path, levels: tuple[int, ...] = LEVELS) -> dict:
    """Do the experiment: quantised files go to `folder`, the grid to `picture`. Returns the results.

    ACTIVATION_LEVELS should be among the `levels` of Linear layers.
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
    captions = [{"prompt": p, "drawn": c} for p, c in zip(PROMPTS, model.captions, strict=True)]
    facts = {"model": model.name, "note": model.note, "captions": captions, "seed": SEED, "steps": model.steps}
    facts |= {"guidance": model.guidance, "sampler": "DPM++ 2M", "device": str(model.device)}
    facts |= {"threads": torch.get_num_threads(), "article": RECORDED}
    sizes = {"weights": sum(tensor.numel() for tensor in weights.values()), "original_bytes": original_bytes}
    seconds = round(perf_counter() - started, 1)
    return {**facts, **sizes, "fp16": fp16, "levels": found, **extra, "total_seconds": seconds}


def _quantised(model: Model, weights: Tensors, levels: int, path: Path) -> tuple[dict, nn.Module]:
    """Quantise, save and load; the file's facts, the seconds of each stage, and the UNet with the tensors."""
    settings, seconds = {"levels": levels, "conv_levels": CONV_LEVELS}, {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        made = []
        seconds[name] = shared.timed(lambda: made.append(work()))
        return made[0]

    made = stage("quantise", lambda: quantize_state_dict(weights, **settings))
    stage("save", lambda: save(made, path, settings=settings, overwrite=True))
    loaded = stage("load", lambda: load(path))
    packed = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, NFTensor)}
    restored = stage("restore", lambda: {name: tensor.dequantize() for name, tensor in packed.items()})
    error = _error(weights, restored)
    restored.clear()
    unet = stage("place", lambda: model.with_weights(loaded))
    info = file_info(path)
    facts = {key: info[key] for key in ("file_bytes", "bits_per_weight", "packed_bits_per_weight")}
    facts |= {"quantized_weights": info["weights"], "sqnr_db": error}
    return {**settings, **facts, "seconds": seconds}, unet


def _error(weights: Tensors, restored: Tensors) -> float | None:
    """SQNR in dB of all restored layers together."""
    return pooled_sqnr_db((weight.numel(), sqnr_db(weights[name], weight)) for name, weight in restored.items())


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
    return {"bytes": total, "sqnr_db": _error(weights, restored)}


def _drawn(model: Model, unet: nn.Module) -> tuple[dict, np.ndarray]:
    """Draw everything: seconds of the whole and of the UNet's calls; and the pictures."""
    pictures: list[np.ndarray] = []
    with torch.no_grad(), shared.call_seconds(unet) as calls:
        seconds = shared.timed(lambda: pictures.append(model.draw(unet)))
    return {"draw_seconds": seconds, "step_seconds": shared.summary(calls)}, pictures[0]


def _dynamic_size(unet: nn.Module, weights: Tensors) -> dict:
    """Size and error with torch's dynamic int8; a Linear weight counts a byte, all else as in the source."""
    layers = {
        f"{name}.weight": layer.weight().dequantize()
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear)
    }
    total = sum(tensor.numel() if name in layers else tensor.nbytes for name, tensor in weights.items())
    return {"file_bytes": total, "sqnr_db": _error(weights, layers)}


def table(results: dict) -> str:
    """Sizes and errors, then times, then the conditions."""
    facts = results["machine"]
    remarks = (
        f"{len(results['captions'])} pictures, {results['steps']} steps of {results['sampler']}, guidance "
        f"{results['guidance']:g}, seed {results['seed']} for each. {results['note']} ¹ Scaled by the number of "
        "weights from what it took for a Gaussian sample, `benchmarks/results/article_by_hand.json`. "
    )
    origin = shared.origin_line(results, f"threads: {results['threads']}", f"torch {facts['torch']}")
    return f"{sizes_table(results)}\n\n{times_table(results)}\n\n{remarks}{origin}"


def sizes_table(results: dict) -> str:
    """Size, error and time of a step of every model, and of the article's format."""
    original, base = results["original_bytes"], results["fp16"]["step_seconds"]["median"]

    def cells(name: str, row: dict, recorded: str = "–") -> list[str]:
        article, step = row.get("article"), row["step_seconds"]
        return [
            name,
            f"{row['file_bytes'] / 1e6:,.2f} MB = {row['file_bytes'] / original:.2f}",
            f"{article['bytes'] / 1e6:.2f} MB, {article['sqnr_db']:.1f} dB" if article else "–",
            recorded,
            *(f"{row[key]:.1f}" if row.get(key) is not None else "–" for key in ("sqnr_db", "psnr_db")),
            f"{shared.spread(step, ' s', 3)} = {step['median'] / base:.2f} ×",
        ]

    recorded = results["article"]["size_of_fp16"]
    rows = [cells("fp16", {"file_bytes": original, **results["fp16"]})]
    rows += [cells(f"{r['levels']} levels", r, recorded.get(str(r["levels"]), "–")) for r in results["levels"]]
    for name, label in (("int8_activations", INT8_ACTIVATIONS), ("torch_dynamic_int8", DYNAMIC_INT8)):
        if "file_bytes" in results.get(name, {}):
            rows.append(cells(label, results[name]))
    header = [f"UNet of {results['model']}", "size, of fp16's", "as the article stores it", "the article says of SDXL"]
    return shared.markdown_table([*header, "weights, dB", "pictures, dB", "a step"], rows)


def times_table(results: dict) -> str:
    """Seconds of every stage by levels, and of the article's own code."""
    levels = results["levels"]
    rows = [[label, *(f"{row['seconds'][name]:.2f}" for row in levels), "–"] for name, label in STAGES.items()]
    total = [f"{sum(row['seconds'].values()):.2f}" for row in levels]
    rows.append(["together", *total, f"{results['article']['all_stages']}, SDXL"])
    by_hand = shared.read_results("article_by_hand")["seconds_per_million_weights"]
    for stage, label in (("quantise", "quantise, save"), ("load", "load, dequantise all")):
        cells = [f"the article's code¹: {label}"]
        for row in levels:
            seconds = by_hand.get(str(row["levels"]))
            cells.append(f"{median(seconds[stage]) * row['quantized_weights'] / 1e6:.2f}" if seconds else "–")
        rows.append([*cells, "–"])
    return shared.markdown_table(["seconds", *(f"{row['levels']} levels" for row in levels), "the article says"], rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit code 1 and one line on stderr if the model cannot be used."""
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--model", help="a diffusers folder of SDXL (default: the bundled demo model)")
    parser.add_argument("--out", type=Path, help="folder for the picture, the results and the quantised files")
    given = parser.parse_args(arguments)
    if given.model and not given.out:
        parser.error("--model needs --out: the repository holds the demo model's results")
    print(shared.machine())
    try:
        model = folder_model(given.model) if given.model else demo_model()
        with tempfile.TemporaryDirectory() as temporary:
            (given.out or Path(temporary)).mkdir(parents=True, exist_ok=True)
            picture = (given.out or shared.IMAGES) / "article-grid.png"
            results = run(model, given.out or Path(temporary), picture)
    except (NFQError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(shared.write_results("article", results, given.out and given.out / "article.json"), picture, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
