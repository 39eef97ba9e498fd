"""Draw the same samples with the weights of the original and of each file, by a diffusers pipeline or the demo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..files.container import FACTS_KEY
from ..files.original import Original
from ..parallel import Progress, no_progress
from . import protocol
from .drift import drift_facts, drift_figures
from .metrics import psnr_db, ssim
from .protocol import Sample, Series

DEFAULT_STEPS = 20


@dataclass(frozen=True)
class Drawing:
    """What to draw, and how; None leaves the choice to the pipeline."""

    prompts: tuple[str, ...] | None = None
    seed: int = 0
    """Picture i starts from the noise of seed `seed + i`."""
    steps: int = DEFAULT_STEPS
    guidance: float | None = None
    side: int | None = None
    """Width and height, in pixels."""
    device: str = "cpu"


class Painter(Protocol):
    """Draws with the weights of one file after another."""

    chosen: Series
    """The pictures of its `Drawing`, with all choices made."""
    device: str
    has_latents: bool
    """Whether it can draw other series than `chosen`, which need latents."""

    def load(self, path: str | os.PathLike) -> None:
        """Load a file's weights; NFQError if they do not fit this pipeline's model."""

    def draw(self, series: Series) -> Iterator[Sample]:
        """Draw one sample after another; NFQError if one holds NaN or infinity."""


Figures = Callable[[Sequence[Sample], Sequence[Sample]], dict[str, Any]]
"""Compares what a file drew (second) with what the original drew (first)."""


def add_pictures(
    report: dict[str, Any],
    original: str | os.PathLike,
    files: Sequence[str | os.PathLike],
    painter: Painter,
    *,
    drift: Series | None = None,
    progress: Progress = no_progress,
) -> list[np.ndarray]:
    """Draw with the original and with each file, and add measurements to the report once all is drawn.

    `report["pictures"]` gets the settings of the drawing. Each of `report["files"]` gets `pictures`: `psnr_db` over all
    pictures, `ssim` (mean), and both for `each` picture. If the model has latents, `report["protocol"]` gets their
    settings, and each file `latents`: `mean_psnr_db` (mean over prompts, as published) and `each`.
    With `drift`, `report["drift"]` gets its settings (see `drift.drift_facts`), and each file `drift` (see
    `drift.drift_figures`).

    Args:
        report: the result of `measure.measure` for the same files; it is changed.
        original: the safetensors file.
        files: the files that were made from it.
        painter: draws the pictures.
        drift: also draw this series, for example `drift.DRIFT`; only for a painter with latents.
        progress: called with the denoising steps done.

    Returns:
        Pictures of the original and of each file: uint8, shape (count, height, width, 3).

    Raises:
        NFQError: weights do not fit the pipeline, or a result holds NaN or infinity.
    """
    measured = _measured(painter, drift)
    total, done = (1 + len(files)) * sum(series.all_steps() for series, _ in measured.values()), 0
    drawn: list[np.ndarray] = []
    references: dict[str, list[Sample]] = {}
    figures: list[dict[str, Any]] = []
    for path in (original, *files):
        painter.load(path)
        found: dict[str, Any] = {}
        for name, (series, compare) in measured.items():
            samples = []
            for sample in painter.draw(series):
                samples.append(sample)
                done += series.steps
                progress(done, total, str(path))
            if name == "pictures":
                drawn.append(np.stack([sample.picture for sample in samples]))
            if name in references:
                found[name] = compare(references[name], samples)
            else:
                references[name] = samples
        figures.append(found)
    for entry, found in zip(report["files"], figures[1:], strict=True):
        entry.update(found)
    chosen = painter.chosen
    report["pictures"] = {
        "prompts": list(chosen.prompts),
        "seed": chosen.seeds[0],
        "steps": chosen.steps,
        "guidance": chosen.guidance,
        "width": drawn[0].shape[2],
        "height": drawn[0].shape[1],
        "device": painter.device,
    }
    comparable = all(file["architecture"] == "SDXL" for file in report["files"])
    if painter.has_latents:
        series, _ = measured["latents"]
        report["protocol"] = {
            "prompts": list(series.prompts),
            "seed": series.seeds[0],
            "steps": series.steps,
            "width": series.side,
            "height": series.side,
            "comparable": comparable,
        }
    if drift:
        report["drift"] = drift_facts(drift, painter.device, comparable)
    return drawn


def work(painter: Painter, drift: Series | None = None) -> tuple[int, int]:
    """Number of samples that `add_pictures` draws with each model, and of their denoising steps."""
    series = [series for series, _ in _measured(painter, drift).values()]
    return sum(len(one.prompts) for one in series), sum(one.all_steps() for one in series)


def _measured(painter: Painter, drift: Series | None) -> dict[str, tuple[Series, Figures]]:
    """The series to draw and how to compare them, by the key in `report["files"]`."""
    measured: dict[str, tuple[Series, Figures]] = {"pictures": (painter.chosen, _picture_figures)}
    if painter.has_latents:
        measured["latents"] = protocol.apple(painter.chosen.seeds[0]), _latent_figures
    if drift:
        measured["drift"] = drift, drift_figures
    return measured


def _picture_figures(reference: Sequence[Sample], other: Sequence[Sample]) -> dict[str, Any]:
    stacks = [
        torch.from_numpy(np.stack([sample.picture for sample in samples])).movedim(-1, 1).float()
        for samples in (reference, other)
    ]
    pairs = list(zip(*(stack.split(1) for stack in stacks), strict=True))
    each = [{"psnr_db": psnr_db(*pair, 255), "ssim": ssim(*pair, 255)} for pair in pairs]
    return {"psnr_db": psnr_db(*stacks, 255), "ssim": sum(one["ssim"] for one in each) / len(each), "each": each}


def _latent_figures(reference: Sequence[Sample], other: Sequence[Sample]) -> dict[str, Any]:
    each = [protocol.latent_psnr_db(one.latent, two.latent) for one, two in zip(reference, other, strict=True)]
    return {"mean_psnr_db": _mean(each), "each": each}


def _mean(ratios: Sequence[float | None]) -> float | None:
    """The mean of dB; None if all are infinite. Single infinite ones are left out."""
    known = [ratio for ratio in ratios if ratio is not None]
    return sum(known) / len(known) if known else None


def is_packed(path: str | os.PathLike) -> bool:
    """Whether a file is a container; NFQError if it is not a model."""
    with Original(path) as file:
        return FACTS_KEY in file.metadata
