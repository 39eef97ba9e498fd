"""Draw with the SDXL pipeline in a diffusers folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoints.memory import check_device
from ..errors import NFQError, missing_package
from ..files.container import NFQFile
from ..files.original import Original
from ..files.pipeline_folder import refuse_other_folders
from ..files.untrusted import LOADING_ERRORS, loading_error_message
from ..models.unet import detect, diffusers_names
from ..packed.tensor import NFTensor
from . import protocol
from .drift import DPMPP_2M_KARRAS
from .pictures import Drawing, is_packed
from .protocol import Sample, Series

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline

PIPELINE_GUIDANCE = 5.0
"""The pipeline's default."""

NOISE_LEVELS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Settings of a diffusers scheduler that belong to the model, whichever sampler is used."""

SAMPLERS = {
    DPMPP_2M_KARRAS: {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "use_karras_sigmas": True,
        "final_sigmas_type": "zero",
    }
}
"""Settings of `DPMSolverMultistepScheduler` that sample as ComfyUI's sampler and schedule of that name."""


class PipelinePainter:
    """Draws with a diffusers folder of SDXL; the UNet weights in it are not read. See `pictures.Painter`."""

    has_latents = True

    def __init__(self, folder: str | os.PathLike, drawing: Drawing) -> None:
        check_device(drawing.device, torch.float32)
        self._folder = Path(folder)
        refuse_other_folders(self._folder)
        self._pipeline = _load_pipeline(self._folder, torch.device(drawing.device))
        self._own_scheduler = self._pipeline.scheduler
        self.device = drawing.device
        prompts = drawing.prompts or protocol.PROMPTS
        self.chosen = Series(
            prompts,
            protocol.consecutive(drawing.seed, len(prompts)),
            drawing.steps,
            drawing.side or self._pipeline.unet.config.sample_size * self._pipeline.vae_scale_factor,
            PIPELINE_GUIDANCE if drawing.guidance is None else drawing.guidance,
        )
        if self.chosen.side % 8:
            raise NFQError(f"--side must be a multiple of 8, got {self.chosen.side}")

    def load(self, path: str | os.PathLike) -> None:
        """Load a file's weights, tensor by tensor."""
        packed = is_packed(path)
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
                shape = shapes.get(keys.get(name, ""))
                if shape != tuple(parameter.shape):
                    raise NFQError(
                        f"{path} does not fit {self._folder}: the UNet's {name!r} has shape {tuple(parameter.shape)} "
                        f"in the folder, {shape} in the file; give the folder of the file's model"
                    )
            with torch.no_grad():
                for name, parameter in wanted.items():
                    tensor = file.load(keys[name]) if packed else file.tensor(keys[name])
                    dense_tensor = tensor.dequantize() if isinstance(tensor, NFTensor) else tensor
                    parameter.copy_(dense_tensor.view(parameter.shape))

    def draw(self, series: Series) -> Iterator[Sample]:
        """Draw one sample after another."""
        self._pipeline.scheduler = self._scheduler(series.sampler)
        for prompt, seed in zip(series.prompts, series.seeds, strict=True):
            yield self._sample(series, prompt, seed)

    def _sample(self, series: Series, prompt: str, seed: int) -> Sample:
        latents = torch.empty(0)

        def keep_latents(pipeline: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal latents
            latents = tensors["latents"]
            return tensors

        options = {} if series.guidance is None else {"guidance_scale": series.guidance}
        try:
            drawn = self._pipeline(
                prompt,
                negative_prompt="",
                num_inference_steps=series.steps,
                height=series.side,
                width=series.side,
                output_type="np" if series.decoded else "latent",
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=keep_latents,
                **options,
            ).images[0]
        except ValueError as error:
            raise NFQError(f"{self._folder} cannot draw this: {error}") from None
        latent = latents[0].float().cpu()
        if not latent.isfinite().all() or not latent.any():
            raise NFQError(
                f"a latent of {self._path} in {self._folder} is all zero, or holds NaN or infinity; it cannot be "
                "compared"
            )
        if not series.decoded:
            return Sample(latent, None)
        if not np.isfinite(drawn).all():
            raise NFQError(f"a picture of {self._path} in {self._folder} holds NaN or infinity; it cannot be compared")
        return Sample(latent, (drawn * 255).round().astype(np.uint8))

    def _scheduler(self, sampler: str | None) -> SchedulerMixin:
        """The pipeline's own scheduler, or a sampler of SAMPLERS on the model's noise levels."""
        if sampler is None:
            return self._own_scheduler
        from diffusers import DPMSolverMultistepScheduler

        own = self._own_scheduler.config
        if "beta_schedule" not in own:
            raise NFQError(f"{self._folder} cannot draw with {sampler}: its scheduler has no beta_schedule")
        levels = {name: own[name] for name in NOISE_LEVELS if name in own}
        return DPMSolverMultistepScheduler.from_config({**levels, **SAMPLERS[sampler]})


def _load_pipeline(folder: Path, device: torch.device) -> StableDiffusionXLPipeline:
    """The pipeline, with uninitialised UNet weights; fp32 on a CPU, fp16 on other devices."""
    try:
        import transformers
        from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
        from diffusers.utils import logging
    except ImportError as error:
        needed = ("diffusers", "transformers")
        raise missing_package(f"pictures of a pipeline need {' and '.join(needed)}", *needed) from error
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    # Progress bars of these packages would mix with ours.
    logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder / "unet")))
        unet = torch.nn.Module.to(unet, dtype).to_empty(device=device).eval()
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder, unet=unet, local_files_only=True, add_watermarker=False
        )
    except LOADING_ERRORS as error:
        raise NFQError(f"{folder} cannot be loaded as an SDXL pipeline: {loading_error_message(error)}") from None
    finally:
        logging.enable_progress_bar()
        transformers.logging.enable_progress_bar()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
