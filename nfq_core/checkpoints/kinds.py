"""Recognise what a safetensors file is from its tensors' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import command
from ..files.article import is_article_file
from ..files.container import FACTS_KEY
from ..files.original import Original
from ..files.safetensors_io import Entry
from ..models.completeness import missing_tensors_message
from ..models.components import model_name
from ..models.text_encoders import find_text_encoders
from ..models.unet import UNKNOWN, UNetInfo
from ..planning.policy import plan_tensors
from ..planning.settings import DEFAULTS
from .whole_checkpoint import COMPANIONS

_KEY_PATTERNS = {
    "ControlNet": r"^(control_model|controlnet)\.|controlnet_cond_embedding|input_hint_block|controlnet_down_blocks",
    "LoRA": r"(^|[._])(lora|hada|lokr|oft|dora)[._]|\.diff(_b)?$",
    "IP-Adapter": r"^(image_proj|ip_adapter)[._]",
    "T2I-Adapter": r"^(adapter\.)?body\.\d+\.(block1|resnets|in_conv)\.",
    "video model": r"motion_modules\.|temporal_transformer|time_stack",
    "VAE": r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.conv_(in|out)\.weight$",
    "CLIP vision encoder": r"^(vision_model|visual)\.",
    "text encoder": r"text_model\.(encoder|embeddings)\.|(^|\.)resblocks\.\d|^encoder\.block\.\d+\.layer\.",
    "upscaler": r"(^|\.)(rdb\d|RDB\d|conv_first|conv_hr|HRconv)\.",
    "embedding": r"^(emb_params|clip_[lgh])$",
}
"""Patterns of keys that identify files without a known diffusion model; the first match counts."""

NO_MODELS = {
    "LoRA": "it is a LoRA, which loaders add to a quantised model as it is",
    "VAE": "it is a VAE, which stays as it is next to a quantised model",
}
"""Kinds of files that are not quantised, and why."""

_TOKEN_WIDTHS = (768, 1024, 1280)
"""Token widths of the text encoders of SDXL and its predecessors; an embedding has only a few rows of such a width."""


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Args:
        name: what it is, in a few words.
        is_family_unet: whether it holds a complete UNet of the SDXL family.
        obstacle: why it cannot or need not be quantised; empty if it can.
    """

    name: str
    is_family_unet: bool = False
    obstacle: str = ""


def kind_of(file: Original) -> Kind:
    """Recognise an open file by its header."""
    if FACTS_KEY in file.metadata:
        return Kind("quantised file", obstacle="it is an NFQ file already")
    if is_article_file(file.entries):
        return Kind("the article's file", obstacle=f"{command('import-article')} converts it")
    info, plans = plan_tensors(file.entries, DEFAULTS)
    lost = missing_tensors_message(info, {key: entry.shape for key, entry in file.entries.items()})
    if lost:
        return Kind(
            f"incomplete {'UNet' if 'UNet' in lost else 'model'} ({lost})",
            obstacle="fetch it, or make the merge, again",
        )
    name = kind_name(file.entries, info)
    if name in NO_MODELS:
        return Kind(name, obstacle=NO_MODELS[name])
    if name == "embedding" or not any(plan.format for plan in plans.values()):
        return Kind(name, obstacle="it has no weights to quantise")
    return Kind(name, is_family_unet=info is not None and info.architecture is not None)


def kind_name(entries: Mapping[str, Entry], info: UNetInfo | None) -> str:
    """What a file is, in a few words.

    Args:
        entries: its tensors by name.
        info: the UNet that was detected; None for a file without one.
    """
    shapes = {key: entry.shape for key, entry in entries.items()}
    model = model_name(info, shapes)
    if info is not None and info.architecture is not None:
        family = "SDXL-like" if model == UNKNOWN else model
        companions = tuple(prefix for prefixes in COMPANIONS.values() for prefix in prefixes)
        return f"{family} checkpoint" if any(key.startswith(companions) for key in entries) else f"{family} UNet"
    if info is None and model != UNKNOWN:
        return f"{model} model"
    encoders = find_text_encoders(shapes)
    names = "\n".join(entries)
    kind = next((kind for kind, pattern in _KEY_PATTERNS.items() if re.search(pattern, names, re.MULTILINE)), None)
    if info is not None and kind in (None, "VAE", "text encoder"):
        return "UNet that is not of the SDXL family" if model == UNKNOWN else f"{model} model"
    if encoders and kind in (None, "text encoder", "CLIP vision encoder"):
        return f"text encoder ({', '.join(encoder.name for encoder in encoders)})"
    if kind is None and len(entries) <= 2:
        # Shapes are a weak sign, so key patterns come first.
        shapes = [entry.shape for entry in entries.values()]
        if shapes and all(len(shape) in (1, 2) and shape[-1] in _TOKEN_WIDTHS for shape in shapes):
            return "embedding"
    return kind or "file of an unknown kind"
