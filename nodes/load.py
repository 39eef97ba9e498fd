"""A MODEL, CLIP and VAE from one of our files."""

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
from .host import MADE, UNETS, Made, NodeProgress
from .ops import NFOps, wrap
from .patcher import adopt

log = logging.getLogger("nfq")


def load_unet(
    path: str, memory: str = "packed", disable_dynamic: bool = False, progress: NodeProgress | None = None
) -> ModelPatcher:
    """A MODEL from the UNet of one of our files.

    Args:
        path: the file: a UNet alone or a whole checkpoint, of which only the UNet is read.
        memory: "packed"; "resident": a stock MODEL, its weights dequantised; "auto": one of them, by free memory.
        disable_dynamic: for the host, which may ask for a model without DynamicVRAM; packed ones never have it.
        progress: see `NodeProgress`.

    Raises:
        NFQError: the file is missing, damaged, foreign or newer, or its UNet is incomplete or unknown to the host.
    """
    with NFQFile(path) as file:
        names, wanted = _unet_names(file)
        mode = _memory_mode(memory, file)
        tensors = load_tensors(file, wanted, memory=mode, progress=progress or NodeProgress())
        return build_model({names.get(key, key): tensors[key] for key in wanted}, file, mode, disable_dynamic)


def load_checkpoint(
    path: str, memory: str = "packed", progress: NodeProgress | None = None
) -> tuple[ModelPatcher, Any, Any]:
    """MODEL, CLIP and VAE from one of our files that holds a whole checkpoint; `memory` as in `load_unet`.

    As from a stock loader, what the file lacks of CLIP and VAE fails where it is used.

    Raises:
        NFQError: as `load_unet`, or there is neither CLIP nor VAE in the file.
    """
    with NFQFile(path) as file:
        names, wanted = _unet_names(file)
        mode = _memory_mode(memory, file)
        tensors = load_tensors(file, memory=mode, progress=progress or NodeProgress())
        model = build_model({names.get(key, key): tensors[key] for key in wanted}, file, mode)
    clip, vae = _clip_and_vae(names, tensors)
    if clip is None and getattr(vae, "first_stage_model", None) is None:
        raise NFQError(f"{path} holds no CLIP and VAE; move it to models/{UNETS} and use NFQuantizedUNetLoader")
    for part, reload in ((clip, load_clip_patcher), (vae, load_vae_patcher)):
        if getattr(part, "patcher", None) is not None:
            part.patcher.cached_patcher_init = (reload, (path,))
    return model, clip, vae


def load_clip_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """The patcher of a file's CLIP, for hosts that ask for one without DynamicVRAM, or for a second device."""
    return _companions_of(path, disable_dynamic)[0].patcher


def load_vae_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """As `load_clip_patcher`, of its VAE."""
    return _companions_of(path, disable_dynamic)[1].patcher


def _companions_of(path: str, disable_dynamic: bool) -> tuple[Any, Any]:
    with NFQFile(path) as file:
        names, _ = _unet_names(file)
        shapes = {key: torch.empty(entry.shape, device="meta") for key, entry in file.quantized.items()}
        kept = [key for key in file.keys() if key not in shapes]  # noqa: SIM118
        return _clip_and_vae(names, shapes | load_tensors(file, kept), disable_dynamic)


def _clip_and_vae(names: Mapping[str, str], tensors: StateDict, disable_dynamic: bool = False) -> tuple[Any, Any]:
    """CLIP and VAE from a checkpoint's tensors; `names` are the UNet's, of which the host looks at shapes only."""
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
    """What makes the host's loaders return a patcher without DynamicVRAM, on hosts that have it."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}


def _unet_names(file: NFQFile) -> tuple[dict[str, str], list[str]]:
    """The LDM name of every UNet tensor in a file, and all tensors that the host needs for a UNet."""
    names = unet_names(file)
    return names, [*names, *(key for key in MARKERS if key in file.kept)]


def _memory_mode(memory: str, file: NFQFile) -> str:
    """Whether a file's weights are to be "packed" or "resident"."""
    management = comfy.model_management
    device, cpu = management.get_torch_device(), torch.device("cpu")
    weights = sum(entry.weights for entry in file.quantized.values())
    dtype = management.unet_dtype(model_params=weights, weight_dtype=torch.float16)
    free = min(management.get_free_memory(device), management.get_free_memory(cpu))
    mode, reason = choose_memory_mode(memory, weights * dtype.itemsize, needed_bytes(file)[1], free)
    log.info("%s is loaded %s: %s", file.path.name, mode, reason)
    return mode


def build_model(tensors: StateDict, file: NFQFile, mode: str, disable_dynamic: bool = False) -> ModelPatcher:
    """A MODEL from a UNet's tensors under their LDM names, and markers.

    Args:
        tensors: quantised weights are packed, or, where `mode` is "resident", dense.
        file: where they come from.
        mode: what the MODEL is to be; a "resident" one is the host's own.
        disable_dynamic: whether a resident one must do without DynamicVRAM.
    """
    load_state_dict = comfy.sd.load_diffusion_model_state_dict
    options: dict[str, Any] = {} if mode == "resident" else {"custom_operations": NFOps}
    if mode == "packed" and comfy.model_management.unet_dtype(weight_dtype=torch.float16).itemsize == 1:
        # The host's fp8 flags are for dense models: here they would round what is not quantised, and save nothing.
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
            f"{file.path} has a tensor of a wrong shape{mismatch} Quantise the model again, from its original file"
        ) from None
    if patcher is None:
        raise UnsupportedFileError(
            f"{file.path}: this ComfyUI does not know its architecture; update ComfyUI, or choose another model"
        )
    missing = sorted(patcher.model.diffusion_model.state_dict().keys() - tensors.keys())
    if missing:
        raise UnsupportedFileError(
            f"{file.path} lacks tensor {missing[0]!r}; fetch its original again and quantise that"
        )
    if mode == "packed":
        adopt(patcher)
    patcher.set_attachments(MADE, Made(file.facts.settings, file.facts.source, os.path.basename(file.path)))
    patcher.cached_patcher_init = (load_unet, (str(file.path), mode))
    return patcher
