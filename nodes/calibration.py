"""Calibrating: statistics of the inputs of a MODEL's layers, recorded while it is sampled.

A MODEL collects them with the user's own sampler, or is sampled here with the bundled prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..nfq_core import CorruptFileError, NFQError, UnsupportedFileError
from ..nfq_core.calibration.collector import Collector
from ..nfq_core.calibration.fingerprint import fingerprint
from ..nfq_core.calibration.prompts import PROMPTS
from ..nfq_core.calibration.sensitivity import PASSES
from ..nfq_core.calibration.statistics import Calibration
from ..nfq_core.checkpoints.memory import is_out_of_memory
from ..nfq_core.models.completeness import context_width
from ..nfq_core.models.sensitivities import known_by_layer
from ..nfq_core.models.unet import detect
from .bake import without_dynamic_vram
from .host import (
    BYPASS_LORA,
    CALIBRATION_SUFFIX,
    CALIBRATIONS,
    COLLECTOR,
    LayerProgress,
    listed_output,
    output_path,
    refuse_existing,
)
from .weights import dense, is_quantized, key_patches, quantizable_layers

LATENT_PIXELS = 8
"""Pixels per latent, in each direction."""

SAMPLER, SCHEDULER = "euler", "normal"


class SamplingCollector:
    """Collects the inputs of a UNet's layers over all its samplings; hooks exist only while sampling runs.

    Args:
        unet: the UNet that the MODEL and its clones share.
        hessians: whether to record correlations between inputs, for error feedback.
        sensitivities: whether to measure how strongly noise in each weight disturbs the output.
    """

    def __init__(self, unet: torch.nn.Module, hessians: bool, sensitivities: bool) -> None:
        self._unet = unet
        self._collector = Collector(unet, hessians=hessians, passes=PASSES if sensitivities else 0)
        self._written: set[str] = set()
        self.samplings = 0
        self.steps: int | None = None

    def around_sampling(self, sample: Callable, *arguments: Any, **named: Any) -> torch.Tensor:
        """The host's wrapper `OUTER_SAMPLE`: collect while `sample` runs on this UNet; sample any other UNet as usual.

        Raises:
            NFQError: a later node compiled the MODEL.
        """
        sampled = sample.class_obj.model_patcher
        if sampled.model.diffusion_model is not self._unet:
            return sample(*arguments, **named)
        _refuse_compiled(sampled)
        with self._collector.watching():
            result = sample(*arguments, **named)
        self.samplings += 1
        self.steps = len(arguments[3]) - 1
        return result

    def save(self, path: str, overwrite: bool) -> None:
        """Write the calibration collected so far; a file that this collector wrote before is always replaced.

        Raises:
            NFQError: nothing was sampled, another file has this name, or the file cannot be written.
        """
        if not self.samplings:
            raise NFQError(
                "nothing was sampled with this MODEL; connect it to a sampler, and the sampler's LATENT to samples"
            )
        if not overwrite and path not in self._written:
            refuse_existing(path)
        self._collector.calibration(prompts=self.samplings, steps=self.steps).save(path, overwrite=True)
        self._written.add(path)


def _refuse_compiled(model: Any) -> None:
    """Raise NFQError for a compiled MODEL: code compiled without our hooks does not call them."""
    if TORCH_COMPILE_KWARGS in model.model_options:
        raise NFQError("this MODEL is compiled, which hides the inputs of its layers; remove TorchCompileModel")


def attach_collector(model: Any, hessians: bool, sensitivities: bool) -> Any:
    """Clone a MODEL so that it collects a calibration with any sampler; LoRAs may come before or after.

    Raises:
        NFQError: the MODEL is quantised or compiled, or has no layers to quantise.
    """
    unet = model.model.diffusion_model
    if any(map(is_quantized, unet.parameters())):
        raise NFQError(
            "this MODEL is quantised, but a calibration needs dense weights; connect the loader of the fp16 model"
        )
    _refuse_compiled(model)
    if not quantizable_layers(unet):
        raise NFQError("this MODEL has no Linear or Conv2d layers; a calibration needs some")
    model = without_dynamic_vram(model)
    clone = model.clone()
    collector = SamplingCollector(clone.model.diffusion_model, hessians, sensitivities)
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    clone.remove_wrappers_with_key(kind, COLLECTOR)
    clone.add_wrapper_with_key(kind, COLLECTOR, collector.around_sampling)
    clone.set_attachments(COLLECTOR, collector)
    return clone


def save_calibration(model: Any, filename_prefix: str, overwrite: bool) -> tuple[str, str]:
    """Write what a MODEL collected into the output folder of calibrations.

    Returns:
        The path, and how many samplings the file contains, in words.

    Raises:
        NFQError: the MODEL has no collector, or see `SamplingCollector.save`.
    """
    collector = model.get_attachment(COLLECTOR)
    if collector is None:
        raise NFQError("this MODEL collects no calibration; connect the MODEL from NFQ Collect Calibration")
    path = output_path(filename_prefix, CALIBRATIONS, CALIBRATION_SUFFIX)
    collector.save(path, overwrite)
    summary = f"{collector.samplings} samplings"
    if collector.samplings == 1:
        summary = "1 sampling: queue more runs with other prompts, their data adds up"
    return path, summary


def calibrate_model(
    model: Any,
    clip: Any,
    name: str,
    *,
    prompts: int,
    steps: int,
    cfg: float,
    side: int,
    sensitivities: bool,
    node_id: str | None = None,
) -> tuple[str, bool]:
    """Sample a MODEL with the bundled prompts, and write its calibration; an earlier one of the same MODEL is kept.

    Args:
        model: see `attach_collector`.
        clip: the CLIP that encodes the prompts.
        name: start of the file's name; a hash of the MODEL with its patches and of all other arguments is added.
        prompts: how many of the bundled prompts to sample.
        steps: denoising steps of each.
        cfg: CFG scale.
        side: width and height in pixels.
        sensitivities: whether to measure sensitivities; done in any case if SDXL's own do not apply layer by layer.
        node_id: the node that shows the progress on the page.

    Returns:
        The file's name in the folder of calibrations, and whether it was there already.

    Raises:
        NFQError: there is no CLIP or one of another model, the MODEL cannot be calibrated, its output holds NaN, or
            memory is short.
    """
    if clip is None:
        raise NFQError("there is no CLIP; connect that of the checkpoint loader")
    if model.get_injections(BYPASS_LORA):
        raise NFQError("Load LoRA (Bypass) works only after NFQ Quantize Model; before NFQ Calibrate, use Load LoRA")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.model.diffusion_model.state_dict().items()}
    sensitivities = sensitivities or not known_by_layer(detect(shapes))
    clone = attach_collector(model, True, sensitivities)
    # All prompts first: the host need not swap CLIP and UNet for each.
    encoded = [[clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in one] for one in PROMPTS[:prompts]]
    given, wanted = encoded[0][0][0][0].shape[-1], context_width(shapes)
    if wanted and given != wanted:
        raise NFQError(f"this CLIP gives tokens of width {given}, the MODEL reads {wanted}; connect its own CLIP")
    made_by = _fingerprint(model, encoded, steps, cfg, side, sensitivities)
    path = output_path(name, CALIBRATIONS, CALIBRATION_SUFFIX)
    path = f"{path.removesuffix(CALIBRATION_SUFFIX)}-{made_by}{CALIBRATION_SUFFIX}"
    with suppress(CorruptFileError, UnsupportedFileError):
        if os.path.exists(path) and Calibration.load(path).inputs:
            return listed_output(path, CALIBRATIONS), True
    progress = LayerProgress(node_id, lambda prompt: {})
    out_of_memory = False
    try:
        _sample(clone, encoded, steps, cfg, side, progress)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    if out_of_memory:
        # Outside the handler, whose traceback holds the sampler's tensors.
        del clone
        comfy.model_management.unload_all_models()
        raise NFQError(f"out of memory while sampling {side} × {side} pixels; choose a smaller side")
    clone.get_attachment(COLLECTOR).save(path, overwrite=True)
    return listed_output(path, CALIBRATIONS), False


def _fingerprint(model: Any, *facts: Any) -> str:
    """Hash a MODEL: its weights before patches, its patches, its kind of prediction, and what changes its sampling."""
    with model.use_ejected():
        patches = key_patches(model)
    sampling = model.get_model_object("model_sampling")
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    changes = {key: chain[1:] for key, chain in patches.items() if len(chain) > 1}
    options = sorted(map(str, model.model_options.get("transformer_options", {}))) + sorted(model.model_options)
    return fingerprint(
        patches,
        lambda key: dense(patches[key][0][0]),
        *facts,
        changes,
        kinds,
        getattr(sampling, "sigmas", None),
        options,
        [SAMPLER, SCHEDULER],
    )


def _sample(model: Any, encoded: list, steps: int, cfg: float, side: int, progress: LayerProgress) -> None:
    """Sample pairs of encoded prompts, positive and negative."""
    prompts = len(encoded)
    empty = torch.zeros(1, 4, side // LATENT_PIXELS, side // LATENT_PIXELS)
    for number, (positive, negative) in enumerate(encoded):
        latent = comfy.sample.fix_empty_latent_channels(model, empty)
        noise = comfy.sample.prepare_noise(latent, number)

        def report(step: int, *_: Any, number: int = number) -> None:
            progress(number * steps + step + 1, prompts * steps, f"prompt {number + 1} of {prompts}")

        found = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            SAMPLER,
            SCHEDULER,
            positive,
            negative,
            latent,
            seed=number,
            callback=report,
            disable_pbar=True,
        )
        if not torch.isfinite(found).all():
            raise NFQError(f"prompt {number + 1} gave NaN or infinity; start ComfyUI with --bf16-unet or --fp32-unet")
