"""Writing a packed MODEL, alone or with CLIP and VAE, to a folder that the host lists."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import comfy.cli_args
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch

from ..nfq_core import NFQError, NFTensor, save
from ..nfq_core.models.unet_keys import CHECKPOINT_PREFIX
from .host import BYPASS_LORA, CHECKPOINTS, SUFFIX, UNET, UNETS, NodeProgress, output_path, provenance, refuse_existing
from .ops import is_packed, unwrap

log = logging.getLogger("nfq")

MAX_WORKFLOW_CHARACTERS = 2 << 20
"""Longer workflows are not saved: the page reads only the first 4 MiB of a file, which include other metadata."""


def save_model(
    model: Any, clip: Any, vae: Any, filename_prefix: str, overwrite: bool, workflow: Any = None, prompt: Any = None
) -> str:
    """Write a packed MODEL to an output folder that the loaders list.

    Args:
        model: a MODEL from one of our nodes.
        clip: CLIP of a whole checkpoint, or None.
        vae: VAE of a whole checkpoint, or None.
        filename_prefix: name of the file without its ending, inside `diffusion_models` or `checkpoints`.
        overwrite: whether an existing file may be replaced.
        workflow: the graph in the page's format; written to the header unless the host runs with `--disable-metadata`.
        prompt: the graph in the API format; written as `workflow` is.

    Returns:
        The path of the file, which is written atomically.

    Raises:
        NFQError: the MODEL is not packed or has patches, only one of CLIP and VAE is given, or writing fails.
    """
    facts = provenance(
        model, "this MODEL is not quantised; put NFQ Quantize UNet (NFQuantizeUNet) before Save NFQ Checkpoint"
    )
    if model.patches or model.weight_wrapper_patches or model.get_injections(BYPASS_LORA):
        raise NFQError("a LoRA or merge was added after quantising; apply it before NFQuantizeUNet (NFQ Quantize UNet)")
    if (clip is None) != (vae is None):
        raise NFQError("a whole checkpoint needs both CLIP and VAE; connect both, or neither to save the UNet alone")
    alone = clip is None
    path = output_path(filename_prefix, UNETS if alone else CHECKPOINTS, SUFFIX)
    if not overwrite:
        refuse_existing(path)
    tensors = _unet_tensors(model, "" if alone else CHECKPOINT_PREFIX) | _markers(model)
    if not alone:
        tensors |= _companions(model, clip, vae)
    if comfy.cli_args.args.disable_metadata:
        workflow = prompt = None
    elif len(json.dumps([workflow, prompt])) > MAX_WORKFLOW_CHARACTERS:
        log.warning("the workflow is too long for a file's header; %s is saved without it", path)
        workflow = prompt = None
    save(
        tensors,
        path,
        settings=facts.settings,
        source=facts.source,
        expected=facts.expected,
        workflow=workflow,
        prompt=prompt,
        overwrite=overwrite,
        progress=NodeProgress(),
    )
    return path


def _unet_tensors(model: Any, prefix: str) -> dict[str, NFTensor | torch.Tensor]:
    result = {}
    for key, chain in model.get_key_patches(UNET).items():
        weight = chain[0][0]
        result[prefix + key[len(UNET) :]] = unwrap(weight) if is_packed(weight) else _compact(weight)
    return result


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


def _companions(model: Any, clip: Any, vae: Any) -> dict[str, torch.Tensor]:
    """CLIP and VAE under the key names of stock checkpoints."""
    patched_when_saved = hasattr(clip, "state_dict_for_saving")
    patcher = clip.load_model()
    if patched_when_saved:
        comfy.model_management.load_models_gpu([patcher])
        text = clip.state_dict_for_saving()
    else:
        comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
        text = clip.get_sd()
    config = model.model.model_config
    text = {key: value.to("cpu") for key, value in text.items()}
    return _compacted(config.process_clip_state_dict_for_saving(text)) | _compacted(
        config.process_vae_state_dict_for_saving(vae.get_sd())
    )


def _compacted(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: _compact(value) for key, value in tensors.items()}


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor on the CPU, as fp16 if that is lossless: hosts on a CPU hold fp16 files as fp32."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float32:
        half = tensor.half()
        if torch.equal(half.float(), tensor):
            return half
    return tensor
