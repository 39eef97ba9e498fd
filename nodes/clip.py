"""CLIPs with packed text encoders: how they act in the host, how they are quantised, and what a file stores of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..nfq_core import NFQError, NFTensor, Settings
from ..nfq_core.checkpoints.state_dict import StateDict, quantize_tensors
from ..nfq_core.files.container import BAKED
from ..nfq_core.files.safetensors_io import Entry
from ..nfq_core.models.text_encoders import find_text_encoders, owner_finder
from ..nfq_core.packed.rows import split_rows
from ..nfq_core.planning.settings import TEXT_ENCODERS_SETTING
from .bake import baker, packed_copy, weight_entry, without_dynamic_vram
from .host import BYPASS_LORA, PROVENANCE, NodeProgress, Provenance
from .ops import NFLayer
from .packed_tensor import is_packed, unwrap
from .patcher import NFModelPatcher, adopt, dense_weight, nf_layers
from .recipe import Origin
from .weights import key_patches, quantizable_layers, refuse_unsupported_quantization

_OPEN_CLIP_QUERY = re.compile(r"clip_[gh]\..*\.self_attn\.(q)_proj\.weight")
"""The host's name of the weight for queries in OpenCLIP, whose files store queries, keys and values as one weight."""

NO_CLIP = "there is no CLIP; load text encoders with Load NFQ CLIP, Load CLIP or DualCLIPLoader"


class PackedCLIP(comfy.sd.CLIP):
    """A CLIP with packed weights, which stock nodes save dense."""

    def clone(self, *args: Any, **kwargs: Any) -> PackedCLIP:
        """Copy as the host does; a copy keeps this class."""
        clone = super().clone(*args, **kwargs)
        clone.__class__ = PackedCLIP
        return clone

    def get_sd(self) -> dict[str, torch.Tensor]:
        """The host's state dict, with packed weights dequantised and patched."""
        layers = nf_layers(self.cond_stage_model)
        return super().get_sd() | {key: dense_weight(layer, key=key).cpu() for key, layer in layers}


class MissingCLIP:
    """Stands for a CLIP that a checkpoint lacks: every use raises NFQError with one message."""

    def __init__(self, message: str) -> None:
        self._message = message

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NFQError(self._message)

    tokenize = clone = load_model = add_patches = clip_layer = get_key_patches = get_sd = _refuse
    cond_stage_model = tokenizer = property(_refuse)


def adopt_clip(clip: comfy.sd.CLIP) -> PackedCLIP:
    """Turn a new CLIP with packed weights into a `PackedCLIP`, whose patcher never changes them.

    The host tolerates weights that a file lacks, such as a projection that nothing reads: they become zero.
    """
    for layer in clip.cond_stage_model.modules():
        if isinstance(layer, NFLayer):
            layer.fill_missing()
    adopt(clip.patcher)
    clip.__class__ = PackedCLIP
    return clip


def is_packed_clip(clip: Any) -> bool:
    """Whether a CLIP has packed weights.

    Raises:
        NFQError: there is no CLIP.
    """
    if isinstance(clip, MissingCLIP):
        clip.load_model()
    if clip is None:
        raise NFQError(NO_CLIP)
    return isinstance(clip.patcher, NFModelPatcher)


def quantize_clip(
    clip: Any, bits: str, origin: Origin, effort: str = "fast", progress: NodeProgress | None = None
) -> PackedCLIP:
    """Quantise a CLIP's text encoders with their patches into a new CLIP; the input is not changed.

    Queries, keys and values of OpenCLIP are quantised as one weight, because files store them so.

    Args:
        clip: from any stock loader.
        bits: "8bit" or "5bit".
        origin: where the CLIP came from, recorded with the result.
        effort: see `Settings`.
        progress: see `NodeProgress`.

    Raises:
        NFQError: there is no CLIP, it is quantised already, it has an adapter that cannot be baked in, or its text
            encoders are of an unknown kind.
    """
    if is_packed_clip(clip):
        raise NFQError("this CLIP is quantised already; connect the loader of the original to NFQ Quantize CLIP")
    if clip.patcher.get_injections(BYPASS_LORA):
        raise NFQError("Load LoRA (Bypass) works only after NFQ Quantize CLIP; before it, use Load LoRA")
    patcher = without_dynamic_vram(clip.patcher)
    refuse_unsupported_quantization(patcher.model)
    comfy.model_management.unload_all_models()
    source = origin.hashing()
    with patcher.use_ejected():
        patches = key_patches(patcher, "")
        bake = baker(patches, "", torch.device("cpu"))
        layers = quantizable_layers(patcher.model)
        entries = {key: weight_entry(chain[0][0], quantized=True) for key, chain in patches.items() if key in layers}
        encoders = find_text_encoders({key: entry.shape for key, entry in entries.items()})
        if not encoders:
            raise NFQError("NFQ does not know these text encoders; use this CLIP as it is")
        owner = owner_finder(encoders)
        entries, groups = _fused({key: entry for key, entry in entries.items() if owner(key)})

        def read(key: str) -> torch.Tensor:
            return torch.cat([bake(part) for part in groups[key]]) if key in groups else bake(key)

        quantized = quantize_tensors(
            entries,
            read,
            Settings(effort=effort, text_encoders=bits),
            device="cpu",
            progress=progress or NodeProgress(),
        )
        quantized = _separated(quantized, groups)
        tensors = {key: bake(key) for key in patches if key not in quantized} | quantized
        packed = packed_copy(patcher, patcher.model, tensors)
    recorded = {TEXT_ENCODERS_SETTING: bits} | ({BAKED: list(origin.baked)} if origin.baked else {})
    packed.set_attachments(PROVENANCE, Provenance(recorded, source()))
    result = clip.clone()
    result.patcher, result.cond_stage_model = packed, packed.model
    return adopt_clip(result)


def _fused(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    """Entries with queries, keys and values of OpenCLIP as one weight, and the names of its parts by its name."""
    groups = {}
    for key, entry in entries.items():
        match = _OPEN_CLIP_QUERY.fullmatch(key)
        if match:
            names = [f"{key[: match.start(1)]}{part}{key[match.end(1) :]}" for part in "qkv"]
            if all(name in entries and entries[name].shape == entry.shape for name in names):
                groups[key] = names
    parts = {name for names in groups.values() for name in names}
    fused = {}
    for key, entry in entries.items():
        if key in groups:
            rows, *rest = entry.shape
            fused[key] = Entry(entry.dtype, (3 * rows, *rest), 0, 0)
        elif key not in parts:
            fused[key] = entry
    return fused, groups


def _separated(tensors: StateDict, groups: Mapping[str, list[str]]) -> StateDict:
    """Undo `_fused` after quantising."""
    result = {}
    for key, value in tensors.items():
        if key in groups:
            parts = split_rows(value, 3) if isinstance(value, NFTensor) else value.chunk(3)
            result |= dict(zip(groups[key], parts, strict=True))
        else:
            result[key] = value
    return result


def stored_tensors(clip: PackedCLIP) -> StateDict:
    """The tensors of a packed CLIP by the host's names, packed weights bit for bit.

    Raises:
        NFQError: it has patches.
    """
    patcher = clip.patcher
    if patcher.patches or patcher.weight_wrapper_patches or patcher.get_injections(BYPASS_LORA):
        raise NFQError("a LoRA or merge was added to a quantised CLIP; apply it before NFQ Quantize CLIP")
    weights = {key: chain[0][0] for key, chain in patcher.get_key_patches("").items()}
    tensors = {key: unwrap(value) if is_packed(value) else value for key, value in weights.items()}
    return tensors | clip.tokenizer.state_dict()
