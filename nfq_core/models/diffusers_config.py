"""The `config.json` that diffusers needs to build a UNet of the SDXL family."""

from __future__ import annotations

from typing import Any

from .unet_keys import UNetArchitecture

HEAD_WIDTH = 64
"""Channels of an attention head in every member of the family."""

PICTURE_SIDE = 1024
"""Side in pixels of the pictures that a pipeline draws by default; eight times the side of its latents."""


def diffusers_config(architecture: UNetArchitecture) -> dict[str, Any]:
    """The settings of diffusers' UNet2DConditionModel for an architecture.

    The tensors decide all settings but three, which are those of every published model of the family: the width of
    attention heads, the width of each number's embedding in the added condition, and the default size of pictures.
    """
    down, up, middle = architecture.down_depths, architecture.up_depths, architecture.middle_depth
    depths: dict[str, Any] = {
        "transformer_layers_per_block": [list(level) for level in down],
        "reverse_transformer_layers_per_block": [list(level) for level in up],
    }
    if middle:
        # diffusers takes the middle's depth from the last level, which must then be a number, not a list.
        depths = {"transformer_layers_per_block": [max(level) or middle for level in down]}
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "sample_size": PICTURE_SIDE // 8,
        "block_out_channels": list(architecture.channels),
        "layers_per_block": len(down[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if level[0] else "DownBlock2D" for level in down],
        "mid_block_type": {None: None, 0: "UNetMidBlock2D"}.get(middle, "UNetMidBlock2DCrossAttn"),
        "up_block_types": ["CrossAttnUpBlock2D" if level[0] else "UpBlock2D" for level in up],
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in architecture.channels],
        "cross_attention_dim": architecture.context_width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": architecture.added_width,
        "use_linear_projection": True,
        "time_cond_proj_dim": architecture.guidance_width or None,
        **depths,
    }
