"""Names and shapes of well-known checkpoints of each family, from diffusers' classes on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from nfq_core.models.unet_keys import Shape

from .shared import unavailable


class Checkpoint(NamedTuple):
    """A published checkpoint.

    Args:
        family: name of its family, as in `nfq info`.
        name: its own name.
        kind: diffusers' class.
        config: its arguments that differ from the class's defaults.
        added: names and shapes that the class lacks.
        renamed: parts of names, and what they become.
    """

    family: str
    name: str
    kind: str
    config: Mapping[str, Any] = {}
    added: Callable[[], dict[str, Shape]] = dict
    renamed: Mapping[str, str] = {}


def llm_adapter(width: int = 1024, blocks: int = 6, words: int = 32128) -> dict[str, Shape]:
    """Anima's text adapter, as ComfyUI names it; diffusers has no class for it."""
    shapes: dict[str, Shape] = {
        "llm_adapter.embed.weight": (words, width),
        "llm_adapter.out_proj.weight": (width, width),
    }
    for number in range(blocks):
        block = f"llm_adapter.blocks.{number}."
        for kind in ("self_attn", "cross_attn"):
            shapes |= {f"{block}{kind}.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{block}mlp.0.weight": (4 * width, width), f"{block}mlp.2.weight": (width, 4 * width)}
    return shapes


_COSMOS_2B = {
    "in_channels": 17,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 28,
    "extra_pos_embed_type": None,
}

_COMFYUI_NAMES = {
    "transformer_blocks.": "blocks.",
    "ff.net.0.proj.": "mlp.layer1.",
    "ff.net.2.": "mlp.layer2.",
    "norm1.linear_": "adaln_modulation_self_attn.",
    "norm2.linear_": "adaln_modulation_cross_attn.",
    "norm3.linear_": "adaln_modulation_mlp.",
}
"""Anima is published with ComfyUI's names."""

CHECKPOINTS = (
    Checkpoint("Stable Diffusion 1", "SD 1.5", "UNet2DConditionModel", {"cross_attention_dim": 768}),
    Checkpoint(
        "Stable Diffusion 2",
        "SD 2.1",
        "UNet2DConditionModel",
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    Checkpoint(
        "SDXL",
        "SDXL base 1.0",
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    Checkpoint(
        "Stable Diffusion 3",
        "SD 3.5 medium",
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    Checkpoint(
        "Stable Diffusion 3",
        "SD 3.5 large",
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    Checkpoint("Flux.1", "Flux.1 dev", "FluxTransformer2DModel", {"guidance_embeds": True}),
    Checkpoint(
        "Flux.2",
        "Flux.2 Klein 4B",
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    Checkpoint("Flux.2", "Flux.2 dev", "Flux2Transformer2DModel"),
    Checkpoint("Chroma", "Chroma1 HD", "ChromaTransformer2DModel"),
    Checkpoint("Z-Image", "Z-Image Turbo", "ZImageTransformer2DModel"),
    Checkpoint("Lumina 2", "Lumina Image 2.0", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    Checkpoint("Qwen-Image", "Qwen-Image", "QwenImageTransformer2DModel"),
    Checkpoint("Anima", "Anima", "CosmosTransformer3DModel", _COSMOS_2B, llm_adapter, _COMFYUI_NAMES),
    Checkpoint("Cosmos-Predict2", "Cosmos-Predict2 2B", "CosmosTransformer3DModel", _COSMOS_2B),
    Checkpoint(
        "Wan", "Wan 2.1 1.3B", "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    ),
    Checkpoint(
        "Wan",
        "Wan 2.2 5B",
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ),
    Checkpoint("Wan", "Wan 2.1 or 2.2 14B", "WanTransformer3DModel"),
)


def shapes_of(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Shape of each of its tensors by diffusers' name, or as `Checkpoint.renamed` says.

    Raises:
        ImportError: diffusers is missing.
    """
    reason = unavailable("diffusers")
    if reason:
        raise ImportError(reason)
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, checkpoint.kind)(**checkpoint.config)
    shapes = {}
    for name, tensor in model.state_dict().items():
        for part, new in checkpoint.renamed.items():
            name = name.replace(part, new)
        shapes[name] = tuple(tensor.shape)
    return shapes | checkpoint.added()
