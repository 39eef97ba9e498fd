"""What the nodes ask of the host: its folders, its progress bar, and a MODEL from packed weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..nfq_core import NFQError, NFQFile, NFTensor, UnsupportedFileError, load
from ..nfq_core.container import Source
from ..nfq_core.state import StateDict
from ..nfq_core.unet import detect, ldm_names, what_is_missing
from ..nfq_core.unet_keys import CHECKPOINT_PREFIX
from .ops import NFOps, wrap
from .patcher import NFModelPatcher, adopt

SUFFIX = ".nfq.safetensors"

UNETS = "diffusion_models"
"""The host's folder of files that hold a UNet alone."""

CHECKPOINTS = "checkpoints"
"""The host's folder of files that hold UNet, CLIP and VAE."""

MADE = "nfq"
"""The name under which a MODEL carries its `Made`."""

MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors beside the UNet by which the host tells how a model predicts."""


@dataclass(frozen=True)
class Made:
    """How the packed weights of a MODEL were made; it travels with the MODEL."""

    settings: Mapping[str, Any]
    source: Source
    file_name: str = ""
    """The file they were loaded from; empty where they were quantised in this graph."""
    sqnr: Mapping[str, float] = field(default_factory=dict)
    """Signal-to-quantisation-noise ratio in dB by LDM name, where it was measured."""


def made(model: Any) -> Made | None:
    """How a MODEL's packed weights were made; None for a MODEL that is not ours."""
    return model.get_attachment(MADE) if isinstance(model, NFModelPatcher) else None


def file_names(folder: str) -> list[str]:
    """The names of our files in one of the host's folders, as its own loaders list them."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIX)]


def file_path(folder: str, name: str) -> str:
    """The path of a listed file.

    Raises:
        NFQError: there is none of this name, or it is not one of ours.
    """
    path = folder_paths.get_full_path(folder, name) if name in file_names(folder) else None
    if path is None:
        raise NFQError(f"{name!r} is no {SUFFIX} file in models/{folder}; put it there, or choose another")
    return path


def fingerprint(folder: str, name: str | None) -> str:
    """Changes when the file does; empty for a file that is not there, or whose name another node will give."""
    path = folder_paths.get_full_path(folder, name) if name else None
    if path is None:
        return ""
    facts = os.stat(path)
    return f"{path}|{facts.st_mtime_ns}|{facts.st_size}"


class NodeProgress:
    """The core's progress callback for a node: moves the host's bar, and stops when the user interrupts."""

    def __init__(self) -> None:
        self._bar: comfy.utils.ProgressBar | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        """See `parallel.Progress`."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)


def load_unet(path: str, disable_dynamic: bool = True, progress: NodeProgress | None = None) -> NFModelPatcher:
    """A MODEL from the UNet of one of our files, its weights packed.

    Args:
        path: the file: a UNet alone or a whole checkpoint, of which only the UNet is read.
        disable_dynamic: for the host, which may ask for a model without DynamicVRAM; ours never has it.
        progress: see `NodeProgress`.

    Raises:
        NFQError: the file is missing, damaged, foreign or newer, or its UNet is incomplete or unknown to the host.
    """
    with NFQFile(path) as file:
        names, wanted = _unet_names(file)
        tensors = load(path, wanted, progress=progress or NodeProgress())
        return build_model({names.get(key, key): tensors[key] for key in wanted}, file)


def load_checkpoint(path: str, progress: NodeProgress | None = None) -> tuple[NFModelPatcher, Any, Any]:
    """MODEL, CLIP and VAE from one of our files that holds a whole checkpoint.

    Raises:
        NFQError: as `load_unet`, or there is no CLIP or VAE in the file.
    """
    with NFQFile(path) as file:
        names, wanted = _unet_names(file)
        tensors = load(path, progress=progress or NodeProgress())
        model = build_model({names.get(key, key): tensors[key] for key in wanted}, file)
    for key, name in names.items():
        tensors[CHECKPOINT_PREFIX + name] = tensors.pop(key)
    result = comfy.sd.load_state_dict_guess_config(
        _for_host(tensors),
        output_model=False,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"custom_operations": NFOps},
    )
    clip, vae = result[1:3] if result else (None, None)
    if clip is None or not any(key.startswith("first_stage_model.") for key in tensors):
        raise NFQError(f"{path} holds no CLIP and VAE; move it to models/{UNETS} and use NFQuantizedUNetLoader")
    return model, clip, vae


def _unet_names(file: NFQFile) -> tuple[dict[str, str], list[str]]:
    """The LDM name of every UNet tensor in a file, and all tensors that the host needs for a UNet."""
    shapes = {key: tuple(entry.shape) for key, entry in file.quantized.items()}
    shapes |= {key: tuple(file.entries[key].shape) for key in file.kept}
    info = detect(shapes)
    if info is None:
        raise UnsupportedFileError(f"{file.path} holds no UNet of the SDXL family; choose a quantised SDXL-type model")
    if info.architecture is None:
        missing = what_is_missing(info, shapes)
        if missing or info.layout == "diffusers":
            reason = missing or "its UNet is not of the SDXL family"
            raise UnsupportedFileError(f"{file.path} cannot be used: {reason}; quantise the original again")
    names = ldm_names(info, shapes)
    return names, [*names, *(key for key in MARKERS if key in shapes)]


def _for_host(tensors: Mapping[str, NFTensor | torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: wrap(value) if isinstance(value, NFTensor) else value for key, value in tensors.items()}


def build_model(tensors: StateDict, file: NFQFile) -> NFModelPatcher:
    """A MODEL from a UNet's tensors under their LDM names, and markers; `file` is where they come from."""
    options: dict[str, Any] = {"custom_operations": NFOps}
    if comfy.model_management.unet_dtype(weight_dtype=torch.float16).itemsize == 1:
        # The host's fp8 flags are for dense models: here they would round what is not quantised, and save nothing.
        options["dtype"] = torch.float16
    load_state_dict = comfy.sd.load_diffusion_model_state_dict
    static = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load_state_dict).parameters else {}
    patcher = load_state_dict(_for_host(tensors), model_options=options, **static)
    if patcher is None:
        raise UnsupportedFileError(f"{file.path}: this ComfyUI does not know its architecture; update ComfyUI")
    missing = sorted(patcher.model.diffusion_model.state_dict().keys() - tensors.keys())
    if missing:
        raise UnsupportedFileError(f"{file.path} lacks tensor {missing[0]!r}; quantise the original again")
    model = adopt(patcher)
    model.set_attachments(MADE, Made(file.facts.settings, file.facts.source, os.path.basename(file.path)))
    model.cached_patcher_init = (load_unet, (str(file.path),))
    return model
