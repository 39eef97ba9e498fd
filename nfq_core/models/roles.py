"""The role of a layer in a diffusion model, and its stage in a UNet: both derived from its name.

Names may be in any layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .unet import UNetInfo, diffusers_names, known_ldm_names
from .unet_keys import ldm_to_diffusers


@dataclass(frozen=True)
class Role:
    """What a kind of layer does in a UNet or diffusion transformer."""

    name: str
    group: str
    """Roles of one group share a colour in the plots."""
    pattern: str
    """Regular expression to search for in a layer's name."""
    parts: tuple[str, ...] = ()
    """Roles of equal parts of its weight, if it is several layers in one or SDXL has no such layer."""


QUERY_KEY, VALUE_OUT, FEED_FORWARD = "attention q, k", "attention v, out", "feed-forward"
PROJECTION, CONVOLUTION, RESAMPLING = "projections", "convolutions", "shortcuts, resampling"
MODULATION, OTHER = "modulation", "other"

GROUPS = (QUERY_KEY, VALUE_OUT, FEED_FORWARD, PROJECTION, CONVOLUTION, RESAMPLING, MODULATION, OTHER)

_SELF = r"\b(attn1?|self_attn|attention)"
_CROSS = r"\b(attn2|cross_attn)"
_MLP = r"\b((img_|txt_)?mlp|ffn)"
_SELF_PARTS = tuple(f"self-attention {part}" for part in ("q", "k", "v"))

_IN_SINGLE_BLOCKS = (
    Role(
        "attention q, k, v and feed-forward in",
        FEED_FORWARD,
        r"\bsingle_blocks\.\d+\.linear1\b|\bto_qkv_mlp_proj\b",
        (*_SELF_PARTS, *["feed-forward in"] * 4),
    ),
    Role(
        "attention out and feed-forward out",
        FEED_FORWARD,
        r"\bsingle_blocks\.\d+\.linear2\b|\bsingle_transformer_blocks\.\d+\.(proj_out|attn\.to_out\.weight)\b",
        ("self-attention out", *["feed-forward out"] * 4),
    ),
)
"""Flux's single blocks have one layer for all inputs and one for all outputs: at four times the width, one part
of five or three of seven are attention's."""

ROLES = (
    *_IN_SINGLE_BLOCKS,
    # Its noise reaches every token, by way of the attention's and the feed-forward's outputs. No measurement is
    # published, so it counts like the most sensitive role of SDXL's transformer layers.
    Role(
        "modulation",
        MODULATION,
        r"_mod\.(lin|1)\b|modulation\.lin(ear)?\b|_modulation_|(?i:adaln_modulation)|\bnorm\d?(_context)?\.linear(_\d)?\b",
        ("self-attention v",),
    ),
    Role("attention q, k, v", VALUE_OUT, r"(\b|_)(attn\d?|attention)\.qkv\b", _SELF_PARTS),
    Role("self-attention q", QUERY_KEY, _SELF + r"\.(to_q|q|q_proj|add_q_proj)\b"),
    Role("self-attention k", QUERY_KEY, _SELF + r"\.(to_k|k|k_proj|add_k_proj)\b"),
    Role("self-attention v", VALUE_OUT, _SELF + r"\.(to_v|v|v_proj|add_v_proj)\b"),
    Role(
        "self-attention out", VALUE_OUT, _SELF + r"\.(to_out|to_add_out|o|out|proj|o_proj|output_proj)\b|_attn\.proj\b"
    ),
    Role("cross-attention q", QUERY_KEY, _CROSS + r"\.(to_q|q|q_proj)\b"),
    Role("cross-attention k", QUERY_KEY, _CROSS + r"\.(to_k|k|k_proj|k_img|add_k_proj)\b"),
    Role("cross-attention v", VALUE_OUT, _CROSS + r"\.(to_v|v|v_proj|v_img|add_v_proj)\b"),
    Role("cross-attention out", VALUE_OUT, _CROSS + r"\.(to_out|o|o_proj|output_proj|proj)\b"),
    Role(
        "feed-forward in",
        FEED_FORWARD,
        rf"\bff(_context)?\.(net\.0|linear_in)\b|{_MLP}\.(net\.0|0|fc1|layer1)\b"
        r"|\bfeed_forward\.(w|linear_)[13]\b|\bproj_mlp\b",
    ),
    Role(
        "feed-forward out",
        FEED_FORWARD,
        rf"\bff(_context)?\.(net\.2|linear_out)\b|{_MLP}\.(net\.2|2|fc2|layer2)\b|\bfeed_forward\.(w|linear_)2\b",
    ),
    Role("projection in", PROJECTION, r"\bproj_in\b"),
    Role("projection out", PROJECTION, r"\bproj_out\b"),
    Role("convolution 1", CONVOLUTION, r"\b(in_layers\.2|conv1)\b"),
    Role("convolution 2", CONVOLUTION, r"\b(out_layers\.3|conv2)\b"),
    Role("shortcut", RESAMPLING, r"\b(skip_connection|conv_shortcut)\b"),
    Role("downsampling", RESAMPLING, r"\b(0\.op|downsamplers)\b"),
    Role("upsampling", RESAMPLING, r"\b([12]\.conv|upsamplers)\b"),
)

OTHER_LINEAR = Role("other linear", OTHER, "")
OTHER_CONVOLUTION = Role("other convolution", OTHER, "")


def role(name: str, shape: Sequence[int]) -> Role:
    """The role of a layer: one of ROLES, OTHER_LINEAR or OTHER_CONVOLUTION."""
    match = next((each for each in ROLES if re.search(each.pattern, name)), None)
    return match or (OTHER_LINEAR if len(shape) <= 2 else OTHER_CONVOLUTION)


def common_names(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Map each tensor name to a name that is the same in every layout, in forward order if that is known.

    These are diffusers' names for a UNet of SDXL's structure, LDM's names for other UNets, and the file's own names for
    tensors outside the UNet.

    Args:
        info: result of `detect`.
        shapes: shape of each tensor by name.
    """
    if info is None:
        return {key: key for key in shapes}
    if info.architecture is None:
        known = known_ldm_names(info, shapes)
        return {key: known.get(key, key) for key in shapes}
    forward = ldm_to_diffusers(info.architecture)
    ours = {name: key for key, name in diffusers_names(info, shapes).items()}
    ordered = {ours[name]: name for name in forward.values()}
    return ordered | {key: key for key in shapes if key not in ordered}


def stage(name: str) -> str:
    """Where in the UNet a layer named as in `common_names` is: "down 1", "middle", "up 0", "in 4"; else empty."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.|(mid)_block\.", name)
    if match:
        return "middle" if match[3] else f"{match[1]} {match[2]}"
    match = re.match(r"(in|out)put_blocks\.(\d+)\.|(middle)_block\.", name)
    return ("middle" if match[3] else f"{match[1]} {match[2]}") if match else ""
