"""Draw the same pictures with the weights of the original and of each file, by a diffusers pipeline or the demo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..files.container import FACTS_KEY
from ..files.original import Original
from ..parallel import Progress, no_progress
from . import protocol
from .metrics import psnr_db, ssim

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

    drawing: Drawing
    """What it draws, with all choices made."""

    def load(self, path: str | os.PathLike) -> None:
        """Load a file's weights; NFQError if they do not fit this pipeline's model."""

    def pictures(self) -> np.ndarray:
        """Draw every prompt: uint8, shape (count, height, width, 3)."""

    def latents(self) -> list[torch.Tensor] | None:
        """One latent for each prompt of `protocol`; None if the model has no latents."""


def add_pictures(
    report: dict[str, Any],
    original: str | os.PathLike,
    files: Sequence[str | os.PathLike],
    painter: Painter,
    *,
    progress: Progress = no_progress,
) -> list[np.ndarray]:
    """Draw with the original and with each file, and add measurements of the pictures to the report.

    `report["pictures"]` gets the settings of the drawing. Each of `report["files"]` gets `pictures`: `psnr_db` over all
    pictures, `ssim` (mean), and both for `each` picture. If the model has latents, `report["protocol"]` gets their
    settings, and each file `latents`: `psnr_db` (mean over prompts) and `each`.

    Args:
        report: the result of `measure.measure` for the same files; it is changed.
        original: the safetensors file.
        files: the files that were made from it.
        painter: draws the pictures.
        progress: called with the number of models sampled.

    Returns:
        Pictures of the original and of each file: uint8, shape (count, height, width, 3).

    Raises:
        NFQError: weights do not fit the pipeline, or a result holds NaN or infinity.
    """
    drawn: list[np.ndarray] = []
    reference = None
    for number, path in enumerate((original, *files)):
        painter.load(path)
        latents = painter.latents()
        drawn.append(painter.pictures())
        if number == 0:
            reference = latents
        else:
            entry = report["files"][number - 1]
            entry["pictures"] = _picture_figures(drawn[0], drawn[-1])
            if reference is not None:
                each = [protocol.latent_psnr_db(*pair) for pair in zip(reference, latents, strict=True)]
                entry["latents"] = {"psnr_db": _mean(each), "each": each}
        progress(number + 1, len(files) + 1, str(path))
    drawing = painter.drawing
    report["pictures"] = {
        "prompts": list(drawing.prompts),
        "seed": drawing.seed,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "width": drawn[0].shape[2],
        "height": drawn[0].shape[1],
        "device": drawing.device,
    }
    if reference is not None:
        report["protocol"] = {
            "prompts": list(protocol.PROMPTS),
            "seed": drawing.seed,
            "steps": protocol.STEPS,
            "width": protocol.SIDE,
            "height": protocol.SIDE,
            "comparable": all(file["architecture"] == "SDXL" for file in report["files"]),
        }
    return drawn


def _picture_figures(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    pairs = list(zip(*(torch.from_numpy(p).movedim(-1, 1).float().split(1) for p in (reference, other)), strict=True))
    each = [{"psnr_db": psnr_db(*pair, 255), "ssim": ssim(*pair, 255)} for pair in pairs]
    whole = psnr_db(torch.from_numpy(reference), torch.from_numpy(other), 255)
    return {"psnr_db": whole, "ssim": sum(one["ssim"] for one in each) / len(each), "each": each}


def _mean(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return sum(known) / len(known) if known else None


def is_packed(path: str | os.PathLike) -> bool:
    """Whether a file is a container; NFQError if it is not a model."""
    with Original(path) as file:
        return FACTS_KEY in file.metadata
