"""Quantising a MODEL: a packed copy with the patches baked in and everything else unchanged."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..nfq_core import Calibration, NFQError, NFTensor, Settings
from ..nfq_core.calibration.expectation import expectation
from ..nfq_core.calibration.statistics import measured_sensitivities, recorded_settings
from ..nfq_core.checkpoints.memory import check_device, is_out_of_memory
from ..nfq_core.checkpoints.state_dict import StateDict, quantize_tensors
from ..nfq_core.files.container import BAKED
from ..nfq_core.files.safetensors_io import DTYPE_NAMES, Entry
from ..nfq_core.fitting.quantizer import FIT_DTYPE
from ..nfq_core.planning.policy import plan_tensors
from .host import BYPASS_LORA, COLLECTOR, PROVENANCE, UNET, LayerProgress, Provenance, json_decibels
from .misfits import apply_patches
from .ops import NFOps
from .packed_tensor import wrap
from .patcher import NFModelPatcher, adopt, nf_layers
from .recipe import Origin
from .weights import (
    LAYERS,
    dense,
    is_eight_bit,
    is_host_quantized_linear,
    key_patches,
    quantizable_layers,
    refuse_unsupported_quantization,
    source_dtype,
)

log = logging.getLogger("nfq")

DEVICES = ("auto", "cpu", "gpu")
"""Where to quantise; see `quantizing_device`."""

Result = TypeVar("Result")


def quantize_model(
    model: Any,
    settings: Settings,
    device: str,
    origin: Origin,
    node_id: str | None = None,
    calibration: Calibration | None = None,
) -> NFModelPatcher:
    """Quantise a MODEL with its patches (LoRA, merges) into a new MODEL; the input is not changed.

    Args:
        model: from any stock loader.
        settings: levels and effort.
        device: where to quantise, one of DEVICES.
        origin: where the MODEL came from, recorded with the result.
        node_id: the node that shows the progress on the page.
        calibration: statistics of the layers' inputs, if known.

    Raises:
        NFQError: the MODEL has no layers to quantise, is already quantised or compiled, or has a LoRA that cannot be
            baked in.
    """
    _refuse_unquantizable(model)
    chosen, reason = quantizing_device(device)
    if reason:
        log.info("quantising on the CPU: %s", reason)
    model = without_dynamic_vram(model)
    comfy.model_management.unload_all_models()
    source = origin.hashing()
    sqnr: dict[str, float] = {}
    with model.use_ejected():
        patches = key_patches(model)
        layers = quantizable_layers(model.model.diffusion_model)
        weights = {key[len(UNET) :]: chain[0][0] for key, chain in patches.items()}
        dtype = source_dtype(weights[key] for key in layers if key in weights)
        entries = {key: weight_entry(weight, quantized=key in layers, dtype=dtype) for key, weight in weights.items()}
        measured = measured_sensitivities(entries, settings, calibration)
        info, plans = plan_tensors(entries, settings, measured)
        if not any(plan.format and key in layers for key, plan in plans.items()):
            raise NFQError("this MODEL has no Linear or Conv2d layers that NFQ quantises; use it as it is")

        def layer_facts(key: str) -> dict[str, Any] | None:
            return {"format": plans[key].format.id, "sqnr_db": json_decibels(sqnr[key])} if key in sqnr else None

        def quantized_on(where: torch.device) -> StateDict:
            bake = baker(patches, UNET, where)
            tensors = quantize_tensors(
                entries,
                bake,
                settings,
                device=where,
                progress=LayerProgress(node_id, layer_facts),
                sqnr=sqnr,
                calibration=calibration,
            )
            # Names alone do not tell a layer from a table.
            tables = (key for key, value in tensors.items() if isinstance(value, NFTensor) and key not in layers)
            return tensors | {key: bake(key) for key in tables}

        tensors = on_device(quantized_on, chosen, or_cpu=device == "auto")
        packed = packed_copy(model, model.model.diffusion_model, tensors)
    packed.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, COLLECTOR)
    packed.remove_attachments(COLLECTOR)
    expected = expectation(entries, settings, info, plans, calibration)
    recorded = recorded_settings(settings, calibration) | ({BAKED: list(origin.baked)} if origin.baked else {})
    packed.set_attachments(PROVENANCE, Provenance(recorded, source(), expected=expected, sqnr=sqnr))
    return packed


def quantizing_device(choice: str) -> tuple[torch.device, str]:
    """The device that a choice means: "cpu", "gpu" for the host's device, or "auto" for that if it can quantise.

    Returns:
        The device, and the reason if "auto" means the CPU although the host has another device.

    Raises:
        NFQError: "gpu", and the host has no other device than the CPU, or one that cannot quantise.
    """
    device, cpu = comfy.model_management.get_torch_device(), torch.device("cpu")
    if choice == "gpu" and device.type == "cpu":
        raise NFQError("this ComfyUI runs on the CPU; set device to auto")
    if choice == "cpu" or device.type == "cpu":
        return cpu, ""
    try:
        check_device(device, FIT_DTYPE)
    except NFQError as error:
        if choice == "gpu":
            raise
        return cpu, str(error)
    return device, ""


def on_device(work: Callable[[torch.device], Result], device: torch.device, *, or_cpu: bool) -> Result:
    """The result of work on a device; if that runs out of memory and `or_cpu` is true, of the same on the CPU."""
    try:
        return work(device)
    except Exception as error:
        if not or_cpu or device.type == "cpu" or not is_out_of_memory(error):
            raise
    log.warning("%s has too little free memory to quantise, so the CPU does it; this takes longer", device)
    return work(torch.device("cpu"))


def _refuse_unquantizable(model: Any) -> None:
    if any(True for _ in nf_layers(model.model)):
        raise NFQError("this MODEL is quantised already; connect the loader of the fp16 model to NFQ Quantize Model")
    if model.get_injections(BYPASS_LORA):
        raise NFQError("Load LoRA (Bypass) works only after NFQ Quantize Model; before it, use Load LoRA")
    if TORCH_COMPILE_KWARGS in model.model_options:
        raise NFQError("this MODEL is compiled already; put TorchCompileModel after NFQ Quantize Model")
    refuse_unsupported_quantization(model.model)
    if model.get_attachment(PROVENANCE) is not None:
        log.warning("this MODEL was dequantised from a quantised file; quantising its original gives better quality")
    if any(map(is_eight_bit, model.model.parameters())):
        log.warning("this MODEL has 8-bit weights; quantising the fp16 or bf16 model gives better quality")


def without_dynamic_vram(model: Any) -> Any:
    """A MODEL's or CLIP's patcher as the host's static one, whose weights are in memory.

    DynamicVRAM may leave them on disk.

    Raises:
        NFQError: the model's loader cannot load it without DynamicVRAM.
    """
    if not getattr(model, "is_dynamic", bool)():
        return model
    if model.cached_patcher_init is None:
        raise NFQError(
            "this model's loader cannot load it without DynamicVRAM; load it with a stock loader, or start ComfyUI "
            "with --disable-dynamic-vram"
        )
    return model.clone(disable_dynamic=True)


def weight_entry(weight: torch.Tensor, *, quantized: bool, dtype: torch.dtype = torch.float16) -> Entry:
    """Describe a weight; fp32 is recorded as `dtype`.

    Args:
        weight: the weight.
        quantized: whether its layer can be packed.
        dtype: see `source_dtype`.
    """
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else dtype
    floating = weight.dtype.is_floating_point and quantized
    return Entry(DTYPE_NAMES[dtype if floating else weight.dtype], tuple(weight.shape), 0, 0)


def baker(patches: Mapping[str, Any], prefix: str, device: torch.device) -> Callable[[str], torch.Tensor]:
    """Return a function that gives a weight by name, with its patches applied.

    Args:
        patches: see `key_patches`.
        prefix: what the function adds to a name.
        device: where patches are applied.
    """

    def bake(key: str) -> torch.Tensor:
        (weight, convert), *rest = patches[prefix + key]
        weight = dense(weight)
        if not rest:
            return weight
        copied = convert(weight.to(device=device, dtype=torch.float32, copy=True), inplace=True)
        return apply_patches(rest, copied, prefix + key)

    return bake


def packed_copy(model: Any, network: torch.nn.Module, tensors: StateDict) -> NFModelPatcher:
    """A patcher like `model`, around a copy of its model with new weights.

    Args:
        model: the static patcher of a MODEL or a CLIP.
        network: the part of its model that has these weights.
        tensors: weights by name in `network`, packed or dense.
    """
    original = model.model
    config = getattr(original, "model_config", None)
    memo: dict[int, Any] = {id(getattr(original, "current_patcher", None)): None, id(config): config}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        if key in parameters:
            parameter = parameters[key]
            kept = None if isinstance(value, NFTensor) else value.to("cpu", parameter.dtype, copy=True)
            memo[id(parameter)] = None if kept is None else torch.nn.Parameter(kept, requires_grad=False)
    memo |= _without_host_quantization(network, memo)
    copied = copy.deepcopy(original, memo)
    path = next(name for name, module in original.named_modules() if module is network)
    for key, module in quantizable_layers(copied.get_submodule(path)).items():
        if isinstance(tensors.get(key), NFTensor):
            module.__class__ = next(ours for base, ours in LAYERS.items() if isinstance(module, base))
            module.weight = torch.nn.Parameter(wrap(tensors[key], parameters[key].dtype), requires_grad=False)
            module.dense_device = None
            vars(module).pop("comfy_cast_weights", None)
    copied.to(model.offload_device)
    copied.device = model.offload_device

    packed = model.clone()
    packed.model = copied
    # A clone shares these with its original, whose model they describe.
    packed.patches, packed.backup, packed.backup_buffers, packed.object_patches_backup = {}, {}, {}, {}
    packed.hook_backup, packed.current_hooks = {}, None
    packed.additional_models.pop("multigpu", None)
    packed.pinned, packed.parent, packed.cached_patcher_init, packed.size = set(), None, None, 0
    packed.patches_uuid, packed.clone_base_uuid = uuid.uuid4(), uuid.uuid4()
    return adopt(packed)


def _without_host_quantization(network: torch.nn.Module, parameters: Mapping[int, Any]) -> dict[int, torch.nn.Module]:
    """For `deepcopy`: a plain Linear for each of the host's Linear layers with quantised weights, by the layer's `id`.

    Args:
        network: the network with the host's layers.
        parameters: the copy's parameters by the `id` of the original's; None if the weight will be packed.
    """
    memo = {}
    for module in network.modules():
        if is_host_quantized_linear(module):
            plain = NFOps.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight = parameters.get(id(module.weight))
            plain.weight = plain.weight if weight is None else weight
            plain.bias = None if module.bias is None else parameters[id(module.bias)]
            memo[id(module)] = plain
    return memo
