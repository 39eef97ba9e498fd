"""The role of a layer in a UNet, and its stage: both derived from its name.

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
    """What a kind of layer does in a UNet."""

    name: str
    group: str
    """Roles of one group share a colour in the plots."""
    pattern: str
    """Regular expression to search for in a layer's name."""


QUERY_KEY, VALUE_OUT, FEED_FORWARD = "attention q, k", "attention v, out", "feed-forward"
PROJECTION, CONVOLUTION, RESAMPLING, OTHER = "projections", "convolutions", "shortcuts, resampling", "other"

GROUPS = (QUERY_KEY, VALUE_OUT, FEED_FORWARD, PROJECTION, CONVOLUTION, RESAMPLING, OTHER)

ROLES = (
    Role("self-attention q", QUERY_KEY, r"\battn1\.to_q\b"),
    Role("self-attention k", QUERY_KEY, r"\battn1\.to_k\b"),
    Role("self-attention v", VALUE_OUT, r"\battn1\.to_v\b"),
    Role("self-attention out", VALUE_OUT, r"\battn1\.to_out\b"),
    Role("cross-attention q", QUERY_KEY, r"\battn2\.to_q\b"),
    Role("cross-attention k", QUERY_KEY, r"\battn2\.to_k\b"),
    Role("cross-attention v", VALUE_OUT, r"\battn2\.to_v\b"),
    Role("cross-attention out", VALUE_OUT, r"\battn2\.to_out\b"),
    Role("feed-forward in", FEED_FORWARD, r"\bff\.net\.0\b"),
    Role("feed-forward out", FEED_FORWARD, r"\bff\.net\.2\b"),
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
