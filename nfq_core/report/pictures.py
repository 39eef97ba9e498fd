"""The same pictures drawn with the weights of the original and of each file, by a diffusers pipeline or the demo."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..checkpoint import dense
from ..container import FACTS_KEY, NFQFile
from ..demo.model import GUIDANCE, STEPS, build_pipeline, load_weights, sample
from ..demo.shapes import CAPTIONS
from ..errors import NFQError, missing_package
from ..memory import check_device
from ..metrics import psnr_db, ssim
from ..original import Original
from ..parallel import Progress, no_progress
from ..state import load
from ..tensor import NFTensor
from ..unet import detect, diffusers_names
from ..untrusted import fault_of
from . import protocol

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

DEMO = "demo"
"""Stands for the bundled model and its pipeline."""

PIPELINE = "StableDiffusionXLPipeline"

PIPELINE_GUIDANCE = 5.0
"""Its own default."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and how; None stands for the pipeline's own choice."""

    prompts: tuple[str, ...] | None = None
    seed: int = 0
    """Picture i starts from the noise of seed + i."""
    steps: int = STEPS
    guidance: float | None = None
    side: int | None = None
    """Width and height, in pixels."""
    device: str = "cpu"


class Painter(Protocol):
    """Draws with the weights of one file after the other."""

    drawing: Drawing
    """All of its choices made."""

    def load(self, path: str | os.PathLike) -> None:
        """Take a file's weights; NFQError where they are not those of this pipeline's model."""

    def pictures(self) -> np.ndarray:
        """Draw every prompt: uint8, shape (count, height, width, 3)."""

    def latents(self) -> list[torch.Tensor] | None:
        """What `protocol` measures, one for each of its prompts; None where the model has no latents."""


def painter(pipeline: str | os.PathLike, drawing: Drawing) -> Painter:
    """What draws with a diffusers folder, or with the bundled demo model where `pipeline` is DEMO.

    Raises:
        NFQError: the folder holds no SDXL pipeline, or the device or a prompt is of no use to it.
        ImportError: diffusers or transformers is missing.
    """
    return DemoPainter(drawing) if str(pipeline) == DEMO else PipelinePainter(pipeline, drawing)


def add_pictures(
    report: dict[str, Any],
    original: str | os.PathLike,
    files: Sequence[str | os.PathLike],
    artist: Painter,
    *,
    progress: Progress = no_progress,
) -> list[np.ndarray]:
    """Draw with the original and with each file, and put what was measured into the report.

    `report["pictures"]` tells how they were drawn; each of `report["files"]` gets `pictures` (`psnr_db` over all of
    them, `ssim`, their mean, and the same of `each`). Where the model has latents, `report["protocol"]` tells how those
    were made, and each file gets `latents` (`psnr_db`, the mean over prompts, and `each`).

    Args:
        report: what `measure.measure` returned of the same files.
        original: the safetensors file.
        files: those that were made from it.
        artist: draws.
        progress: called with the number of models that were sampled.

    Returns:
        The pictures of the original and of each file: uint8, shape (count, height, width, 3).

    Raises:
        NFQError: weights do not fit the pipeline, or what was drawn is no picture.
    """
    drawn: list[np.ndarray] = []
    reference = None
    for number, path in enumerate((original, *files)):
        artist.load(path)
        latents = artist.latents()
        drawn.append(artist.pictures())
        if number == 0:
            reference = latents
        else:
            entry = report["files"][number - 1]
            entry["pictures"] = _picture_figures(drawn[0], drawn[-1])
            if reference is not None:
                each = [protocol.latent_psnr_db(*pair) for pair in zip(reference, latents, strict=True)]
                entry["latents"] = {"psnr_db": _mean(each), "each": each}
        progress(number + 1, len(files) + 1, str(path))
    drawing = artist.drawing
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


class DemoPainter:
    """Draws with the demo model. See `Painter`."""

    def __init__(self, drawing: Drawing) -> None:
        chosen = drawing.prompts or CAPTIONS
        guidance = GUIDANCE if drawing.guidance is None else drawing.guidance
        self.drawing = Drawing(chosen, drawing.seed, drawing.steps, guidance)
        if drawing.side is not None or drawing.device != "cpu":
            raise NFQError("the demo model draws 32 × 32 pixels on the CPU; leave --side and --device out")
        self._pipeline = build_pipeline()

    def load(self, path: str | os.PathLike) -> None:
        """Take a file's weights."""
        weights = dense(load(path)) if _is_packed(path) else load_weights(path)
        try:
            self._pipeline = build_pipeline(weights)
        except (RuntimeError, KeyError):
            raise NFQError(f"{path} is not of the demo model's shape; name a --pipeline of its own") from None

    def pictures(self) -> np.ndarray:
        """Draw every caption."""
        choice = self.drawing
        try:
            return sample(
                self._pipeline, choice.prompts, seed=choice.seed, steps=choice.steps, guidance=choice.guidance
            )
        except ValueError as error:
            raise NFQError(f"the demo model cannot draw this: {error}") from None

    def latents(self) -> None:
        """It works on pixels."""


class PipelinePainter:
    """Draws with an SDXL folder of diffusers, whose own UNet weights are not read. See `Painter`."""

    def __init__(self, folder: str | os.PathLike, drawing: Drawing) -> None:
        check_device(drawing.device, torch.float32)
        self._folder = Path(folder)
        _check_folder(self._folder)
        self._pipeline = _load_pipeline(self._folder, torch.device(drawing.device))
        own = self._pipeline.unet.config.sample_size * self._pipeline.vae_scale_factor
        self.drawing = Drawing(
            drawing.prompts or protocol.PROMPTS,
            drawing.seed,
            drawing.steps,
            PIPELINE_GUIDANCE if drawing.guidance is None else drawing.guidance,
            drawing.side or own,
            drawing.device,
        )
        if self.drawing.side % 8:
            raise NFQError(f"--side must be a multiple of 8, got {self.drawing.side}")

    def load(self, path: str | os.PathLike) -> None:
        """Take a file's weights, tensor by tensor."""
        packed = _is_packed(path)
        self._path = path
        with NFQFile(path) if packed else Original(path) as file:
            shapes = file.shapes() if packed else {key: entry.shape for key, entry in file.entries.items()}
            info = detect(shapes)
            try:
                names = diffusers_names(info, shapes) if info else {}
            except ValueError as error:
                raise NFQError(f"{path}: {error}") from None
            keys = {name: key for key, name in names.items()}
            wanted = dict(self._pipeline.unet.named_parameters())
            for name, parameter in wanted.items():
                found = shapes.get(keys.get(name, ""))
                if found != tuple(parameter.shape):
                    raise NFQError(
                        f"{path} does not fit {self._folder}: the UNet's {name!r} has shape {tuple(parameter.shape)} "
                        f"there, {found} here; name the folder of the same model"
                    )
            with torch.no_grad():
                for name, parameter in wanted.items():
                    tensor = file.load(keys[name]) if packed else file.tensor(keys[name])
                    dense_tensor = tensor.dequantize() if isinstance(tensor, NFTensor) else tensor
                    parameter.copy_(dense_tensor.view(parameter.shape))

    def pictures(self) -> np.ndarray:
        """Draw every prompt, one at a time."""
        choice = self.drawing
        drawn = []
        for number, prompt in enumerate(choice.prompts):
            picture = self._draw(prompt, choice.seed + number, choice.steps, choice.side, "np", choice.guidance)
            if not np.isfinite(picture).all():
                raise NFQError(
                    f"what {self._path} draws in {self._folder} holds NaN or infinity; it cannot be compared"
                )
            drawn.append((picture * 255).round().astype(np.uint8))
        return np.stack(drawn)

    def latents(self) -> list[torch.Tensor]:
        """One latent for each of the protocol's prompts."""
        drawn = []
        for number, prompt in enumerate(protocol.PROMPTS):
            seed = self.drawing.seed + number
            latent = self._draw(prompt, seed, protocol.STEPS, protocol.SIDE, "latent", None).float().cpu()
            if not latent.isfinite().all() or not latent.any():
                raise NFQError(f"the latents of {self._path} in {self._folder} are no numbers; they cannot be compared")
            drawn.append(latent)
        return drawn

    def _draw(self, prompt: str, seed: int, steps: int, side: int, kind: str, guidance: float | None) -> Any:
        options = {} if guidance is None else {"guidance_scale": guidance}
        try:
            return self._pipeline(
                prompt,
                negative_prompt="",
                num_inference_steps=steps,
                height=side,
                width=side,
                output_type=kind,
                generator=torch.Generator().manual_seed(seed),
                **options,
            ).images[0]
        except ValueError as error:
            raise NFQError(f"{self._folder} cannot draw this: {error}") from None


def _is_packed(path: str | os.PathLike) -> bool:
    with Original(path) as file:
        return FACTS_KEY in file.metadata


def _check_folder(folder: Path) -> None:
    try:
        kind = json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"]
    except OSError:
        raise NFQError(f"{folder} is no diffusers folder: its model_index.json cannot be read") from None
    except (ValueError, KeyError, TypeError):
        raise NFQError(f"{folder}: its model_index.json is damaged; fetch the folder again") from None
    if kind != PIPELINE:
        raise NFQError(f"{folder} holds a {kind}; pictures are drawn with a {PIPELINE}")


def _load_pipeline(folder: Path, device: torch.device) -> StableDiffusionXLPipeline:
    """The pipeline, its UNet without weights yet; fp32 on a CPU, otherwise fp16."""
    try:
        import transformers
        from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
        from diffusers.utils import logging
    except ImportError as error:
        needed = ("diffusers", "transformers")
        raise missing_package(f"pictures of a pipeline need {' and '.join(needed)}", *needed) from error
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    # Their bars would stand beside ours.
    logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder / "unet")))
        unet = torch.nn.Module.to(unet, dtype).to_empty(device=device).eval()
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder, unet=unet, local_files_only=True, add_watermarker=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, KeyError | TypeError | AttributeError):
            reason = fault_of(error)
        else:
            reason = next(iter(str(error).strip().splitlines()), "no reason is given")
        raise NFQError(f"{folder} cannot be loaded as an SDXL pipeline: {reason}") from None
    finally:
        logging.enable_progress_bar()
        transformers.logging.enable_progress_bar()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
