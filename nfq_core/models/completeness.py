"""Whether a file's diffusion model is complete, and which loaders cannot load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .families import find_family, missing_from_blocks
from .unet import UNKNOWN, Difference, UNetInfo, mismatch_message, nearest
from .unet_keys import CHECKPOINT_PREFIX, KNOWN_ARCHITECTURES, Layout, UNetArchitecture

HOST_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
"""Other models whose UNets ComfyUI loads under LDM's names, by the width of their text tokens."""

_ENDINGS: tuple[tuple[Layout, str, str], ...] = (
    ("prefixed", CHECKPOINT_PREFIX, "output_blocks."),
    ("ldm", "", "output_blocks."),
    ("diffusers", "", "up_blocks."),
)
"""Layout, prefix and beginning of the up path's names, which a UNet has and a ControlNet lacks."""

_HALVES = (("input_blocks", "output_blocks"), ("down_blocks", "up_blocks"))
"""Down path and up path, which every UNet has, in LDM's layout and in diffusers'."""

_MAX_DIFFERENCES = 100
"""Tensors in which an unrecognised UNet may differ from a known architecture, which has 564 or more."""

ADDED = ("label_emb", "add_embedding")
"""Names of the embedding of pooled text and picture size; UNets of other families have none."""


def missing_tensors_message(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> str:
    """Name the first tensor that an incomplete diffusion model lacks, and the number of others.

    A UNet that lacks all tensors of some kind is another architecture, not incomplete. A model of another family lacks
    what one of its blocks misses, although the blocks before and after have it.

    Args:
        info: result of `detect`. None may mean that the missing tensor is one that `detect` needs.
        shapes: shape of each tensor of the file by name.

    Returns:
        The message; empty for a complete model and for a file without one.
    """
    model = None if info else find_family(shapes)
    if model:
        missing = missing_from_blocks(model, shapes)
        more = f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        return f"tensor {missing[0]!r} of {model.family.name} is missing{more}" if missing else ""
    if info is None:
        candidates = (_message(info, shapes, _MAX_DIFFERENCES) for info in _possible_unets(shapes))
        return next(filter(None, candidates), "")
    return _message(info, shapes) if info.architecture is None else ""


def _possible_unets(shapes: Mapping[str, Sequence[int]]) -> Iterator[UNetInfo]:
    """The UNets that `detect` might find if the file were complete."""
    for layout, prefix, ending in _ENDINGS:
        if any(key.startswith(prefix + ending) for key in shapes):
            yield UNetInfo(layout, prefix, None)


def _message(info: UNetInfo, shapes: Mapping[str, Sequence[int]], limit: int | None = None) -> str:
    """`missing_tensors_message`; with `limit`, only for a known architecture with at most that many differences."""
    difference = nearest(info, shapes)
    if limit is not None and (difference is None or difference.name == UNKNOWN or difference.count > limit):
        return ""
    if difference is None:
        keys = {key[len(info.prefix) :].partition(".")[0] for key in shapes if key.startswith(info.prefix)}
        absent = next((half for half in _HALVES[info.layout == "diffusers"] if half not in keys), None)
        return f"all tensors {info.prefix + absent + '.*'!r} of the UNet are missing" if absent else ""
    missing = _missing_by_damage(info, difference, shapes)
    if not missing:
        return ""
    whose = "the" if difference.name == UNKNOWN else f"{difference.name}'s"
    more = f", and {len(difference.missing) - 1:,} more" if len(difference.missing) > 1 else ""
    return f"tensor {missing[0]!r} of {whose} UNet is missing{more}"


def unet_warnings(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Warnings about a complete UNet that some loaders cannot load, and about tensors that are not part of it."""
    if info is None:
        return []
    if info.architecture is not None:
        if info.name != UNKNOWN or _host_knows(info.architecture):
            return []
        return [
            "the UNet has SDXL's structure, but ComfyUI and the web UIs load no model of its sizes; "
            "diffusers' `load_unet` takes the result"
        ]
    diffusers = info.layout == "diffusers"
    difference = nearest(info, shapes)
    if difference and difference.unexpected and not (difference.missing or difference.misshapen):
        whose = "the" if difference.name == UNKNOWN else f"{difference.name}'s"
        others = f" and {len(difference.unexpected) - 1:,} more are" if len(difference.unexpected) > 1 else " is"
        refusal = "only diffusers' `load_unet` may take the result" if diffusers else "loaders may refuse the result"
        return [f"tensor {difference.unexpected[0]!r}{others} not part of {whose} UNet; {refusal}"]
    reason = mismatch_message(info, shapes)
    why = f": {reason}" if reason else ""
    if diffusers:
        return [
            f"the UNet is not of the SDXL family and has diffusers' names{why}; only diffusers' `load_unet` takes the "
            "result, for ComfyUI quantise the same model with LDM's names"
        ]
    if not reason and context_width(shapes) in HOST_WIDTHS:
        return []
    return [
        f"the UNet is not of the SDXL family{why}; "
        + ("no loader takes the result" if reason else "ComfyUI takes the result only if it knows its architecture")
    ]


def context_width(shapes: Mapping[str, Sequence[int]]) -> int:
    """Width of the text tokens that a UNet's cross-attention reads; 0 without cross-attention."""
    return next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and shape), 0)


def _host_knows(architecture: UNetArchitecture) -> bool:
    """Whether ComfyUI recognises a UNet by the few sizes that it checks; it takes all others from the file."""

    def checked_sizes(each: UNetArchitecture) -> tuple:
        depths = tuple(depth for level in each.down_depths for depth in level)
        return each.channels[0], depths, each.context_width, each.added_width

    return checked_sizes(architecture) in map(checked_sizes, KNOWN_ARCHITECTURES)


def _missing_by_damage(info: UNetInfo, difference: Difference, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The missing keys that another architecture cannot explain.

    Either the UNet has such a tensor elsewhere, or a whole part of the UNet is missing.
    """
    if not difference.missing:
        return []
    keys = [key for key in shapes if key.startswith(info.prefix)]
    kinds, modules = set(map(_without_numbers, keys)), {key.rpartition(".")[0] for key in keys}
    parts = _parts(info, keys)
    return [
        key
        for key in difference.missing
        if _without_numbers(key) in kinds
        or key.rpartition(".")[0] in modules
        or (parts.isdisjoint(_parts(info, [key])) and not key[len(info.prefix) :].startswith(ADDED))
    ]


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+", "0", key)


def _parts(info: UNetInfo, keys: Iterable[str]) -> set[str]:
    return {key[len(info.prefix) :].partition(".")[0] for key in keys}
