"""Calibrate a diffusers pipeline of SDXL: sample the bundled prompts, and record the inputs of its UNet's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.collector import collect
from ..calibration.prompts import SIDE, STEPS, Prompt, prompts_to_sample
from ..calibration.statistics import Calibration
from ..errors import NFQError
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
    chosen = prompts_to_sample(prompts, steps, side)
    if sensitivities is None:
        info = detect({name: tuple(one.shape) for name, one in unet.state_dict().items()})
        sensitivities = not known_by_layer(info)
    options: dict[str, Any] = {"num_inference_steps": steps, "height": side, "width": side}
    if guidance is not None:
        options["guidance_scale"] = guidance
    with collect(unet, hessians=True, sensitivities=sensitivities) as collected:
        for number, prompt in enumerate(chosen):
            name = f"prompt {number + 1} of {len(chosen)}"

            def report(_: object, step: int, *more: Any, done: int = number * steps, name: str = name) -> Any:
                progress(done + min(step + 1, steps), len(chosen) * steps, name)
                return more[-1]

            _sample(pipeline, prompt, seed + number, name, **options, callback_on_step_end=report)
    return collected.calibration(prompts=len(chosen), steps=steps)


def _sample(pipeline: StableDiffusionXLPipeline, prompt: Prompt, seed: int, name: str, **options: Any) -> None:
    """Sample one prompt; NFQError, which calls it by `name`, if that fails or gives NaN."""
    try:
        latents = pipeline(
            prompt.positive,
            negative_prompt=prompt.negative,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
            **options,
        ).images
    except ValueError as error:
        raise NFQError(f"the pipeline cannot sample this: {error}") from None
    if not torch.isfinite(latents).all():
        advice = "fetch the model again"
        if latents.dtype == torch.float16:
            advice = "load the model in bfloat16 or float32, as `--device cpu` does"
        kind = str(latents.dtype).removeprefix("torch.")
        raise NFQError(f"{name} gave NaN or infinity in {kind}; {advice}")
