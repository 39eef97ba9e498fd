"""Calibrate a diffusers pipeline of SDXL: sample the bundled prompts, and record the inputs of its UNet's layers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.collector import collect
from ..calibration.prompts import PROMPTS, SIDE, STEPS, Prompt
from ..calibration.statistics import Calibration
from ..checkpoints.memory import check_device
from ..errors import NFQError, missing_package
from ..files.container import FACTS_KEY
from ..files.original import Original
from ..files.untrusted import LOADING_ERRORS, loading_error_message
from ..layers.packing import packed_layers
from ..models.sensitivities import known_by_layer
from ..models.unet import detect
from ..parallel import Progress, no_progress

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


def calibrate(
    pipeline: StableDiffusionXLPipeline,
    prompts: int | Sequence[Prompt] | None = None,
    *,
    steps: int = STEPS,
    side: int = SIDE,
    guidance: float | None = None,
    sensitivities: bool | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Calibration:
    """Sample with a pipeline and collect the statistics of its UNet's layers, with Hessians.

    Pictures are not decoded. The pipeline's own scheduler is used, and its weights are not changed.

    Args:
        pipeline: a text-to-image pipeline of the SDXL family, on any device, offloaded or not; LoRAs count.
        prompts: what to sample: the first so many of the bundled ones, or your own; by default all bundled ones.
        steps: denoising steps of each prompt; few for Turbo, Lightning and LCM.
        side: width and height in pixels, a multiple of 8.
        guidance: CFG scale; by default the pipeline's. At 1 or less there is no negative prompt.
        sensitivities: whether to measure sensitivities, which takes five times as long; by default only if SDXL's own
            are not known layer by layer for this UNet.
        seed: seed of the first prompt's noise; the others follow.
        progress: see `parallel.Progress`; counts steps, and names prompts.

    Raises:
        NFQError: the pipeline has no UNet of torch weights or it is quantised, an argument does not fit, or the
            model's output holds NaN or infinity.
    """
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, torch.nn.Module):
        raise NFQError(f"a {type(pipeline).__name__} has no UNet; calibrate a StableDiffusionXLPipeline")
    if packed_layers(unet) or not all(weight.is_floating_point() for weight in unet.parameters()):
        raise NFQError("this UNet is quantised, but a calibration needs dense weights; load the fp16 model")
    if isinstance(prompts, int):
        if not 1 <= prompts <= len(PROMPTS):
            raise NFQError(f"prompts must be from 1 to {len(PROMPTS)}, the number of bundled ones, got {prompts}")
        prompts = PROMPTS[:prompts]
    chosen = PROMPTS if prompts is None else prompts
    if sensitivities is None:
        info = detect({name: tuple(one.shape) for name, one in unet.state_dict().items()})
        sensitivities = not known_by_layer(info)
    with collect(unet, hessians=True, sensitivities=sensitivities) as collected:
        for number, prompt in enumerate(chosen):
            _sample(pipeline, prompt, number, len(chosen), steps, side, guidance, seed + number, progress)
    return collected.calibration(prompts=len(chosen), steps=steps)


def _sample(
    pipeline: StableDiffusionXLPipeline,
    prompt: Prompt,
    number: int,
    count: int,
    steps: int,
    side: int,
    guidance: float | None,
    seed: int,
    progress: Progress,
) -> None:
    done = number * steps

    def report(pipeline: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(done + min(step + 1, steps), count * steps, f"prompt {number + 1} of {count}")
        return tensors

    options = {} if guidance is None else {"guidance_scale": guidance}
    try:
        latents = pipeline(
            prompt.positive,
            negative_prompt=prompt.negative,
            num_inference_steps=steps,
            height=side,
            width=side,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=report,
            **options,
        ).images
    except ValueError as error:
        raise NFQError(f"the pipeline cannot sample this: {error}") from None
    if not torch.isfinite(latents).all():
        raise NFQError(
            f"prompt {number + 1} gave NaN or infinity in {str(latents.dtype).removeprefix('torch.')}; load the model "
            "in bfloat16 or float32"
        )


def load_pipeline(
    source: str | os.PathLike, device: str | None = None, config: str | None = None, *, v_prediction: bool = False
) -> Any:
    """Load an SDXL pipeline from a checkpoint file or a diffusers folder: fp32 on a CPU, fp16 on other devices.

    Args:
        source: a `.safetensors` checkpoint with text encoders and VAE, or a folder of diffusers' layout.
        device: where the pipeline is put; by default a CUDA device if there is one.
        config: for a file, a diffusers folder of the same kind of model with its settings and tokenisers; by default
            diffusers fetches SDXL's.
        v_prediction: whether the model in a file predicts v; always so if the file has the marker `v_pred`.

    Raises:
        NFQError: the source is no such model or quantised, or the settings cannot be fetched.
        ImportError: diffusers or transformers is missing.
    """
    try:
        import transformers  # noqa: F401
        from diffusers import StableDiffusionXLPipeline
    except ImportError as error:
        needed = ("diffusers", "transformers")
        raise missing_package(f"sampling a model needs {' and '.join(needed)}", *needed) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device, torch.float16)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    path = Path(source)
    with _errors_in_words(path):
        if path.is_dir():
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                path, torch_dtype=dtype, local_files_only=True, add_watermarker=False
            )
        else:
            names = _names_in_checkpoint(path)
            pipeline = StableDiffusionXLPipeline.from_single_file(
                path, torch_dtype=dtype, config=config, local_files_only=config is not None, add_watermarker=False
            )
            if v_prediction or "v_pred" in names:
                predict_v(pipeline, "ztsnr" in names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def predict_v(pipeline: Any, zero_terminal_snr: bool) -> None:
    """Give a pipeline a scheduler for a model that predicts v, whose last noise level may hold no signal at all."""
    changes = {"prediction_type": "v_prediction"}
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)


def _names_in_checkpoint(path: Path) -> set[str]:
    """Names of a whole checkpoint's tensors; NFQError for another file."""
    with Original(path) as file:
        if FACTS_KEY in file.metadata:
            raise NFQError(f"{path} is quantised already; calibrate the model that it was made from")
        if not any("text_model" in key or "conditioner" in key for key in file.entries):
            raise NFQError(
                f"{path} holds no text encoders, which prompts need; give the whole checkpoint, or a diffusers folder"
            )
        return set(file.entries)


@contextmanager
def _errors_in_words(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 renames `torch_dtype`, which older versions need.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except LOADING_ERRORS as error:
        raise NFQError(f"{path} cannot be loaded as an SDXL pipeline: {loading_error_message(error)}") from None
