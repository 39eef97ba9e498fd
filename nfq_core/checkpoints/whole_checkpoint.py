"""Names and tensors of a file as a whole LDM checkpoint has them, packed or dequantised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ..errors import UnsupportedFileError
from ..files.container import NFQFile
from ..models.completeness import missing_tensors_message
from ..models.components import VAE_PREFIXES, find_components
from ..models.text_encoders import TextEncoder, find_text_encoders
from ..models.unet import UNKNOWN, UNetInfo, detect, diffusers_names, ldm_names, mismatch_message
from ..models.unet_keys import CHECKPOINT_PREFIX
from ..packed.tensor import NFTensor
from ..packed.torch_decode import MAX_TEMPORARY_BYTES
from ..parallel import ordered_map, threads_for
from .state_dict import StateDict

COMPANIONS = {
    "text encoder": ("conditioner.", "cond_stage_model.", "text_encoders."),
    "VAE": VAE_PREFIXES,
}
"""The other models in a whole checkpoint, with the prefixes that their keys may have."""

MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Keys next to the UNet's from which ComfyUI detects a model's prediction type."""


def unet_names(file: NFQFile) -> dict[str, str]:
    """LDM name, without prefix, of every UNet tensor in a file, by key.

    Raises:
        UnsupportedFileError: the file has no complete UNet of the SDXL family.
    """
    info, shapes = _recognised(file)
    if info.architecture is None:
        missing = mismatch_message(info, shapes)
        if missing or info.layout == "diffusers":
            raise _unusable(file, missing)
    return ldm_names(info, shapes)


def host_names(file: NFQFile) -> dict[str, str]:
    """Name for ComfyUI of every tensor of a file's diffusion model, by key.

    These are LDM's names for a UNet. Other models keep their names, without the prefix that a checkpoint adds.

    Raises:
        UnsupportedFileError: the file has no diffusion model, or an incomplete one.
    """
    shapes = file.shapes()
    info = detect(shapes)
    if info is not None and (info.architecture is not None or info.layout != "diffusers"):
        return unet_names(file)
    components = find_components(info, shapes)
    models = [each for each in components if each.kind in ("diffusion model", "other")]
    model = next((each for each in models if any(key in file.quantized for key in each.keys)), None)
    if model is None:
        raise _without(file, "diffusion model", "diffusion model")
    missing = missing_tensors_message(info, shapes)
    if missing:
        raise _unusable(file, missing)
    prefix = info.prefix if info else model.family.prefix if model.family else ""
    if not prefix and any(key.startswith(CHECKPOINT_PREFIX) for key in model.keys):
        prefix = CHECKPOINT_PREFIX
    return {key: key[len(prefix) :] for key in model.keys if key.startswith(prefix)}


def diffusers_unet_names(file: NFQFile) -> dict[str, str]:
    """diffusers' name of every UNet tensor in a file, by key.

    Raises:
        UnsupportedFileError: the file has no UNet, or one in the LDM layout that is incomplete or not of the family.
    """
    info, shapes = _recognised(file)
    if info.architecture is None and info.layout != "diffusers":
        raise _unusable(file, mismatch_message(info, shapes))
    return diffusers_names(info, shapes)


def _recognised(file: NFQFile) -> tuple[UNetInfo, dict[str, tuple[int, ...]]]:
    shapes = file.shapes()
    info = detect(shapes)
    if info is None:
        raise _without(file, "UNet of the SDXL family", "SDXL-type model")
    return info, shapes


def _without(file: NFQFile, wanted: str, choice: str) -> UnsupportedFileError:
    encoders = find_text_encoders(file.shapes())
    if encoders:
        return UnsupportedFileError(
            f"{file.path} is a text encoder ({_names(encoders)}), not a diffusion model; it belongs in "
            "models/text_encoders, where Load NFQ CLIP finds it"
        )
    return UnsupportedFileError(f"{file.path} has no {wanted}; choose a quantised {choice}")


def _unusable(file: NFQFile, missing: str) -> UnsupportedFileError:
    reason = missing or "its UNet is not of the SDXL family"
    advice = "fetch its original again and quantise that" if missing else "choose a model of that family"
    return UnsupportedFileError(f"{file.path} cannot be used: {reason}; {advice}")


def checkpoint_names(file: NFQFile) -> dict[str, str]:
    """Name in a whole LDM checkpoint of every tensor in a file, by key; only the UNet's names change.

    Raises:
        UnsupportedFileError: the file has no complete UNet of the SDXL family, or two tensors would get one name.
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
    """The COMPANIONS that a file lacks: both, if it holds only a UNet."""
    keys = file.keys()
    return [part for part, prefixes in COMPANIONS.items() if not any(key.startswith(prefixes) for key in keys)]


def text_encoders_of(file: NFQFile) -> list[TextEncoder]:
    """The text encoders in a file, at least one, in the order of its tensors.

    Raises:
        UnsupportedFileError: the file has none.
    """
    shapes = file.shapes()
    encoders = find_text_encoders(shapes)
    if not encoders:
        info = detect(shapes)
        if info is None:
            raise UnsupportedFileError(
                f"{file.path} has no text encoder of a known kind; choose a quantised CLIP, T5 or language model"
            )
        model = f"a UNet ({info.name})" if info.name != UNKNOWN else "a UNet"
        raise UnsupportedFileError(
            f"{file.path} is {model}, not a text encoder; it belongs in models/diffusion_models, where Load NFQ "
            "Diffusion Model finds it"
        )
    return encoders


def _names(encoders: list[TextEncoder]) -> str:
    return " and ".join(encoder.name for encoder in encoders)


def dequantize_state_dict(
    tensors: StateDict,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """Dequantise a state dict, layer by layer.

    Args:
        tensors: packed and kept tensors by name. Each is removed once it is dequantised, so that memory never holds
            both forms of all weights.
        device: device of the result; weights are dequantised there.
        dtype: dtype of dequantised weights; fp16 represents them exactly. Kept tensors keep their dtype.
    """

    def work(key: str) -> torch.Tensor:
        tensor = tensors.pop(key).to(device)
        return tensor.dequantize(dtype) if isinstance(tensor, NFTensor) else tensor

    keys = list(tensors)
    sizes = {key: tensors[key].numel() * dtype.itemsize for key in keys}
    threads = threads_for(device, MAX_TEMPORARY_BYTES)
    return dict(zip(keys, ordered_map(work, keys, size=sizes.__getitem__, threads=threads), strict=True))


def rename_tensors(tensors: StateDict, names: Mapping[str, str]) -> StateDict:
    """The same tensors under the names that `names` has for their keys, in the same order."""
    return {names[key]: tensor for key, tensor in tensors.items()}
