"""Recognise an SDXL-family UNet among a file's tensor names and shapes, and tell its keys from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import NamedTuple

from .unet_keys import (
    CHECKPOINT_PREFIX,
    KNOWN_ARCHITECTURES,
    Layout,
    Shape,
    UNetArchitecture,
    diffusers_to_ldm,
    ldm_to_diffusers,
    tensor_shapes,
)

UNKNOWN = "unknown"
"""The name of a UNet that is none of `KNOWN_ARCHITECTURES`."""


@dataclass(frozen=True)
class UNetInfo:
    """What `detect` found."""

    layout: Layout
    prefix: str
    """What precedes every UNet key: nothing, `CHECKPOINT_PREFIX`, or another that ends in a dot."""
    architecture: UNetArchitecture | None
    """Describes exactly this file's tensors, under the name `UNKNOWN` if no known model has them.

    None where SDXL's structure cannot describe them.
    """

    @property
    def name(self) -> str:
        """The family member's name, such as "SDXL" or "Segmind Vega", or `UNKNOWN`."""
        return self.architecture.name if self.architecture else UNKNOWN


def detect(shapes: Mapping[str, Sequence[int]]) -> UNetInfo | None:
    """Recognise the UNet among a file's tensors, given as shapes by name; None where there is none.

    Other tensors may lie beside it: the CLIP and VAE of a whole checkpoint, markers such as `v_pred`. A UNet
    has a first and a last convolution and a time embedding under one prefix; a VAE or a ControlNet lacks one.
    """
    for names in (_LDM, _DIFFUSERS):
        prefix = _find_prefix(shapes, names)
        if prefix is None:
            continue
        unet = {
            key[len(prefix) :]: tuple(shape)
            for key, shape in shapes.items()
            if key.startswith(prefix) and _root(key[len(prefix) :]) in names.roots
        }
        layout: Layout = names.layout if names is _DIFFUSERS or not prefix else "prefixed"
        return UNetInfo(layout, prefix, _infer(unet, names))
    return None


def is_unet_key(info: UNetInfo, key: str) -> bool:
    """Whether `key`, of the file that `info` describes, belongs to the UNet, not to CLIP, VAE or a marker."""
    return key.startswith(info.prefix) and _root(key[len(info.prefix) :]) in _names(info).roots


def first_and_last_convolution(info: UNetInfo) -> frozenset[str]:
    """The keys of the weights by which latents enter the UNet and leave it."""
    names = _names(info)
    return frozenset((info.prefix + names.first_convolution, info.prefix + names.last_convolution))


def ldm_names(info: UNetInfo, keys: Iterable[str]) -> dict[str, str]:
    """The name in LDM's layout, without prefix, of each of `keys` that belongs to the UNet.

    Raises:
        ValueError: the keys are in diffusers' layout and the architecture is unknown, so that they cannot be renamed.
    """
    return _in_layout(info, keys, "LDM")


def diffusers_names(info: UNetInfo, keys: Iterable[str]) -> dict[str, str]:
    """The name in diffusers' layout, without prefix, of each of `keys` that belongs to the UNet.

    Raises:
        ValueError: the keys are in LDM's layout and the architecture is unknown, so that they cannot be renamed.
    """
    return _in_layout(info, keys, "diffusers")


def known_ldm_names(info: UNetInfo | None, keys: Iterable[str]) -> dict[str, str]:
    """`ldm_names`; nothing where there is no UNet (`info` is None) or its keys cannot be renamed."""
    if info is None or (info.layout == "diffusers" and info.architecture is None):
        return {}
    return ldm_names(info, keys)


def mismatch_message(info: UNetInfo, shapes: Mapping[str, Sequence[int]]) -> str:
    """Says which tensors keep an unrecognised UNet from being a known model that it mostly is; else nothing."""
    found = nearest(info, shapes)
    unfit = (*found.missing, *found.misshapen) if found and found.name != UNKNOWN else ()
    if not unfit:
        return ""
    lacks = "is missing" if found.missing else "has another shape"
    more = f", and {len(unfit) - 1:,} more" if len(unfit) > 1 else ""
    return f"tensor {unfit[0]!r} of {found.name}'s UNet {lacks}{more}"


@dataclass(frozen=True)
class Likeness:
    """How a file's UNet differs from the architecture that it is most like; keys are those of the file.

    Args:
        name: the architecture's; `UNKNOWN` for one that is read off the UNet's own names.
        missing: keys that the architecture has and the file lacks, in forward order.
        misshapen: keys of another shape.
        unexpected: keys that the architecture does not have.
    """

    name: str
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def differences(self) -> int:
        """How many keys differ."""
        return len(self.missing) + len(self.misshapen) + len(self.unexpected)


def nearest(info: UNetInfo, shapes: Mapping[str, Sequence[int]]) -> Likeness | None:
    """The architecture that a UNet is most like: a known one, or that which its own names describe.

    Returns:
        The differences; None where no architecture has at least twice as many tensors as there are differences.
    """
    unet = {key: tuple(shape) for key, shape in shapes.items() if is_unet_key(info, key)}
    names = _names(info)
    layout: Layout = "diffusers" if info.layout == "diffusers" else "ldm"
    candidates = list(KNOWN_ARCHITECTURES)
    own = _read({key[len(info.prefix) :]: shape for key, shape in unet.items()}, names)
    if own is not None:
        candidates.append(own)
    best = None
    for architecture in candidates:
        wanted = {info.prefix + key: shape for key, shape in tensor_shapes(architecture, layout).items()}
        guidance = info.prefix + names.guidance_embedding
        if architecture.name != UNKNOWN and guidance in unet:
            wanted[guidance] = unet[guidance]
        added = info.prefix + _root(names.added_embedding) + "."
        if architecture.added_width == 0 and not any(key.startswith(added) for key in unet):
            # Models of other families add nothing to the time embedding.
            wanted = {key: shape for key, shape in wanted.items() if not key.startswith(added)}
        found = Likeness(
            architecture.name,
            tuple(key for key in wanted if key not in unet),
            tuple(key for key, shape in wanted.items() if key in unet and unet[key] != shape),
            tuple(key for key in unet if key not in wanted),
        )
        fits = 2 * found.differences <= len(wanted)
        if fits and (best is None or found.differences < best.differences):
            best = found
    return best


def other_unets(info: UNetInfo, shapes: Mapping[str, Sequence[int]]) -> list[UNetInfo]:
    """The UNets beside the one that `info` describes, such as averages, teachers or a refiner, unexamined."""
    return [
        UNetInfo(names.layout, prefix, None)
        for names in (_LDM, _DIFFUSERS)
        for prefix in _prefixes(shapes, names)
        if (prefix, names) != (info.prefix, _names(info))
    ]


class _Names(NamedTuple):
    """The names by which a layout's UNet is recognised and its architecture read."""

    layout: Layout
    first_convolution: str
    last_convolution: str
    time_embedding: str
    added_embedding: str
    guidance_embedding: str
    roots: frozenset[str]


def _in_layout(info: UNetInfo, keys: Iterable[str], wanted: str) -> dict[str, str]:
    """See `ldm_names` and `diffusers_names`."""
    stripped = {key: key[len(info.prefix) :] for key in keys if is_unet_key(info, key)}
    own = "diffusers" if info.layout == "diffusers" else "LDM"
    if own == wanted:
        return stripped
    if info.architecture is None:
        raise ValueError(f"the {own} names of an unknown architecture have no {wanted} names")
    renamed = (diffusers_to_ldm if wanted == "LDM" else ldm_to_diffusers)(info.architecture)
    return {key: renamed[name] for key, name in stripped.items()}


def _root(key: str) -> str:
    return key.partition(".")[0]


def _layout_names(layout: Layout, *names: str) -> _Names:
    roots = frozenset(_root(key) for known in KNOWN_ARCHITECTURES for key in tensor_shapes(known, layout))
    return _Names(layout, *names, roots)


_LDM = _layout_names(
    "ldm",
    "input_blocks.0.0.weight",
    "out.2.weight",
    "time_embed.0.weight",
    "label_emb.0.0.weight",
    "time_embed.cond_proj.weight",
)
_DIFFUSERS = _layout_names(
    "diffusers",
    "conv_in.weight",
    "conv_out.weight",
    "time_embedding.linear_1.weight",
    "add_embedding.linear_1.weight",
    "time_embedding.cond_proj.weight",
)


def _names(info: UNetInfo) -> _Names:
    return _DIFFUSERS if info.layout == "diffusers" else _LDM


def _find_prefix(shapes: Mapping[str, Sequence[int]], names: _Names) -> str | None:
    return next(_prefixes(shapes, names), None)


def _prefixes(shapes: Mapping[str, Sequence[int]], names: _Names) -> Iterator[str]:
    """What precedes the keys of each UNet in one layout, the checkpoint's own first."""
    needed = ((names.first_convolution, 4), (names.last_convolution, 4), (names.time_embedding, 2))
    candidates = {key.removesuffix(names.first_convolution) for key in shapes if key.endswith(names.first_convolution)}
    for prefix in sorted(candidates, key=lambda prefix: (prefix != CHECKPOINT_PREFIX, len(prefix), prefix)):
        if prefix and not prefix.endswith("."):
            continue
        if all(len(shapes.get(prefix + name, ())) == dimensions for name, dimensions in needed):
            yield prefix


def _infer(unet: Mapping[str, Shape], names: _Names) -> UNetArchitecture | None:
    """The architecture whose tensors are exactly `unet`: read off the names, then checked on every shape."""
    inferred = _read(unet, names)
    if inferred is None or tensor_shapes(inferred, names.layout) != unet:
        return None
    plain = replace(inferred, guidance_width=0)
    name = next((known.name for known in KNOWN_ARCHITECTURES if replace(known, name=UNKNOWN) == plain), UNKNOWN)
    return replace(inferred, name=name)


def _read(unet: Mapping[str, Shape], names: _Names) -> UNetArchitecture | None:
    """The architecture that a UNet's names describe, called `UNKNOWN`; nothing is checked."""
    modules = {key[:i] for key in unet for i, letter in enumerate(key) if letter == "."}

    def size(key: str, axis: int) -> int:
        shape = unet.get(key, ())
        return shape[axis] if axis < len(shape) else 0

    def width(convolution: str) -> int:
        return size(convolution, 0) or size(convolution.removesuffix("weight") + "bias", 0)

    def depth(attention: str) -> int:
        layers = (f"{attention}.transformer_blocks.{i}" for i in count())
        return sum(1 for _ in takewhile(modules.__contains__, layers))

    down, middle, up = _diffusers_blocks(modules) if names is _DIFFUSERS else _ldm_blocks(modules)
    has_a_block_per_skip = sum(map(len, up)) == sum(map(len, down)) + len(down)
    if not (down and len(up) == len(down) and all((*down, *up)) and has_a_block_per_skip):
        return None
    cross_attention = next((key for key in unet if key.endswith(".attn2.to_k.weight")), "")
    return UNetArchitecture(
        name=UNKNOWN,
        channels=tuple(width(level[0].convolution) for level in down),
        down_depths=tuple(tuple(depth(block.attention) for block in level) for level in down),
        middle_depth=depth(middle.attention) if middle else None,
        up_depths=tuple(tuple(depth(block.attention) for block in level) for level in up),
        context_width=size(cross_attention, 1),
        added_width=size(names.added_embedding, 1),
        in_channels=size(names.first_convolution, 1),
        out_channels=size(names.last_convolution, 0),
        guidance_width=size(names.guidance_embedding, 1),
    )


class _Block(NamedTuple):
    """A residual block in a file: the names of its first convolution and of the attention that may follow."""

    convolution: str
    attention: str


_Blocks = tuple[list[list[_Block]], _Block | None, list[list[_Block]]]
"""The blocks of every level on the way down, the middle's first one, those on the way up."""


def _diffusers_blocks(modules: Set[str]) -> _Blocks:
    def block(part: str, j: int) -> _Block:
        return _Block(f"{part}.resnets.{j}.conv1.weight", f"{part}.attentions.{j}")

    def present(part: str) -> list[_Block]:
        return [block(part, j) for j in takewhile(lambda j: f"{part}.resnets.{j}" in modules, count())]

    def levels(side: str) -> list[list[_Block]]:
        return list(takewhile(bool, (present(f"{side}.{level}") for level in count())))

    middle = block("mid_block", 0) if "mid_block.resnets.0" in modules else None
    return levels("down_blocks"), middle, levels("up_blocks")


def _ldm_blocks(modules: Set[str]) -> _Blocks:
    def block(part: str) -> _Block:
        return _Block(f"{part}.0.in_layers.2.weight", f"{part}.1")

    def is_block(part: str) -> bool:
        return f"{part}.0.in_layers" in modules or f"{part}.0.out_layers" in modules

    def levels(side: str, start: int) -> list[list[_Block]]:
        """One list of blocks per level; every resampling begins a new level."""
        found: list[list[_Block]] = [[]]
        n = start
        while True:
            part = f"{side}.{n}"
            resamples = any(f"{part}.{name}" in modules for name in ("0.op", "1.conv", "2.conv"))
            if not (is_block(part) or resamples):
                return found
            if is_block(part):
                found[-1].append(block(part))
            if resamples:
                found.append([])
            n += 1

    middle = block("middle_block") if is_block("middle_block") else None
    return levels("input_blocks", 1), middle, levels("output_blocks", 0)
