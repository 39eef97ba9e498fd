"""A packed copy of a MODEL: its patches baked in, everything else about it kept."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.patcher_extension
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..nfq_core import Calibration, NFQError, NFTensor, Settings
from ..nfq_core.calibration.statistics import measured_sensitivities, recorded_settings
from ..nfq_core.checkpoints.memory import check_device
from ..nfq_core.checkpoints.state_dict import StateDict, quantize_tensors
from ..nfq_core.files.container import BAKED
from ..nfq_core.files.safetensors_io import DTYPE_NAMES, Entry
from ..nfq_core.fitting.quantizer import FIT_DTYPE
from ..nfq_core.planning.policy import plan_tensors
from .host import BYPASS_LORA, COLLECTED, MADE, UNET, LayerProgress, Made, finite
from .ops import NFOps, wrap
from .patcher import NFModelPatcher, adopt, nf_layers
from .recipe import Origin
from .weights import (
    LAYERS,
    dense,
    has_eight_bits,
    is_host_quantized_linear,
    key_patches,
    quantizable_layers,
    refuse_other_forms,
)

log = logging.getLogger("nfq")


def quantize_model(
    model: Any,
    settings: Settings,
    device: torch.device | None,
    origin: Origin,
    node_id: str | None = None,
    calibration: Calibration | None = None,
) -> NFModelPatcher:
    """Quantise a MODEL's UNet, its patches (LoRA, merges) baked in, into a new MODEL; the old one stays as it is.

    Args:
        model: from any stock loader.
        settings: levels and effort.
        device: where to quantise; None: on the CPU.
        origin: what it came from, for the record.
        node_id: the node to whose place on the page progress belongs.
        calibration: what the model's layers are fed; None: not known.

    Raises:
        NFQError: the MODEL is no UNet of the SDXL family, is quantised or compiled already, or a LoRA of it cannot be
            baked in.
    """
    _refuse_unfit(model)
    if device is not None:
        check_device(device, FIT_DTYPE)
    model = without_dynamic_vram(model)
    comfy.model_management.unload_all_models()
    source = origin.hashing()
    sqnr: dict[str, float] = {}
    with model.use_ejected():
        patches = key_patches(model)
        layers = quantizable_layers(model.model.diffusion_model)
        entries = {key: _entry(key, chain[0][0], layers) for key, chain in _without_prefix(patches).items()}
        measured = measured_sensitivities(entries, settings, calibration)
        info, plans = plan_tensors(entries, settings, measured)
        if info is None or any(plan.format and key not in layers for key, plan in plans.items()):
            raise NFQError("this MODEL is no UNet of the SDXL family, which is what NFQuantizeUNet takes")

        def told(key: str) -> dict[str, Any] | None:
            return {"format": plans[key].format.id, "sqnr_db": finite(sqnr[key])} if key in sqnr else None

        tensors = quantize_tensors(
            entries,
            _baker(patches, device or torch.device("cpu")),
            settings,
            device=device or "cpu",
            progress=LayerProgress(node_id, told),
            sqnr=sqnr,
            calibration=calibration,
        )
        packed = _packed_twin(model, tensors)
    packed.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, COLLECTED)
    packed.remove_attachments(COLLECTED)
    recorded = recorded_settings(settings, calibration) | ({BAKED: list(origin.baked)} if origin.baked else {})
    packed.set_attachments(MADE, Made(recorded, source(), sqnr=sqnr))
    return packed


def _refuse_unfit(model: Any) -> None:
    if any(True for _ in nf_layers(model.model)):
        raise NFQError("this MODEL is quantised already; connect the fp16 model's loader to NFQuantizeUNet instead")
    if model.get_injections(BYPASS_LORA):
        raise NFQError("LoraLoaderBypass works behind NFQuantizeUNet only; load a LoRA before it with LoraLoader")
    if TORCH_COMPILE_KWARGS in model.model_options:
        raise NFQError("this MODEL is compiled already; put TorchCompileModel behind NFQuantizeUNet")
    refuse_other_forms(model.model)
    if model.get_attachment(MADE) is not None:
        log.warning("this MODEL was quantised before and dequantised when it was loaded; its original has more to keep")
    if any(map(has_eight_bits, model.model.parameters())):
        log.warning("this MODEL's weights have 8 bits; quantising it from fp16 or bf16 keeps more of the picture")


def without_dynamic_vram(model: Any) -> Any:
    """The same MODEL on the host's static patcher: the weights of the dynamic one need not be in memory.

    Raises:
        NFQError: the MODEL's loader cannot load it so.
    """
    if not getattr(model, "is_dynamic", bool)():
        return model
    if model.cached_patcher_init is None:
        raise NFQError(
            "this MODEL's loader cannot load it without DynamicVRAM; load it with a stock loader, or start ComfyUI "
            "with --disable-dynamic-vram"
        )
    return model.clone(disable_dynamic=True)


def _without_prefix(patches: Mapping[str, Any]) -> dict[str, Any]:
    return {key[len(UNET) :]: value for key, value in patches.items()}


def _entry(key: str, weight: torch.Tensor, layers: Mapping[str, torch.nn.Module]) -> Entry:
    """Describe a weight; hosts without fp16 arithmetic hold fp16 files as fp32, which is not recorded."""
    dtype = torch.float16 if weight.dtype != torch.bfloat16 else weight.dtype
    floating = weight.dtype.is_floating_point and key in layers
    return Entry(DTYPE_NAMES[dtype if floating else weight.dtype], tuple(weight.shape), 0, 0)


def _baker(patches: Mapping[str, Any], device: torch.device) -> Callable[[str], torch.Tensor]:
    def bake(key: str) -> torch.Tensor:
        (weight, convert), *rest = patches[UNET + key]
        weight = dense(weight)
        if not rest:
            return weight
        copied = convert(weight.to(device=device, dtype=torch.float32, copy=True), inplace=True)
        return comfy.lora.calculate_weight(rest, copied, UNET + key)

    return bake


def _packed_twin(model: Any, tensors: StateDict) -> NFModelPatcher:
    """A patcher like `model` around a copy of its model that has `tensors` for weights."""
    original = model.model
    config = original.model_config
    memo: dict[int, Any] = {id(getattr(original, "current_patcher", None)): None, id(config): config}
    parameters = dict(original.diffusion_model.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        if key in parameters:
            parameter = parameters[key]
            kept = None if isinstance(value, NFTensor) else value.to("cpu", parameter.dtype, copy=True)
            memo[id(parameter)] = None if kept is None else torch.nn.Parameter(kept, requires_grad=False)
    memo |= _without_host_quantization(original.diffusion_model, memo)
    twin = copy.deepcopy(original, memo)
    for key, module in quantizable_layers(twin.diffusion_model).items():
        if isinstance(tensors[key], NFTensor):
            module.__class__ = next(ours for base, ours in LAYERS.items() if isinstance(module, base))
            module.weight = torch.nn.Parameter(wrap(tensors[key], parameters[key].dtype), requires_grad=False)
            module.dense_device = None
            vars(module).pop("comfy_cast_weights", None)
    twin.to(model.offload_device)
    twin.device = model.offload_device

    packed = model.clone()
    packed.model = twin
    # What a clone shares with its original belongs to the original's model.
    packed.patches, packed.backup, packed.backup_buffers, packed.object_patches_backup = {}, {}, {}, {}
    packed.hook_backup, packed.current_hooks = {}, None
    packed.additional_models.pop("multigpu", None)
    packed.pinned, packed.parent, packed.cached_patcher_init, packed.size = set(), None, None, 0
    packed.patches_uuid, packed.clone_base_uuid = uuid.uuid4(), uuid.uuid4()
    return adopt(packed)


def _without_host_quantization(unet: torch.nn.Module, parameters: Mapping[int, Any]) -> dict[int, torch.nn.Module]:
    """For `deepcopy`: a plain Linear in place of each of the host's for quantised weights, by the latter's `id`.

    Args:
        unet: holds the host's layers.
        parameters: the twin's parameters by the `id` of the original's; None where the weight will be packed.
    """
    memo = {}
    for module in unet.modules():
        if is_host_quantized_linear(module):
            twin = NFOps.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight = parameters.get(id(module.weight))
            twin.weight = twin.weight if weight is None else weight
            twin.bias = None if module.bias is None else parameters[id(module.bias)]
            memo[id(module)] = twin
    return memo
