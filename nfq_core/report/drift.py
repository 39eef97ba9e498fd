"""Drift of pictures over 25 seeds, measured as the HSWQ project measures quantised SDXL models, and its figures.

The prompt, the seeds, 25 steps, CFG 7, `dpmpp_2m` with the `karras` schedule, 1024 × 1024 and the cosine of the final
latents are those of `benchmark/sdxl_int8_traj_compare.py` and `md/How to quantize SDXL.md` in
`ussoewwin/Hybrid-Sensitivity-Weighted-Quantization` on GitHub. SSIM and PSNR of the decoded pictures are those of
`benchmark/int8bench_sdxl.py`, which draws one picture per model; here they are measured for every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..decibels import ratio_in_words
from .markdown import as_code, markdown_table
from .metrics import cosine, psnr_db, ssim_uniform
from .protocol import Sample, Series

DPMPP_2M_KARRAS = "dpmpp_2m, karras"

PROMPT = "masterpiece, best quality, 1girl, solo, standing, simple background"

# fmt: off
SEEDS = (
    42, 137, 849, 2024, 7391, 18429, 53082, 149206, 382715, 826401, 1938502, 4710928, 8391642, 15820493, 36192847,
    71058294, 128491703, 285039184, 491730285, 762019483, 938174026, 1409285713, 2683910547, 3851729406, 4195820371,
)
# fmt: on

DRIFT = Series((PROMPT,) * len(SEEDS), SEEDS, steps=25, side=1024, guidance=7.0, sampler=DPMPP_2M_KARRAS)

Spread = tuple[float, ...]
"""Mean, smallest and largest; or the mean alone."""


@dataclass(frozen=True)
class Published:
    """Figures that HSWQ published for SDXL fine-tunes, against fp16."""

    name: str
    models: int
    """Number of fine-tunes that SSIM and PSNR are over, with one picture each."""
    cosine: Spread | None
    """Over the seeds of one fine-tune, waiIllustriousSDXL_v170."""
    ssim: Spread
    psnr_db: Spread
    """From the published mean squared errors, each in dB."""


PUBLISHED = (
    Published("native ConvRot INT8", 21, (0.93,), (0.964, 0.932, 0.989), (38.0, 32.0, 43.4)),
    Published("HSWQ ConvRot INT8", 21, None, (0.969, 0.944, 0.987), (39.2, 34.5, 44.3)),
    Published("native NVFP4", 17, None, (0.914, 0.861, 0.959), (31.4, 27.9, 34.5)),
    Published("HSWQ ConvRot NVFP4", 17, None, (0.950, 0.924, 0.983), (35.8, 30.5, 39.8)),
)
"""From `benchmark result/benchmark_sdxl_int8.md` and `benchmark result/benchmark_convrotnvfp4.md`."""


def drift_figures(reference: Sequence[Sample], other: Sequence[Sample]) -> dict[str, Any]:
    """Compare samples of one series.

    Args:
        reference: what the original drew: latents and pictures.
        other: what a file drew.

    Returns:
        `cosine`, `ssim` and `psnr_db`, each with `mean`, `min` and `max` over the seeds (see `spread`), and `each`: the
        three figures of every seed.
    """
    each = []
    for one, two in zip(reference, other, strict=True):
        pair = [torch.from_numpy(sample.picture).movedim(-1, 0).unsqueeze(0).float() for sample in (one, two)]
        figures = {"cosine": cosine(one.latent, two.latent), "ssim": ssim_uniform(*pair, 255)}
        each.append({**figures, "psnr_db": psnr_db(*pair, 255)})
    return {**{name: spread([one[name] for one in each]) for name in each[0]}, "each": each}


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, smallest and largest of the figures of all seeds.

    None is the PSNR of equal pictures, which is infinite: it is the largest, and left out of the mean.
    """
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "min": None, "max": None}
    largest = max(known) if len(known) == len(values) else None
    return {"mean": sum(known) / len(known), "min": min(known), "max": largest}


def drift_facts(series: Series, device: str, comparable: bool) -> dict[str, Any]:
    """The settings of a series as a report records them; `comparable` if PUBLISHED is for such models."""
    return {
        "prompt": series.prompts[0],
        "seeds": list(series.seeds),
        "steps": series.steps,
        "guidance": series.guidance,
        "sampler": series.sampler,
        "width": series.side,
        "height": series.side,
        "device": device,
        "comparable": comparable,
    }


def drift_in_words(figures: Mapping[str, Any]) -> dict[str, str]:
    """Each figure of a file as "mean (min–max)"."""
    return {
        name: f"{ratio_in_words(figures[name]['mean'], digits)} ({ratio_in_words(figures[name]['min'], digits)}–"
        f"{ratio_in_words(figures[name]['max'], digits)})"
        for name, digits in (("cosine", 4), ("ssim", 3), ("psnr_db", 1))
    }


def drift_section(report: Mapping[str, Any]) -> str:
    """The settings and a table of the files in Markdown; with PUBLISHED if the report is comparable."""
    facts = report["drift"]
    rows = []
    for file in report["files"]:
        words = drift_in_words(file["drift"])
        rows.append([as_code(file["name"]), f"{file['bits_per_weight']:.2f}", *words.values()])
    columns = ["cosine of final latents", "SSIM, 3 × 3 windows", "PSNR, dB"]
    parts = [
        f"{len(facts['seeds'])} seeds of the prompt {as_code(facts['prompt'])}, {facts['width']} × {facts['height']} "
        f"pixels, {facts['steps']} steps, guidance {facts['guidance']:g}, sampler {facts['sampler']} (ComfyUI's "
        f"names), on {facts['device']}. Each figure compares a sample with the original's of the same seed: mean over "
        "seeds (smallest–largest).",
        markdown_table(["file", "bits per weight", *columns], rows),
    ]
    if facts["comparable"]:
        parts += [ABOUT_PUBLISHED, _published_table(columns)]
    return "\n\n".join(parts)


ABOUT_PUBLISHED = (
    "For comparison, the [HSWQ project](https://github.com/ussoewwin/Hybrid-Sensitivity-Weighted-Quantization) "
    "published these figures. Its formats round activations too; NFQ rounds weights only. The cosine is the mean over "
    "the same seeds of one fine-tune. SSIM and PSNR are from one picture per fine-tune: mean over fine-tunes "
    "(smallest–largest). Its PSNR is an upper bound: the errors were squared in 8 bits, which wrap around."
)


def _published_table(columns: Sequence[str]) -> str:
    rows = []
    for one in PUBLISHED:
        drift = f"≈ {one.cosine[0]}" if one.cosine else "–"
        ssim, psnr = "{:.3f} ({:.3f}–{:.3f})".format(*one.ssim), "{:.1f} ({:.1f}–{:.1f})".format(*one.psnr_db)
        rows.append([one.name, str(one.models), drift, ssim, psnr])
    return markdown_table(["published", "fine-tunes", *columns], rows)
