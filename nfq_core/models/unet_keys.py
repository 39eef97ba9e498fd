"""UNets of the SDXL family: the names and shapes of their tensors, in every key layout.

A `UNetArchitecture` holds the few numbers in which members of the family differ. `unet_tensors` derives every tensor
from them, in forward order, with its shape and its name in both layouts: LDM (`input_blocks.…`, in whole checkpoints
after `CHECKPOINT_PREFIX`) and diffusers (`down_blocks.…`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

Shape = tuple[int, ...]
Layout = Literal["ldm", "prefixed", "diffusers"]

CHECKPOINT_PREFIX = "model.diffusion_model."
"""Prefix of the LDM names in a whole checkpoint."""


@dataclass(frozen=True)
class UNetArchitecture:
    """The numbers in which SDXL-style UNets differ.

    A depth is the number of transformer layers after a residual block; 0 means no attention.
    """

    name: str
    channels: tuple[int, ...]
    """Width at each resolution, finest first."""
    down_depths: tuple[tuple[int, ...], ...]
    """Down path: the depth of each residual block at each resolution, finest first."""
    middle_depth: int | None
    """Depth between the two residual blocks of the middle; 0: a single residual block; None: no middle block."""
    up_depths: tuple[tuple[int, ...], ...]
    """Up path: the same, coarsest resolution first."""
    context_width: int = 2048
    """Width of the text tokens that cross-attention reads."""
    added_width: int = 2816
    """Width of the pooled text and picture size that are added to the time embedding."""
    in_channels: int = 4
    out_channels: int = 4
    guidance_width: int = 0
    """Width of the guidance-scale embedding that LCM UNets add to the time embedding; 0: none."""


SDXL_BASE = UNetArchitecture(
    name="SDXL",
    channels=(320, 640, 1280),
    down_depths=((0, 0), (2, 2), (10, 10)),
    middle_depth=10,
    up_depths=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
)
SDXL_INPAINTING = replace(SDXL_BASE, name="SDXL inpainting", in_channels=9)
SDXL_INSTRUCT_PIX2PIX = replace(SDXL_BASE, name="SDXL instruct-pix2pix", in_channels=8)
SDXL_REFINER = UNetArchitecture(
    name="SDXL refiner",
    channels=(384, 768, 1536, 1536),
    down_depths=((0, 0), (4, 4), (4, 4), (0, 0)),
    middle_depth=4,
    up_depths=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
    context_width=1280,
    added_width=2560,
)
SSD_1B = replace(
    SDXL_BASE,
    name="SSD-1B",
    down_depths=((0, 0), (2, 2), (4, 4)),
    middle_depth=0,
    up_depths=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
)
SEGMIND_VEGA = replace(
    SDXL_BASE,
    name="Segmind Vega",
    down_depths=((0, 0), (1, 1), (2, 2)),
    middle_depth=0,
    up_depths=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
)
KOALA_700M = replace(
    SDXL_BASE,
    name="KOALA-700M",
    down_depths=((0,), (2,), (5,)),
    middle_depth=None,
    up_depths=((5, 5), (2, 2), (0, 0)),
)
KOALA_1B = replace(
    SDXL_BASE,
    name="KOALA-1B",
    down_depths=((0,), (2,), (6,)),
    middle_depth=6,
    up_depths=((6, 6), (2, 2), (0, 0)),
)

KNOWN_ARCHITECTURES = (
    SDXL_BASE,
    SDXL_INPAINTING,
    SDXL_INSTRUCT_PIX2PIX,
    SDXL_REFINER,
    SSD_1B,
    SEGMIND_VEGA,
    KOALA_700M,
    KOALA_1B,
)


class UNetTensor(NamedTuple):
    """One UNet tensor: its name in both layouts and its shape, which is the same in both."""

    ldm: str
    diffusers: str
    shape: Shape


@lru_cache(maxsize=16)
def unet_tensors(architecture: UNetArchitecture) -> tuple[UNetTensor, ...]:
    """Every tensor of `architecture`, in forward order."""
    return tuple(_walk(architecture))


def tensor_shapes(architecture: UNetArchitecture, layout: Layout) -> dict[str, Shape]:
    """Shape of every tensor of `architecture` by its name in `layout`, in forward order."""
    tensors = unet_tensors(architecture)
    if layout == "diffusers":
        return {tensor.diffusers: tensor.shape for tensor in tensors}
    if layout == "ldm":
        return {tensor.ldm: tensor.shape for tensor in tensors}
    if layout == "prefixed":
        return {CHECKPOINT_PREFIX + tensor.ldm: tensor.shape for tensor in tensors}
    raise ValueError(f"UNet key layout must be 'ldm', 'prefixed' or 'diffusers', got {layout!r}")


def diffusers_to_ldm(architecture: UNetArchitecture) -> dict[str, str]:
    """Map every diffusers name to its LDM name, one to one."""
    return {tensor.diffusers: tensor.ldm for tensor in unet_tensors(architecture)}


def ldm_to_diffusers(architecture: UNetArchitecture) -> dict[str, str]:
    """Map every LDM name to its diffusers name, one to one."""
    return {tensor.ldm: tensor.diffusers for tensor in unet_tensors(architecture)}


def _walk(architecture: UNetArchitecture) -> Iterator[UNetTensor]:
    arch, channels = architecture, architecture.channels
    finest, coarsest = channels[0], channels[-1]
    time_width = 4 * finest

    def block(ldm: str, diffusers: str, j: int, inner: int, outer: int, depth: int) -> Iterator[UNetTensor]:
        yield from _residual(f"{ldm}.0", f"{diffusers}.resnets.{j}", inner, outer, time_width)
        yield from _transformer(f"{ldm}.1", f"{diffusers}.attentions.{j}", outer, depth, arch.context_width)

    for ldm, diffusers, width in (
        ("time_embed", "time_embedding", finest),
        ("label_emb.0", "add_embedding", arch.added_width),
    ):
        yield from _layer(f"{ldm}.0", f"{diffusers}.linear_1", (time_width, width))
        yield from _layer(f"{ldm}.2", f"{diffusers}.linear_2", (time_width, time_width))
    if arch.guidance_width:
        yield from _layer("time_embed.cond_proj", "time_embedding.cond_proj", (finest, arch.guidance_width), bias=False)

    yield from _layer("input_blocks.0.0", "conv_in", (finest, arch.in_channels, 3, 3))
    width, skips, n = finest, [finest], 1
    for level, depths in enumerate(arch.down_depths):
        for j, depth in enumerate(depths):
            yield from block(f"input_blocks.{n}", f"down_blocks.{level}", j, width, channels[level], depth)
            width = channels[level]
            skips.append(width)
            n += 1
        if level < len(channels) - 1:
            name = f"down_blocks.{level}.downsamplers.0.conv"
            yield from _layer(f"input_blocks.{n}.0.op", name, (width, width, 3, 3))
            skips.append(width)
            n += 1

    if arch.middle_depth is not None:
        yield from block("middle_block", "mid_block", 0, coarsest, coarsest, arch.middle_depth)
    if arch.middle_depth:
        yield from _residual("middle_block.2", "mid_block.resnets.1", coarsest, coarsest, time_width)

    n = 0
    for level, depths in enumerate(arch.up_depths):
        outer = channels[len(channels) - 1 - level]
        for j, depth in enumerate(depths):
            inner = width + skips.pop()
            yield from block(f"output_blocks.{n}", f"up_blocks.{level}", j, inner, outer, depth)
            width = outer
            n += 1
        if level < len(channels) - 1:
            # LDM appends the upsampler to the level's last block, after its attention if it has any.
            upsampler = f"output_blocks.{n - 1}.{2 if depths[-1] else 1}.conv"
            yield from _layer(upsampler, f"up_blocks.{level}.upsamplers.0.conv", (width, width, 3, 3))

    yield from _layer("out.0", "conv_norm_out", (finest,))
    yield from _layer("out.2", "conv_out", (arch.out_channels, finest, 3, 3))


def _layer(ldm: str, diffusers: str, weight: Shape, *, bias: bool = True) -> Iterator[UNetTensor]:
    yield UNetTensor(f"{ldm}.weight", f"{diffusers}.weight", weight)
    if bias:
        yield UNetTensor(f"{ldm}.bias", f"{diffusers}.bias", weight[:1])


def _residual(ldm: str, diffusers: str, inner: int, outer: int, time_width: int) -> Iterator[UNetTensor]:
    yield from _layer(f"{ldm}.in_layers.0", f"{diffusers}.norm1", (inner,))
    yield from _layer(f"{ldm}.in_layers.2", f"{diffusers}.conv1", (outer, inner, 3, 3))
    yield from _layer(f"{ldm}.emb_layers.1", f"{diffusers}.time_emb_proj", (outer, time_width))
    yield from _layer(f"{ldm}.out_layers.0", f"{diffusers}.norm2", (outer,))
    yield from _layer(f"{ldm}.out_layers.3", f"{diffusers}.conv2", (outer, outer, 3, 3))
    if inner != outer:
        yield from _layer(f"{ldm}.skip_connection", f"{diffusers}.conv_shortcut", (outer, inner, 1, 1))


def _transformer(ldm: str, diffusers: str, width: int, depth: int, context: int) -> Iterator[UNetTensor]:
    """Tensors of a spatial transformer, whose inner names are equal in both layouts; none at depth 0."""
    if depth == 0:
        return

    def layer(name: str, weight: Shape, *, bias: bool = True) -> Iterator[UNetTensor]:
        return _layer(f"{ldm}.{name}", f"{diffusers}.{name}", weight, bias=bias)

    yield from layer("norm", (width,))
    yield from layer("proj_in", (width, width))
    for i in range(depth):
        inside = f"transformer_blocks.{i}"
        for attention, (name, source) in enumerate((("attn1", width), ("attn2", context)), start=1):
            yield from layer(f"{inside}.norm{attention}", (width,))
            yield from layer(f"{inside}.{name}.to_q", (width, width), bias=False)
            yield from layer(f"{inside}.{name}.to_k", (width, source), bias=False)
            yield from layer(f"{inside}.{name}.to_v", (width, source), bias=False)
            yield from layer(f"{inside}.{name}.to_out.0", (width, width))
        yield from layer(f"{inside}.norm3", (width,))
        # The gated feed-forward computes its 4 * width features and their gates in one projection.
        yield from layer(f"{inside}.ff.net.0.proj", (8 * width, width))
        yield from layer(f"{inside}.ff.net.2", (width, 4 * width))
    yield from layer("proj_out", (width, width))
