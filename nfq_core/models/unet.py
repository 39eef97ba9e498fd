"""Recognise a UNet by a file's tensor names and shapes, and separate its keys from other tensors."""

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
"""Name of a UNet that is not in `KNOWN_ARCHITECTURES`."""


@dataclass(frozen=True)
class UNetInfo:
    """A UNet recognised by `detect`."""

    layout: Layout
    prefix: str
    """Prefix of every UNet key: empty, `CHECKPOINT_PREFIX`, or another one that ends in a dot."""
    architecture: UNetArchitecture | None
    """The architecture with exactly this file's tensors, named `UNKNOWN` if no known model has them.

    None if they do not follow SDXL's structure.
    """

    @property
    def name(self) -> str:
        """The architecture's name, such as "SDXL" or "Segmind Vega", or `UNKNOWN`."""
        return self.architecture.name if self.architecture else UNKNOWN


def detect(shapes: Mapping[str, Sequence[int]]) -> UNetInfo | None:
    """Find the UNet in a file.

    A UNet has a first convolution, a last convolution and a time embedding under one prefix; a VAE or ControlNet lacks
    one of them. Other tensors, such as those of a CLIP or the marker `v_pred`, are ignored.

    Args:
        shapes: shape of each tensor by name.

    Returns:
        The UNet; None if there is none.
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
    """Whether `key`, from the file that `info` describes, belongs to the UNet."""
    return key.startswith(info.prefix) and _root(key[len(info.prefix) :]) in _names(info).roots


def first_and_last_convolution(info: UNetInfo) -> frozenset[str]:
    """Keys of the input and output convolutions' weights."""
    names = _names(info)
    return frozenset((info.prefix + names.first_convolution, info.prefix + names.last_convolution))


def ldm_names(info: UNetInfo, keys: Iterable[str]) -> dict[str, str]:
    """Map each UNet key among `keys` to its LDM name, without prefix.

    Raises:
        ValueError: the keys are in diffusers' layout and cannot be renamed, because the architecture is unknown.
    """
    return _in_layout(info, keys, "LDM")


def diffusers_names(info: UNetInfo, keys: Iterable[str]) -> dict[str, str]:
    """Map each UNet key among `keys` to its diffusers name, without prefix.

    Raises:
        ValueError: the keys are in LDM's layout and cannot be renamed, because the architecture is unknown.
    """
    return _in_layout(info, keys, "diffusers")


def known_ldm_names(info: UNetInfo | None, keys: Iterable[str]) -> dict[str, str]:
    """`ldm_names`, but empty if there is no UNet (`info` is None) or its keys cannot be renamed."""
    if info is None or (info.layout == "diffusers" and info.architecture is None):
        return {}
    return ldm_names(info, keys)


def mismatch_message(info: UNetInfo, shapes: Mapping[str, Sequence[int]]) -> str:
    """Name the tensors in which an unrecognised UNet differs from the most similar known model, else nothing."""
    difference = nearest(info, shapes)
    wrong = (*difference.missing, *difference.misshapen) if difference and difference.name != UNKNOWN else ()
    if not wrong:
        return ""
    fault = "is missing" if difference.missing else "has another shape"
    more = f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
    return f"tensor {wrong[0]!r} of {difference.name}'s UNet {fault}{more}"


@dataclass(frozen=True)
class Difference:
    """How a file's UNet differs from the most similar architecture, in the file's layout.

    Args:
        name: the architecture's name; `UNKNOWN` for one inferred from the UNet's own names.
        missing: keys that only the architecture has, in forward order.
        misshapen: keys whose shapes differ.
        unexpected: keys that only the file has.
    """

    name: str
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of keys that differ."""
        return len(self.missing) + len(self.misshapen) + len(self.unexpected)


def nearest(info: UNetInfo, shapes: Mapping[str, Sequence[int]]) -> Difference | None:
    """Compare a UNet with the most similar architecture: a known one, or the one inferred from its own names.

    Returns:
        The difference; None if it concerns more than half of every architecture's tensors.
    """
    unet = {key: tuple(shape) for key, shape in shapes.items() if is_unet_key(info, key)}
    names = _names(info)
    layout: Layout = "diffusers" if info.layout == "diffusers" else "ldm"
    candidates = list(KNOWN_ARCHITECTURES)
    own = _infer_from_names({key[len(info.prefix) :]: shape for key, shape in unet.items()}, names)
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
            # Models of other families have no added embedding.
            wanted = {key: shape for key, shape in wanted.items() if not key.startswith(added)}
        difference = Difference(
            architecture.name,
            tuple(key for key in wanted if key not in unet),
            tuple(key for key, shape in wanted.items() if key in unet and unet[key] != shape),
            tuple(key for key in unet if key not in wanted),
        )
        is_similar = 2 * difference.count <= len(wanted)
        if is_similar and (best is None or difference.count < best.count):
            best = difference
    return best


def other_unets(info: UNetInfo, shapes: Mapping[str, Sequence[int]]) -> list[UNetInfo]:
    """Further UNets in the file besides `info`, such as averages, teachers or a refiner; their architecture is None."""
    return [
        UNetInfo(names.layout, prefix, None)
        for names in (_LDM, _DIFFUSERS)
        for prefix in _prefixes(shapes, names)
        if (prefix, names) != (info.prefix, _names(info))
    ]


class _Names(NamedTuple):
    """Names that identify a UNet in one layout and give its architecture's widths."""

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
        raise ValueError(f"the {own} names of an unknown architecture cannot be renamed to {wanted} names")
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
    """The key prefix of each UNet in one layout, `CHECKPOINT_PREFIX` first."""
    needed = ((names.first_convolution, 4), (names.last_convolution, 4), (names.time_embedding, 2))
    candidates = {key.removesuffix(names.first_convolution) for key in shapes if key.endswith(names.first_convolution)}
    for prefix in sorted(candidates, key=lambda prefix: (prefix != CHECKPOINT_PREFIX, len(prefix), prefix)):
        if prefix and not prefix.endswith("."):
            continue
        if all(len(shapes.get(prefix + name, ())) == dimensions for name, dimensions in needed):
            yield prefix


def _infer(unet: Mapping[str, Shape], names: _Names) -> UNetArchitecture | None:
    """The architecture with exactly the tensors `unet`: inferred from names, then checked against every shape."""
    inferred = _infer_from_names(unet, names)
    if inferred is None or tensor_shapes(inferred, names.layout) != unet:
        return None
    plain = replace(inferred, guidance_width=0)
    name = next((known.name for known in KNOWN_ARCHITECTURES if replace(known, name=UNKNOWN) == plain), UNKNOWN)
    return replace(inferred, name=name)


def _infer_from_names(unet: Mapping[str, Shape], names: _Names) -> UNetArchitecture | None:
    """The architecture that a UNet's tensor names describe, named `UNKNOWN`; shapes are not checked."""
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
    """Names of a residual block's first convolution and of the attention that may follow it."""

    convolution: str
    attention: str


_Blocks = tuple[list[list[_Block]], _Block | None, list[list[_Block]]]
"""The blocks of each level of the down path, the middle's first block, the blocks of each level of the up path."""


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
        """One list of blocks per level; every resampling layer starts a new level."""
        blocks: list[list[_Block]] = [[]]
        n = start
        while True:
            part = f"{side}.{n}"
            resamples = any(f"{part}.{name}" in modules for name in ("0.op", "1.conv", "2.conv"))
            if not (is_block(part) or resamples):
                return blocks
            if is_block(part):
                blocks[-1].append(block(part))
            if resamples:
                blocks.append([])
            n += 1

    middle = block("middle_block") if is_block("middle_block") else None
    return levels("input_blocks", 1), middle, levels("output_blocks", 0)
