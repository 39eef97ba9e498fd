"""What part a layer plays in a UNet, and where in it: read off its name, in any layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..unet import UNetInfo, diffusers_names, known_ldm_names
from ..unet_keys import ldm_to_diffusers


@dataclass(frozen=True)
class Role:
    """A part that layers play."""

    name: str
    group: str
    """Those of a group have one colour in the plots."""
    pattern: str
    """What the names of such layers hold, as a regular expression."""


QUERY_KEY, VALUE_OUT, FEED_FORWARD = "attention q, k", "attention v, out", "feed-forward"
PROJECTION, CONVOLUTION, RESAMPLING, OTHER = "projections", "convolutions", "shortcuts, resampling", "other"

GROUPS = (QUERY_KEY, VALUE_OUT, FEED_FORWARD, PROJECTION, CONVOLUTION, RESAMPLING, OTHER)

ROLES = (
    *(
        Role(f"{kind}-attention {part}", QUERY_KEY if part in "qk" else VALUE_OUT, rf"\battn{number}\.to_{part}\b")
        for number, kind in ((1, "self"), (2, "cross"))
        for part in ("q", "k", "v", "out")
    ),
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
    """The part that a layer plays: one of ROLES, or OTHER_LINEAR or OTHER_CONVOLUTION."""
    found = next((each for each in ROLES if re.search(each.pattern, name)), None)
    return found or (OTHER_LINEAR if len(shape) <= 2 else OTHER_CONVOLUTION)


def common_names(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Names by which tensors of the same model are the same in every layout, in forward order where it is known.

    They are diffusers' for the UNet of a known structure, otherwise LDM's, and a file's own for all that is no UNet.

    Args:
        info: what `detect` found.
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
    """Where in the UNet a layer of `common_names` is: "down 1", "middle", "up 0", or nothing."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.|(mid)_block\.", name)
    if found:
        return "middle" if found[3] else f"{found[1]} {found[2]}"
    found = re.match(r"(in|out)put_blocks\.(\d+)\.|(middle)_block\.", name)
    return ("middle" if found[3] else f"{found[1]} {found[2]}") if found else ""
