"""Names and shapes of everything in a whole SDXL checkpoint: UNet, CLIP-L, OpenCLIP-G and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nfq_core.models.unet_keys import SDXL_BASE, Shape, tensor_shapes


@dataclass(frozen=True)
class TextSizes:
    """The sizes of a text encoder."""

    width: int
    layers: int
    words: int = 49408
    positions: int = 77


CLIP_L, OPEN_CLIP_G = TextSizes(768, 12), TextSizes(1280, 32)


def clip(sizes: TextSizes, prefix: str = "") -> dict[str, Shape]:
    """CLIP under transformers' names."""
    width, text = sizes.width, f"{prefix}text_model."
    shapes: dict[str, Shape] = {
        f"{text}embeddings.position_embedding.weight": (sizes.positions, width),
        f"{text}embeddings.token_embedding.weight": (sizes.words, width),
    }
    for index in range(sizes.layers):
        layer = f"{text}encoder.layers.{index}."
        for name in ("k_proj", "out_proj", "q_proj", "v_proj"):
            shapes |= _layer(f"{layer}self_attn.{name}", width, width)
        shapes |= _layer(f"{layer}mlp.fc1", 4 * width, width) | _layer(f"{layer}mlp.fc2", width, 4 * width)
        shapes |= _norm(f"{layer}layer_norm1", width) | _norm(f"{layer}layer_norm2", width)
    return shapes | _norm(f"{text}final_layer_norm", width)


def open_clip(sizes: TextSizes, prefix: str = "") -> dict[str, Shape]:
    """CLIP under OpenCLIP's names."""
    width = sizes.width
    shapes: dict[str, Shape] = {
        f"{prefix}logit_scale": (),
        f"{prefix}positional_embedding": (sizes.positions, width),
        f"{prefix}text_projection": (width, width),
        f"{prefix}token_embedding.weight": (sizes.words, width),
    }
    for index in range(sizes.layers):
        layer = f"{prefix}transformer.resblocks.{index}."
        shapes |= {f"{layer}attn.in_proj_weight": (3 * width, width), f"{layer}attn.in_proj_bias": (3 * width,)}
        shapes |= _layer(f"{layer}attn.out_proj", width, width)
        shapes |= _layer(f"{layer}mlp.c_fc", 4 * width, width) | _layer(f"{layer}mlp.c_proj", width, 4 * width)
        shapes |= _norm(f"{layer}ln_1", width) | _norm(f"{layer}ln_2", width)
    return shapes | _norm(f"{prefix}ln_final", width)


def vae(prefix: str = "") -> dict[str, Shape]:
    """SDXL's VAE under LDM's names."""
    widths, latents = (128, 256, 512, 512), 4
    shapes: dict[str, Shape] = {}
    for part, moments in (("encoder", 2 * latents), ("decoder", 3)):
        inner = widths[0] if part == "encoder" else widths[-1]
        shapes |= _layer(f"{prefix}{part}.conv_in", inner, 3 if part == "encoder" else latents, 3, 3)
        for name, width in _vae_levels(part, widths):
            for block in range(2 if part == "encoder" else 3):
                shapes |= _residual(f"{prefix}{part}.{name}.block.{block}", inner, width)
                inner = width
            last = name in ("down.3", "up.0")
            if not last:
                kind = "downsample" if part == "encoder" else "upsample"
                shapes |= _layer(f"{prefix}{part}.{name}.{kind}.conv", width, width, 3, 3)
        middle = f"{prefix}{part}.mid."
        shapes |= _residual(f"{middle}block_1", widths[-1], widths[-1])
        shapes |= _norm(f"{middle}attn_1.norm", widths[-1])
        for name in ("q", "k", "v", "proj_out"):
            shapes |= _layer(f"{middle}attn_1.{name}", widths[-1], widths[-1], 1, 1)
        shapes |= _residual(f"{middle}block_2", widths[-1], widths[-1])
        shapes |= _norm(f"{prefix}{part}.norm_out", inner) | _layer(f"{prefix}{part}.conv_out", moments, inner, 3, 3)
    shapes |= _layer(f"{prefix}quant_conv", 2 * latents, 2 * latents, 1, 1)
    return shapes | _layer(f"{prefix}post_quant_conv", latents, latents, 1, 1)


def text_encoders(clip_l: TextSizes = CLIP_L, clip_g: TextSizes = OPEN_CLIP_G) -> dict[str, Shape]:
    """Both text encoders under the names of a whole SDXL checkpoint."""
    first = clip(clip_l, "conditioner.embedders.0.transformer.")
    return first | open_clip(clip_g, "conditioner.embedders.1.model.")


def sdxl_checkpoint() -> dict[str, Shape]:
    """Every tensor of a whole SDXL checkpoint: 6.94 GB as fp16."""
    return text_encoders() | vae("first_stage_model.") | tensor_shapes(SDXL_BASE, "prefixed")


def _vae_levels(part: str, widths: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Name and width of each level in forward order."""
    if part == "encoder":
        yield from ((f"down.{level}", width) for level, width in enumerate(widths))
    else:
        yield from ((f"up.{level}", widths[level]) for level in reversed(range(len(widths))))


def _residual(name: str, inner: int, outer: int) -> dict[str, Shape]:
    shapes = _norm(f"{name}.norm1", inner) | _layer(f"{name}.conv1", outer, inner, 3, 3)
    shapes |= _norm(f"{name}.norm2", outer) | _layer(f"{name}.conv2", outer, outer, 3, 3)
    return shapes | (_layer(f"{name}.nin_shortcut", outer, inner, 1, 1) if inner != outer else {})


def _layer(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
