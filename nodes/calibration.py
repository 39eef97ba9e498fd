"""Collecting a calibration: statistics of the inputs of a MODEL's layers, recorded while it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..nfq_core import NFQError
from ..nfq_core.calibration.collector import Collector
from ..nfq_core.calibration.sensitivity import PASSES
from ..nfq_core.models.unet import detect
from .bake import without_dynamic_vram
from .host import CALIBRATION_SUFFIX, CALIBRATIONS, COLLECTOR, output_path, refuse_existing
from .weights import is_quantized


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
        NFQError: the MODEL is quantised, compiled, or not a UNet of the SDXL family.
    """
    unet = model.model.diffusion_model
    if any(map(is_quantized, unet.parameters())):
        raise NFQError(
            "this MODEL is quantised, but a calibration needs dense weights; connect the loader of the fp16 model"
        )
    _refuse_compiled(model)
    if detect({name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}) is None:
        raise NFQError("this MODEL is not a UNet of the SDXL family; NFQ Collect Calibration needs one")
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
