"""Loading MODEL, CLIP and VAE from one of our files."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ..nfq_core import NFQError, NFQFile, NFTensor, UnsupportedFileError
from ..nfq_core.checkpoints.memory import choose_memory_mode, needed_bytes
from ..nfq_core.checkpoints.state_dict import StateDict, load_tensors
from ..nfq_core.checkpoints.whole_checkpoint import MARKERS, unet_names
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from ..nfq_core.packed.backends import warm_up
from ..nfq_core.planning.settings import of_unet
from .host import PROVENANCE, UNETS, NodeProgress, Provenance
from .ops import NFOps, wrap
from .patcher import adopt

log = logging.getLogger("nfq")


def load_unet(
    path: str, memory: str = "packed", disable_dynamic: bool = False, progress: NodeProgress | None = None
) -> ModelPatcher:
    """Load the UNet of one of our files as a MODEL.

    Args:
        path: a file with a UNet or a whole checkpoint; only its UNet is read.
        memory: "packed"; "resident": a stock MODEL with dequantised weights; "auto": either, depending on free memory.
        disable_dynamic: whether the host wants a model without DynamicVRAM; packed models never use it.
        progress: see `NodeProgress`.

    Raises:
        NFQError: the file is missing, damaged, foreign or newer, or its UNet is incomplete or unknown to the host.
    """
    with NFQFile(path) as file:
        names, wanted = _unet_names(file)
        mode = _memory_mode(memory, file, names)
        tensors = load_tensors(file, wanted, memory=mode, progress=progress or NodeProgress())
        return build_model({names.get(key, key): tensors[key] for key in wanted}, file, mode, disable_dynamic)


def load_checkpoint(
    path: str, memory: str = "packed", progress: NodeProgress | None = None
) -> tuple[ModelPatcher, Any, Any]:
    """Load MODEL, CLIP and VAE from a whole checkpoint of ours; arguments as for `load_unet`.

    As with a stock loader, a missing CLIP or VAE fails only when it is used.

    Raises:
        NFQError: as `load_unet`, or the file contains neither CLIP nor VAE.
    """
    with NFQFile(path) as file:
        names, wanted = _unet_names(file)
        mode = _memory_mode(memory, file, names)
        dense = set(_companion_keys(file, names))
        tensors = load_tensors(file, memory=mode, dense=dense, progress=progress or NodeProgress())
        model = build_model({names.get(key, key): tensors[key] for key in wanted}, file, mode)
    clip, vae = _clip_and_vae(names, tensors)
    if clip is None and getattr(vae, "first_stage_model", None) is None:
        raise NFQError(
            f"{path} contains neither CLIP nor VAE; move it to models/{UNETS} and use Load NFQ Diffusion Model"
        )
    for part, reload in ((clip, load_clip_patcher), (vae, load_vae_patcher)):
        if getattr(part, "patcher", None) is not None:
            part.patcher.cached_patcher_init = (reload, (path,))
    return model, clip, vae


def load_clip_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """Load the patcher of a file's CLIP again, when the host wants it without DynamicVRAM or for a second device."""
    return _companions_of(path, disable_dynamic)[0].patcher


def load_vae_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """Load the patcher of a file's VAE again, as `load_clip_patcher`."""
    return _companions_of(path, disable_dynamic)[1].patcher


def _companions_of(path: str, disable_dynamic: bool) -> tuple[Any, Any]:
    with NFQFile(path) as file:
        names, _ = _unet_names(file)
        shapes = {key: torch.empty(shape, device="meta") for key, shape in file.shapes().items() if key in names}
        others = load_tensors(file, _companion_keys(file, names), memory="resident")
        return _clip_and_vae(names, shapes | others, disable_dynamic)


def _companion_keys(file: NFQFile, names: Mapping[str, str]) -> list[str]:
    """The tensors of CLIP, VAE and the rest, which the host holds dense; `names` lists the UNet's."""
    return [key for key in file.keys() if key not in names]  # noqa: SIM118


def _clip_and_vae(names: Mapping[str, str], tensors: StateDict, disable_dynamic: bool = False) -> tuple[Any, Any]:
    """Make CLIP and VAE from a checkpoint's tensors; `names` lists the UNet's, whose shapes the host needs."""
    unet = {
        CHECKPOINT_PREFIX + name: torch.empty(tensors[key].shape, dtype=tensors[key].dtype, device="meta")
        for key, name in names.items()
    }
    others = {key: value for key, value in tensors.items() if key not in names}
    load_parts = comfy.sd.load_state_dict_guess_config
    result = load_parts(
        unet | others,
        output_model=False,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        **(_static(load_parts) if disable_dynamic else {}),
    )
    return result[1:3] if result else (None, None)


def _static(load: Callable) -> dict[str, bool]:
    """The argument that makes a host's loader return a patcher without DynamicVRAM, on hosts that have DynamicVRAM."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}


def _unet_names(file: NFQFile) -> tuple[dict[str, str], list[str]]:
    """LDM names of a file's UNet tensors by key, and the keys of all tensors that the host needs for a UNet."""
    names = unet_names(file)
    return names, [*names, *(key for key in MARKERS if key in file.kept)]


def _memory_mode(memory: str, file: NFQFile, names: Mapping[str, str]) -> str:
    """Choose between "packed" and "resident" for the UNet's weights, and log the choice; `names` lists the UNet's."""
    management = comfy.model_management
    device, cpu = management.get_torch_device(), torch.device("cpu")
    weights = sum(entry.weights for key, entry in file.quantized.items() if key in names)
    dtype = management.unet_dtype(model_params=weights, weight_dtype=torch.float16)
    free = min(management.get_free_memory(device), management.get_free_memory(cpu))
    mode, reason = choose_memory_mode(memory, weights * dtype.itemsize, needed_bytes(file, names)[1], free)
    log.info("%s is loaded %s: %s", file.path.name, mode, reason)
    return mode


def build_model(tensors: StateDict, file: NFQFile, mode: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Make a MODEL from a UNet's tensors.

    Args:
        tensors: the UNet's tensors by LDM name, and markers; quantised weights are dense if `mode` is "resident".
        file: the file that the tensors come from.
        mode: "packed", or "resident" for a stock MODEL.
        disable_dynamic: whether a resident MODEL must not use DynamicVRAM.

    Raises:
        UnsupportedFileError: a tensor is missing or has the wrong shape, or the host does not know the architecture.
    """
    load_state_dict = comfy.sd.load_diffusion_model_state_dict
    options: dict[str, Any] = {} if mode == "resident" else {"custom_operations": NFOps}
    if mode == "packed" and comfy.model_management.unet_dtype(weight_dtype=torch.float16).itemsize == 1:
        # The host's fp8 flags are for dense models: here they would only round the few tensors that are not quantised.
        options["dtype"] = torch.float16
    static = _static(load_state_dict) if mode == "packed" or disable_dynamic else {}
    wrapped = {key: wrap(value) if isinstance(value, NFTensor) else value for key, value in tensors.items()}
    try:
        patcher = load_state_dict(wrapped, model_options=options, **static)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        mismatch = str(error).partition("size mismatch")[2].partition("\n")[0]
        raise UnsupportedFileError(
            f"{file.path} has a tensor of the wrong shape{mismatch} Quantise the model again from its original file"
        ) from None
    if patcher is None:
        raise UnsupportedFileError(
            f"{file.path}: this ComfyUI does not know its architecture; update ComfyUI, or choose another model"
        )
    missing = sorted(patcher.model.diffusion_model.state_dict().keys() - tensors.keys())
    if missing:
        raise UnsupportedFileError(
            f"{file.path} lacks tensor {missing[0]!r}; download the original model again and quantise it"
        )
    if mode == "packed":
        adopt(patcher)
        warm_up(patcher.load_device, patcher.model.manual_cast_dtype or patcher.model.get_dtype())
    facts = file.facts
    made = Provenance(of_unet(facts.settings), facts.source, os.path.basename(file.path), facts.expected)
    patcher.set_attachments(PROVENANCE, made)
    patcher.cached_patcher_init = (load_unet, (str(file.path), mode))
    return patcher
