"""A file's tensors under the names that a whole LDM checkpoint gives them, packed or dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ..errors import UnsupportedFileError
from ..files.container import NFQFile
from ..models.unet import UNetInfo, detect, diffusers_names, ldm_names, mismatch_message
from ..models.unet_keys import CHECKPOINT_PREFIX
from ..packed.tensor import NFTensor
from ..packed.torch_decode import CHUNK_WEIGHTS, TEMPORARY_BYTES
from ..parallel import ordered_map, threads_for
from .state_dict import StateDict

COMPANIONS = {
    "text encoder": ("conditioner.", "cond_stage_model.", "text_encoders."),
    "VAE": ("first_stage_model.", "vae."),
}
"""What a whole checkpoint holds beside its UNet, and how the names of its tensors may begin."""

MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors beside the UNet by which ComfyUI tells how a model predicts."""


def unet_names(file: NFQFile) -> dict[str, str]:
    """The LDM name, without prefix, of every UNet tensor in a file.

    Raises:
        UnsupportedFileError: there is no UNet of the SDXL family, or an incomplete one.
    """
    info, shapes = _recognised(file)
    if info.architecture is None:
        missing = mismatch_message(info, shapes)
        if missing or info.layout == "diffusers":
            raise _unusable(file, missing)
    return ldm_names(info, shapes)


def diffusers_unet_names(file: NFQFile) -> dict[str, str]:
    """What diffusers calls every UNet tensor in a file.

    Raises:
        UnsupportedFileError: there is no UNet, or one in LDM's layout that is not of the SDXL family or incomplete.
    """
    info, shapes = _recognised(file)
    if info.architecture is None and info.layout != "diffusers":
        raise _unusable(file, mismatch_message(info, shapes))
    return diffusers_names(info, shapes)


def _recognised(file: NFQFile) -> tuple[UNetInfo, dict[str, tuple[int, ...]]]:
    shapes = file.shapes()
    info = detect(shapes)
    if info is None:
        raise UnsupportedFileError(f"{file.path} holds no UNet of the SDXL family; choose a quantised SDXL-type model")
    return info, shapes


def _unusable(file: NFQFile, missing: str) -> UnsupportedFileError:
    reason = missing or "its UNet is not of the SDXL family"
    advice = "fetch its original again and quantise that" if missing else "choose a model of that family"
    return UnsupportedFileError(f"{file.path} cannot be used: {reason}; {advice}")


def checkpoint_names(file: NFQFile) -> dict[str, str]:
    """What a whole LDM checkpoint calls each tensor of a file; all but the UNet's keep their names.

    Raises:
        UnsupportedFileError: as `unet_names`, or two tensors would get the same name.
    """
    unet = unet_names(file)
    names = {key: CHECKPOINT_PREFIX + unet[key] if key in unet else key for key in file.keys()}  # noqa: SIM118
    twice = next((name for name, uses in Counter(names.values()).items() if uses > 1), None)
    if twice is not None:
        raise UnsupportedFileError(
            f"{file.path} holds two tensors that a checkpoint calls {twice!r}; quantise its original with --drop-extras"
        )
    return names


def missing_companions(file: NFQFile) -> list[str]:
    """Those of COMPANIONS that a file lacks: both where it holds a UNet alone."""
    return [part for part, beginnings in COMPANIONS.items() if not any(key.startswith(beginnings) for key in file.kept)]


def dense(
    tensors: StateDict,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """Dequantise a state dict, layer by layer.

    Args:
        tensors: packed and kept tensors by name; each is taken out as it is dealt with, so that memory holds a weight
            either packed or dense.
        device: where the result is to lie; weights are dequantised there.
        dtype: of weights that were packed; fp16 holds them exactly. Kept tensors stay as they are.
    """

    def work(key: str) -> torch.Tensor:
        tensor = tensors.pop(key).to(device)
        return tensor.dequantize(dtype) if isinstance(tensor, NFTensor) else tensor

    keys = list(tensors)
    sizes = {key: tensors[key].numel() * dtype.itemsize for key in keys}
    threads = threads_for(device, CHUNK_WEIGHTS * TEMPORARY_BYTES)
    return dict(zip(keys, ordered_map(work, keys, size=sizes.__getitem__, threads=threads), strict=True))


def renamed(tensors: StateDict, names: Mapping[str, str]) -> StateDict:
    """The same tensors under other names, in the same order."""
    return {names[key]: tensor for key, tensor in tensors.items()}
