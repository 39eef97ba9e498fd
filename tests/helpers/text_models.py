"""Names, shapes and random weights of small text encoders, in the layouts in which files have them."""

from __future__ import annotations

import torch

from benchmarks.checkpoint_shapes import TextSizes
from nfq_core.models.unet_keys import Shape

SMALL_L, SMALL_G = TextSizes(768, 1, words=96, positions=8), TextSizes(1280, 1, words=96, positions=8)
"""One layer of each of SDXL's text encoders, which are recognised by their widths."""

TINY = TextSizes(128, 2, words=96)


def t5(sizes: TextSizes, prefix: str = "") -> dict[str, Shape]:
    """T5's encoder."""
    width = sizes.width
    shapes: dict[str, Shape] = {f"{prefix}shared.weight": (sizes.words, width)}
    for index in range(sizes.layers):
        block = f"{prefix}encoder.block.{index}.layer."
        shapes |= {f"{block}0.SelfAttention.{name}.weight": (width, width) for name in "qkvo"}
        if not index:
            shapes[f"{block}0.SelfAttention.relative_attention_bias.weight"] = (32, width // 2)
        shapes |= {f"{block}0.layer_norm.weight": (width,), f"{block}1.layer_norm.weight": (width,)}
        shapes |= {f"{block}1.DenseReluDense.{name}.weight": (4 * width, width) for name in ("wi_0", "wi_1")}
        shapes[f"{block}1.DenseReluDense.wo.weight"] = (width, 4 * width)
    return shapes | {f"{prefix}encoder.final_layer_norm.weight": (width,)}


def decoder(sizes: TextSizes, path: str = "model.", marks: dict[str, Shape] | None = None) -> dict[str, Shape]:
    """A decoder-only language model.

    Args:
        sizes: its sizes.
        path: what precedes `layers.` and `embed_tokens.`.
        marks: further tensors of each layer, by which families differ.
    """
    width = sizes.width
    shapes: dict[str, Shape] = {f"{path}embed_tokens.weight": (sizes.words, width)}
    for index in range(sizes.layers):
        layer = f"{path}layers.{index}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (4 * width, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, 4 * width), f"{layer}input_layernorm.weight": (width,)}
        shapes |= {f"{layer}{name}": shape for name, shape in (marks or {}).items()}
    return shapes | {f"{path}norm.weight": (width,)}


def random_tensors(shapes: dict[str, Shape], dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Random weights of trained magnitudes."""
    generator = torch.Generator().manual_seed(0)
    return {key: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for key, shape in shapes.items()}
