"""What a safetensors file is, told by its tensors' names and shapes, for people who wonder what lies in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..files.article import is_article_file
from ..files.container import FACTS_KEY
from ..files.original import Original
from ..files.safetensors_io import Entry
from ..models.completeness import HOST_WIDTHS, context_width, missing_tensors_message
from ..models.unet import UNKNOWN, UNetInfo
from ..planning.policy import DEFAULTS, plan_tensors
from .whole_checkpoint import COMPANIONS

_TRAITS = {
    "ControlNet": r"^(control_model|controlnet)\.|controlnet_cond_embedding|input_hint_block|controlnet_down_blocks",
    "LoRA": r"(^|[._])(lora|hada|lokr|oft|dora)[._]|\.diff(_b)?$",
    "IP-Adapter": r"^(image_proj|ip_adapter)[._]",
    "T2I-Adapter": r"^(adapter\.)?body\.\d+\.(block1|resnets|in_conv)\.",
    "video model": r"motion_modules\.|temporal_transformer|time_stack",
    "Flux-type model": r"(^|\.)double_blocks\.\d",
    "Stable Diffusion 3-type model": r"(^|\.)joint_blocks\.\d",
    "VAE": r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.conv_(in|out)\.weight$",
    "CLIP vision encoder": r"^(vision_model|visual)\.",
    "text encoder": r"text_model\.(encoder|embeddings)\.|(^|\.)resblocks\.\d|^encoder\.block\.\d+\.layer\.",
    "upscaler": r"(^|\.)(rdb\d|RDB\d|conv_first|conv_hr|HRconv)\.",
    "embedding": r"^(emb_params|clip_[lgh])$",
}
"""Names of tensors by which files are told that hold no UNet, as patterns; the first that is found counts."""

_TOKEN_WIDTHS = (768, 1024, 1280)
"""Widths of the tokens of SDXL's text encoders and its predecessors': an embedding is a few such rows and no more."""


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Args:
        name: in a few words.
        is_family_unet: whether it holds a UNet of SDXL's structure, complete.
        obstacle: why it cannot, or need not, be quantised, whatever it is; empty where it can.
    """

    name: str
    is_family_unet: bool = False
    obstacle: str = ""


def kind_of(file: Original) -> Kind:
    """Tell what an open file is; only its header is looked at."""
    if FACTS_KEY in file.metadata:
        return Kind("quantised file", obstacle="it is one of ours already")
    if is_article_file(file.entries):
        return Kind("the article's file", obstacle="`nfq import-article` converts it")
    info, plans = plan_tensors(file.entries, DEFAULTS)
    lost = missing_tensors_message(info, {key: entry.shape for key, entry in file.entries.items()})
    if lost:
        return Kind(f"incomplete UNet ({lost})", obstacle="fetch it, or make the merge, again")
    name = _name(file.entries, info)
    if not any(plan.format for plan in plans.values()):
        return Kind(name, obstacle="there is nothing in it to quantise")
    return Kind(name, is_family_unet=info is not None and info.architecture is not None)


def _name(entries: Mapping[str, Entry], info: UNetInfo | None) -> str:
    if info is not None and info.architecture is not None:
        family = info.name if info.name != UNKNOWN else "SDXL-like"
        companions = tuple(beginning for beginnings in COMPANIONS.values() for beginning in beginnings)
        return f"{family} checkpoint" if any(key.startswith(companions) for key in entries) else f"{family} UNet"
    names = "\n".join(entries)
    found = next((kind for kind, trait in _TRAITS.items() if re.search(trait, names, re.MULTILINE)), None)
    if info is not None and found in (None, "VAE", "text encoder"):
        return _foreign_unet(entries, info)
    if found is None and len(entries) <= 2:
        # Only now: whatever has a name of its own is told by that.
        shapes = [entry.shape for entry in entries.values()]
        if shapes and all(len(shape) in (1, 2) and shape[-1] in _TOKEN_WIDTHS for shape in shapes):
            return "embedding"
    return found or "file of an unknown kind"


def _foreign_unet(entries: Mapping[str, Entry], info: UNetInfo) -> str:
    """What a UNet is that SDXL's structure does not describe."""
    width = context_width({key: entry.shape for key, entry in entries.items()})
    return f"{HOST_WIDTHS[width]} model" if width in HOST_WIDTHS else "UNet that is not of the SDXL family"
