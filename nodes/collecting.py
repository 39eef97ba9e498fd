"""A MODEL that collects what its layers are fed while it is sampled, and the calibration that comes of it."""

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
from .host import CALIBRATION_SUFFIX, CALIBRATIONS, COLLECTED, refuse_existing, target
from .weights import is_quantized


class Collected:
    """What a UNet's layers were fed, over all its samplings; hooks are on them only meanwhile.

    Args:
        unet: the UNet of the MODEL and of what other nodes make of it.
        hessians: whether correlations are collected, for error feedback.
        sensitivities: whether it is measured how much noise in each weight disturbs the output.
    """

    def __init__(self, unet: torch.nn.Module, hessians: bool, sensitivities: bool) -> None:
        self._unet = unet
        self._collector = Collector(unet, hessians=hessians, passes=PASSES if sensitivities else 0)
        self._written: set[str] = set()
        self.samplings = 0
        self.steps: int | None = None

    def around_sampling(self, sample: Callable, *arguments: Any, **named: Any) -> torch.Tensor:
        """The host's wrapper `OUTER_SAMPLE`: collect while `sample` runs, unless with another UNet.

        Raises:
            NFQError: a node behind compiled the MODEL.
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
        """Write the calibration so far; what this wrote before is replaced in any case.

        Raises:
            NFQError: nothing was sampled, a file that is another's is there, or it cannot be written.
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
    """What was compiled before hooks came calls them seldom or never."""
    if TORCH_COMPILE_KWARGS in model.model_options:
        raise NFQError("this MODEL is compiled, which hides what its layers are fed; collect without TorchCompileModel")


def collecting(model: Any, hessians: bool, sensitivities: bool) -> Any:
    """A MODEL like `model` that collects while it is sampled, by any sampler; LoRAs may be on it or follow.

    Raises:
        NFQError: the MODEL is packed, quantised otherwise, compiled, or no UNet of the SDXL family.
    """
    unet = model.model.diffusion_model
    if any(map(is_quantized, unet.parameters())):
        raise NFQError(
            "this MODEL is quantised; a calibration is collected from dense weights, so connect the fp16 model's loader"
        )
    _refuse_compiled(model)
    if detect({name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}) is None:
        raise NFQError("this MODEL is no UNet of the SDXL family, which is what NFCollectCalibration takes")
    model = without_dynamic_vram(model)
    clone = model.clone()
    collected = Collected(clone.model.diffusion_model, hessians, sensitivities)
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    clone.remove_wrappers_with_key(kind, COLLECTED)
    clone.add_wrapper_with_key(kind, COLLECTED, collected.around_sampling)
    clone.set_attachments(COLLECTED, collected)
    return clone


def save_calibration(model: Any, filename_prefix: str, overwrite: bool) -> tuple[str, str]:
    """Write what a MODEL collected into the output folder of calibrations.

    Returns:
        The path, and what is to be told of it.

    Raises:
        NFQError: the MODEL collects nothing, or see `Collected.save`.
    """
    collected = model.get_attachment(COLLECTED)
    if collected is None:
        raise NFQError("this MODEL collects nothing; connect the one that NFCollectCalibration gives to the sampler")
    path = target(filename_prefix, CALIBRATIONS, CALIBRATION_SUFFIX)
    collected.save(path, overwrite)
    told = f"{collected.samplings} samplings"
    if collected.samplings == 1:
        told = "one sampling only: queue more, with other prompts; they add up"
    return path, told
