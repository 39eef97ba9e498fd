"""Writing a packed MODEL, alone or with CLIP and VAE, or a packed CLIP to a folder that the host lists."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import comfy.cli_args
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch

from ..nfq_core import BitsPerWeight, NFQError, NFTensor, Settings, save
from ..nfq_core.checkpoints.state_dict import StateDict
from ..nfq_core.models.text_encoders import find_text_encoders
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from ..nfq_core.packed.rows import join_rows
from ..nfq_core.planning.settings import TEXT_ENCODERS_SETTING
from .clip import is_packed_clip, quantize_clip, stored_tensors
from .host import (
    BYPASS_LORA,
    CHECKPOINTS,
    PROVENANCE,
    SUFFIX,
    TEXT_ENCODERS,
    UNET,
    UNETS,
    NodeProgress,
    Provenance,
    output_path,
    provenance,
    refuse_existing,
)
from .naming import default_name
from .packed_tensor import is_packed, unwrap
from .recipe import Origin

log = logging.getLogger("nfq")

MAX_WORKFLOW_CHARACTERS = 2 << 20
"""Longer workflows are not saved: the page reads only the first 4 MiB of a file, which include other metadata."""


AUTO = "auto"
"""The choice that lets the MODEL's size decide how text encoders are stored."""


def save_model(
    model: Any,
    clip: Any,
    vae: Any,
    filename_prefix: str,
    overwrite: bool,
    text_encoders: str = AUTO,
    workflow: Any = None,
    prompt: Any = None,
) -> str:
    """Write a packed MODEL to an output folder that the loaders list.

    Args:
        model: a MODEL from one of our nodes.
        clip: CLIP of a whole checkpoint, or None. A quantised one is stored as it is.
        vae: VAE of a whole checkpoint, or None.
        filename_prefix: name of the file without its ending, inside `diffusion_models` or `checkpoints`; if it is
            empty, see `naming.default_name`.
        overwrite: whether an existing file may be replaced.
        text_encoders: how a dense CLIP is stored: AUTO, "8bit", "5bit" or "keep".
        workflow: the graph in the page's format; written to the header unless the host runs with `--disable-metadata`.
        prompt: the graph in the API format; written as `workflow` is.

    Returns:
        The path of the file, which is written atomically.

    Raises:
        NFQError: the MODEL is not packed or has patches, only one of CLIP and VAE is given, or writing fails.
    """
    facts = provenance(
        model, "this MODEL is not quantised; put NFQ Quantize Model (NFQuantizeUNet) before Save NFQ Checkpoint"
    )
    if model.patches or model.weight_wrapper_patches or model.get_injections(BYPASS_LORA):
        raise NFQError(
            "a LoRA or merge was added after quantising; apply it before NFQ Quantize Model (NFQuantizeUNet)"
        )
    refuse_half(clip is not None, vae is not None)
    alone = clip is None
    name = filename_prefix.strip() or default_name(facts.source.name, facts.settings)
    path = model_path(name, alone, overwrite)
    settings = dict(facts.settings)
    if not alone and not is_packed_clip(clip):
        bits = _text_encoder_bits(settings) if text_encoders == AUTO else text_encoders
        settings[TEXT_ENCODERS_SETTING] = bits
        if bits != "keep":
            clip = quantize_clip(clip, bits, Origin(), settings.get("effort", "fast"))
    elif not alone:
        settings |= _text_encoder_setting(clip)
    tensors = _model_tensors(model, "" if alone else CHECKPOINT_PREFIX) | _markers(model)
    if not alone:
        tensors |= _companions(model, clip, vae)
    made = Provenance(settings, facts.source, expected=facts.expected)
    return _write(tensors, path, made, overwrite, workflow, prompt)


def refuse_half(has_clip: bool, has_vae: bool) -> None:
    """Raise NFQError for a checkpoint with only one of CLIP and VAE."""
    if has_clip != has_vae:
        raise NFQError("a whole checkpoint needs both CLIP and VAE; connect both, or neither to save the UNet alone")


def model_path(filename_prefix: str, alone: bool, overwrite: bool) -> str:
    """The path of a new file of a MODEL.

    Args:
        filename_prefix: as the user typed it.
        alone: whether it holds a UNet without CLIP and VAE.
        overwrite: whether an existing file may be replaced.

    Raises:
        NFQError: the file exists, or see `host.output_path`.
    """
    path = output_path(filename_prefix, UNETS if alone else CHECKPOINTS, SUFFIX)
    if not overwrite:
        refuse_existing(path)
    return path


def save_clip(clip: Any, filename_prefix: str, overwrite: bool, workflow: Any = None, prompt: Any = None) -> list[str]:
    """Write each text encoder of a packed CLIP to a file of its own in the output folder of text encoders.

    Args:
        clip: a CLIP from one of our nodes.
        filename_prefix: name of the file without its ending; several files get the text encoder's name added.
        overwrite: see `save_model`, also for `workflow` and `prompt`.

    Returns:
        The paths of the files.

    Raises:
        NFQError: the CLIP is not packed or has patches, or writing fails.
    """
    if not is_packed_clip(clip):
        raise NFQError("this CLIP is not quantised; put NFQ Quantize CLIP before Save NFQ CLIP")
    encoders = _by_encoder(stored_tensors(clip))
    prefix = filename_prefix.removesuffix(SUFFIX)
    names = {name: prefix if len(encoders) == 1 else f"{prefix}_{name}" for name in encoders}
    paths = {name: output_path(chosen, TEXT_ENCODERS, SUFFIX) for name, chosen in names.items()}
    for path in () if overwrite else paths.values():
        refuse_existing(path)
    made = clip.patcher.get_attachment(PROVENANCE)
    return [_write(encoders[name], path, made, overwrite, workflow, prompt) for name, path in paths.items()]


def _by_encoder(tensors: StateDict) -> dict[str, StateDict]:
    """Tensors of each text encoder by the host's name for it, named as in its own file; the first gets the rest."""
    found = find_text_encoders({key: tuple(value.shape) for key, value in tensors.items()})
    encoders: dict[str, StateDict] = {encoder.prefix.partition(".")[0]: {} for encoder in found}
    first = next(iter(encoders))
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        if name in encoders:
            encoders[name][rest.removeprefix("transformer.")] = value
        else:
            encoders[first][key] = value
    return {name: _compacted(own) for name, own in encoders.items()}


def _write(tensors: StateDict, path: str, made: Provenance, overwrite: bool, workflow: Any, prompt: Any) -> str:
    """Write a file; returns its path."""
    if comfy.cli_args.args.disable_metadata:
        workflow = prompt = None
    elif len(json.dumps([workflow, prompt])) > MAX_WORKFLOW_CHARACTERS:
        log.warning("the workflow is too long for a file's header; %s is saved without it", path)
        workflow = prompt = None
    save(
        tensors,
        path,
        settings=made.settings,
        source=made.source,
        expected=made.expected,
        workflow=workflow,
        prompt=prompt,
        overwrite=overwrite,
        progress=NodeProgress(),
    )
    return path


def _model_tensors(model: Any, prefix: str) -> dict[str, NFTensor | torch.Tensor]:
    weights = {prefix + key[len(UNET) :]: chain[0][0] for key, chain in model.get_key_patches(UNET).items()}
    packed = {key: unwrap(weight) for key, weight in weights.items() if is_packed(weight)}
    dtype = torch.bfloat16 if any(value.dtype == torch.bfloat16 for value in packed.values()) else torch.float16
    return {key: packed[key] if key in packed else _compact(weight, dtype) for key, weight in weights.items()}


def _markers(model: Any) -> dict[str, torch.Tensor]:
    """The tensors by which the host recognises a model's kind of prediction when it loads the file."""
    latents = model.get_model_object("latent_format")
    if isinstance(latents, comfy.latent_formats.SDXL_Playground_2_5):
        return {"edm_mean": latents.latents_mean.clone(), "edm_std": latents.latents_std.clone()}
    sampling = model.get_model_object("model_sampling")
    predicts_v = isinstance(sampling, comfy.model_sampling.V_PREDICTION) and not isinstance(
        sampling, comfy.model_sampling.EDM
    )
    if predicts_v and isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
        return {
            "edm_vpred.sigma_max": torch.tensor(float(sampling.sigma_max)),
            "edm_vpred.sigma_min": torch.tensor(float(sampling.sigma_min)),
        }
    if predicts_v or model.model.model_type == comfy.model_base.ModelType.V_PREDICTION:
        return {"v_pred": torch.tensor([])} | ({"ztsnr": torch.tensor([])} if getattr(sampling, "zsnr", False) else {})
    return {}


def _text_encoder_bits(settings: Mapping[str, Any]) -> str:
    """How text encoders are stored next to a UNet of these recorded settings."""
    bits = settings.get("target_bpw")
    return (Settings(BitsPerWeight(bits)) if bits else Settings()).text_encoder_bits


def _text_encoder_setting(clip: Any) -> dict[str, Any]:
    """How a packed CLIP is stored, as recorded settings; empty if it is not known."""
    made = clip.patcher.get_attachment(PROVENANCE)
    return {key: value for key, value in made.settings.items() if key == TEXT_ENCODERS_SETTING}


def _companions(model: Any, clip: Any, vae: Any) -> StateDict:
    """CLIP and VAE under the key names of stock checkpoints."""
    config = model.model.model_config
    if is_packed_clip(clip):
        text = _renamed(config.process_clip_state_dict_for_saving, stored_tensors(clip))
    else:
        text = config.process_clip_state_dict_for_saving(_dense_clip(clip))
    return _compacted(text) | _compacted(config.process_vae_state_dict_for_saving(vae.get_sd()))


def _dense_clip(clip: Any) -> dict[str, torch.Tensor]:
    """The tensors of a dense CLIP, with its patches, by the host's names."""
    patched_when_saved = hasattr(clip, "state_dict_for_saving")
    patcher = clip.load_model()
    if patched_when_saved:
        comfy.model_management.load_models_gpu([patcher])
        text = clip.state_dict_for_saving()
    else:
        comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
        text = clip.get_sd()
    return {key: value.to("cpu") for key, value in text.items()}


def _renamed(rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tensors: StateDict) -> StateDict:
    """Packed and dense tensors, renamed by the host, which joins the rows of some.

    The host gets a column of numbers for each packed weight, so the result shows which weights it joined.

    Args:
        rename: a function of the host for dense tensors, none of which is fp64.
        tensors: by the names that it takes.
    """
    packed = [value for value in tensors.values() if isinstance(value, NFTensor)]
    numbers = {id(value): float(number) for number, value in enumerate(packed)}
    columns = {
        key: torch.full((value.shape[0], 1), numbers[id(value)], dtype=torch.float64)
        for key, value in tensors.items()
        if isinstance(value, NFTensor)
    }
    result: StateDict = {}
    dequantized = 0
    for key, value in rename(tensors | columns).items():
        if value.dtype != torch.float64:
            result[key] = value
            continue
        parts = [packed[int(number)] for number in value[:, 0].unique_consecutive()]
        joined = parts[0] if len(parts) == 1 else join_rows(parts)
        dequantized += joined is None
        result[key] = torch.cat([part.dequantize(part.dtype) for part in parts]) if joined is None else joined
    if dequantized:
        log.warning(
            "%d weights of the CLIP were quantised in parts that a checkpoint joins, and are saved dequantised; "
            "quantise the original checkpoint for a smaller file",
            dequantized,
        )
    return result


def _compacted(tensors: StateDict) -> StateDict:
    return {key: value if isinstance(value, NFTensor) else _compact(value) for key, value in tensors.items()}


def _compact(tensor: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A dense tensor on the CPU, in a 16-bit dtype if that is lossless: hosts on a CPU hold such files as fp32."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float32:
        half = tensor.to(dtype)
        if torch.equal(half.float(), tensor):
            return half
    return tensor
