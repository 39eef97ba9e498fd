"""Whether a file's UNet is whole, and which loaders will not take it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .unet import UNKNOWN, Likeness, UNetInfo, mismatch_message, nearest
from .unet_keys import CHECKPOINT_PREFIX, KNOWN_ARCHITECTURES, Layout, UNetArchitecture

HOST_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
"""Other models whose UNets ComfyUI loads under LDM's names, by the width of the text tokens that they read."""

_ENDINGS: tuple[tuple[Layout, str, str], ...] = (
    ("prefixed", CHECKPOINT_PREFIX, "output_blocks."),
    ("ldm", "", "output_blocks."),
    ("diffusers", "", "up_blocks."),
)
"""The layouts of complete UNets, their prefixes, and their second halves, which ControlNets lack."""

_HALVES = (("input_blocks", "output_blocks"), ("down_blocks", "up_blocks"))
"""Parts without which there is no UNet, in LDM's layout and diffusers'."""

_MOSTLY_WHOLE = 100
"""So many of a known architecture's tensors, 564 and more, may differ in a UNet that was not recognised."""

ADDED = ("label_emb", "add_embedding")
"""Where pooled text and picture size enter a UNet; UNets of other families do without."""


def missing_tensors_message(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> str:
    """Names the first tensor that an incomplete UNet lacks, and how many more; empty for a whole UNet or none.

    A UNet without any tensor of some kind is another architecture, not an incomplete one. Where none was recognised, a
    tensor by which it is recognised may be what is missing.
    """
    if info is None:
        return next(
            filter(None, (_missing_in_words(info, shapes, _MOSTLY_WHOLE) for info in _unrecognised(shapes))), ""
        )
    return _missing_in_words(info, shapes) if info.architecture is None else ""


def _unrecognised(shapes: Mapping[str, Sequence[int]]) -> Iterator[UNetInfo]:
    """What `detect` might have found, were the file complete."""
    for layout, prefix, ending in _ENDINGS:
        if any(key.startswith(prefix + ending) for key in shapes):
            yield UNetInfo(layout, prefix, None)


def _missing_in_words(info: UNetInfo, shapes: Mapping[str, Sequence[int]], limit: int | None = None) -> str:
    """See `missing_tensors_message`; `limit`: how many tensors of a known architecture may differ."""
    found = nearest(info, shapes)
    if limit is not None and (found is None or found.name == UNKNOWN or found.differences > limit):
        return ""
    if found is None:
        keys = {key[len(info.prefix) :].partition(".")[0] for key in shapes if key.startswith(info.prefix)}
        gone = next((half for half in _HALVES[info.layout == "diffusers"] if half not in keys), None)
        return f"all tensors {info.prefix + gone + '.*'!r} of the UNet are missing" if gone else ""
    lost = _lost(info, found, shapes)
    if not lost:
        return ""
    whose = "the" if found.name == UNKNOWN else f"{found.name}'s"
    more = f", and {len(found.missing) - 1:,} more" if len(found.missing) > 1 else ""
    return f"tensor {lost[0]!r} of {whose} UNet is missing{more}"


def unet_warnings(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Warnings about a complete UNet that some loader will not take, and about tensors in it that do not belong."""
    if info is None:
        return []
    if info.architecture is not None:
        if info.name != UNKNOWN or _host_knows(info.architecture):
            return []
        return [
            "the UNet has SDXL's structure, but the sizes of no model that ComfyUI or a web UI loads; "
            "diffusers' `load_unet` takes the result"
        ]
    diffusers = info.layout == "diffusers"
    found = nearest(info, shapes)
    if found and found.unexpected and not (found.missing or found.misshapen):
        whose = "the UNet's" if found.name == UNKNOWN else f"{found.name}'s"
        others = f" and {len(found.unexpected) - 1:,} more are" if len(found.unexpected) > 1 else " is"
        refusal = "only diffusers' `load_unet` may take the result" if diffusers else "loaders may refuse the result"
        return [f"tensor {found.unexpected[0]!r}{others} none of {whose}; {refusal}"]
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
    """The width of the text tokens that a UNet reads; 0 where it reads none."""
    return next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and shape), 0)


def _host_knows(architecture: UNetArchitecture) -> bool:
    """Whether ComfyUI tells a UNet by what it looks at: the rest it builds as the file has it."""

    def looked_at(each: UNetArchitecture) -> tuple:
        depths = tuple(depth for level in each.down_depths for depth in level)
        return each.channels[0], depths, each.context_width, each.added_width

    return looked_at(architecture) in map(looked_at, KNOWN_ARCHITECTURES)


def _lost(info: UNetInfo, found: Likeness, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Those missing keys of a kind that the UNet has elsewhere, or of a part that is gone as a whole."""
    if not found.missing:
        return []
    keys = [key for key in shapes if key.startswith(info.prefix)]
    alike, modules = set(map(_without_numbers, keys)), {key.rpartition(".")[0] for key in keys}
    parts = _parts(info, keys)
    return [
        key
        for key in found.missing
        if _without_numbers(key) in alike
        or key.rpartition(".")[0] in modules
        or (parts.isdisjoint(_parts(info, [key])) and not key[len(info.prefix) :].startswith(ADDED))
    ]


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+", "0", key)


def _parts(info: UNetInfo, keys: Iterable[str]) -> set[str]:
    return {key[len(info.prefix) :].partition(".")[0] for key in keys}
