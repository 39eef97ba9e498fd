"""Tiny models of other families, made from the host's own classes: two blocks, real names, random weights.

The host reads most sizes from a file. Some it takes from the family's published models: `_NARROW` has them for ours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.supported_models
import torch

WIDTH = 128

_SD1 = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "context_dim": 768},
    **{"num_res_blocks": [1, 1, 1, 1], "channel_mult": [1, 2, 4, 4], "adm_in_channels": None, "legacy": False},
    **{"transformer_depth": [1, 1, 1, 0], "transformer_depth_output": [1] * 6 + [0] * 2},
    **{"transformer_depth_middle": 1, "use_linear_in_transformer": False, "use_spatial_transformer": True},
    **{"use_temporal_attention": False, "num_heads": 8, "num_head_channels": -1},
}
_MMDIT = {
    **{"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 64},
    **{"num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms", "pos_embed_scaling_factor": None},
    **{"x_block_self_attn_layers": [0]},
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 96, "out_features": WIDTH}},
}
_FLUX = {
    **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": WIDTH},
    **{"vec_in_dim": 64, "context_in_dim": 96, "mlp_ratio": 4.0, "num_heads": 1, "axes_dim": [16, 56, 56]},
    **{"theta": 10000, "qkv_bias": True, "txt_ids_dims": [], "depth": 2, "depth_single_blocks": 2},
}
_CHROMA = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": WIDTH, "hidden_dim": 64, "n_layers": 2}
_FLUX2 = {
    **{"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "mlp_ratio": 3.0},
    **{
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "global_modulation": True,
        "mlp_silu_act": True,
        "vec_in_dim": None,
    },
    **{"qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3], "guidance_embed": True},
}
_NEXT_DIT = {
    **{
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "cap_feat_dim": 96,
        "n_layers": 2,
        "qk_norm": True,
    },
    **{"axes_lens": [300, 512, 512]},
}
_LUMINA = {"n_heads": 2, "n_kv_heads": 1, "axes_dims": [16, 24, 24], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0}
_Z_IMAGE = {
    **{"n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0},
    **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
}
_QWEN = {"num_attention_heads": 1, "joint_attention_dim": 96}
_COSMOS_SIZES = {"num_heads": 1, "crossattn_emb_channels": 96, "adaln_lora_dim": 64, "num_blocks": 2}
_COSMOS = {
    **{"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16},
    **{"patch_spatial": 2, "patch_temporal": 1, "model_channels": WIDTH, "concat_padding_mask": True},
    **{"pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "use_adaln_lora": True},
    **{"extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0},
    **{"rope_enable_fps_modulation": False, **_COSMOS_SIZES},
}
_WAN = {
    **{"image_model": "wan2.1", "model_type": "t2v", "dim": WIDTH, "out_dim": 16, "in_dim": 16, "num_heads": 1},
    **{"ffn_dim": 256, "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 256, "text_dim": 4096},
    **{"window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6},
}


@dataclass(frozen=True)
class TinyFamily:
    """A tiny model of a family.

    Args:
        host_class: the host's class for the family, in `comfy.supported_models`.
        config: what the host's network class gets.
        loras: names of layers in the layout of the family's usual LoRAs.
        text: width of the text's tokens.
        pooled: width of the pooled text; 0 if the host asks for none.
        prefix: prefix of its names in the file.
    """

    host_class: str
    config: dict[str, Any]
    loras: tuple[str, ...]
    text: int = 96
    pooled: int = 0
    prefix: str = ""


_FLUX_LORA = (
    *(f"transformer.transformer_blocks.1.attn.{part}" for part in ("to_q", "to_v", "add_k_proj", "to_out.0")),
    *(f"transformer.single_transformer_blocks.0.{part}" for part in ("attn.to_k", "proj_mlp", "proj_out")),
)
_COSMOS_LORA = ("diffusion_model.blocks.1.self_attn.q_proj", "diffusion_model.blocks.1.mlp.layer1")

TINY = {
    "Stable Diffusion 1": TinyFamily(
        "SD15",
        _SD1,
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2",
        ),
        text=768,
        prefix="model.diffusion_model.",
    ),
    "Stable Diffusion 3": TinyFamily(
        "SD3",
        _MMDIT,
        tuple(f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_v", "add_k_proj", "to_out.0")),
        pooled=64,
        prefix="model.diffusion_model.",
    ),
    "Flux.1": TinyFamily("Flux", {**_FLUX, "guidance_embed": True}, _FLUX_LORA, pooled=64),
    "Flux.2": TinyFamily("Flux2", {**_FLUX, **_FLUX2}, _FLUX_LORA[:4], pooled=64),
    "Chroma": TinyFamily("Chroma", {**_FLUX, "image_model": "chroma", **_CHROMA}, _FLUX_LORA, pooled=64),
    "Lumina 2": TinyFamily(
        "Lumina2", {**_NEXT_DIT, "dim": 128, **_LUMINA}, ("diffusion_model.layers.0.attention.qkv",)
    ),
    "Z-Image": TinyFamily(
        "ZImage",
        {**_NEXT_DIT, "dim": 256, **_Z_IMAGE},
        tuple(
            f"diffusion_model.layers.0.{part}" for part in ("attention.to_q", "attention.to_out.0", "feed_forward.w1")
        ),
    ),
    "Qwen-Image": TinyFamily(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, **_QWEN},
        tuple(f"transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.add_v_proj", "img_mlp.net.2")),
    ),
    "Anima": TinyFamily("Anima", {"image_model": "anima", **_COSMOS}, _COSMOS_LORA, prefix="net."),
    "Cosmos-Predict2": TinyFamily(
        "CosmosT2IPredict2", {"image_model": "cosmos_predict2", **_COSMOS}, _COSMOS_LORA, prefix="net."
    ),
    "Wan 2.1": TinyFamily(
        "WAN21_T2V",
        _WAN,
        tuple(f"diffusion_model.blocks.0.{part}" for part in ("self_attn.q", "cross_attn.v", "ffn.0")),
        text=4096,
    ),
    "Wan 2.2": TinyFamily(
        "WAN22_T2V",
        {**_WAN, "in_dim": 48, "out_dim": 48},
        tuple(f"diffusion_model.blocks.0.{part}" for part in ("self_attn.q", "cross_attn.v", "ffn.0")),
        text=4096,
        prefix="model.diffusion_model.",
    ),
}
"""By family."""

_NARROW = (
    ({"image_model": "flux", "hidden_size": WIDTH}, {"num_heads": 1}),
    ({"image_model": "flux2", "hidden_size": WIDTH}, {"num_heads": 1}),
    ({"image_model": "chroma"}, {**_CHROMA, "num_heads": 1}),
    ({"image_model": "lumina2", "dim": 128}, _LUMINA),
    ({"image_model": "lumina2", "dim": 256}, _Z_IMAGE),
    ({"image_model": "qwen_image"}, _QWEN),
    ({"image_model": "anima"}, _COSMOS_SIZES),
    ({"image_model": "cosmos_predict2"}, _COSMOS_SIZES),
)
"""What tells a family in the host's findings, and the sizes of our model of it."""


def know_tiny_families() -> None:
    """Let the host recognise these models by the same names as the published ones."""
    detect = comfy.model_detection.detect_unet_config

    def detect_tiny(state_dict: dict, key_prefix: str, **options: Any) -> dict | None:
        found = detect(state_dict, key_prefix, **options)
        for told, sizes in _NARROW if found else ():
            if all(found.get(name) == value for name, value in told.items()):
                found.update(sizes)
        return found

    comfy.model_detection.detect_unet_config = detect_tiny
    for name, sizes in (("SD15", {"model_channels": 32}), ("ZImage", {"dim": 256})):
        known = getattr(comfy.supported_models, name, None)
        if known is not None:
            narrow = type(f"Narrow{name}", (known,), {"unet_config": {**known.unet_config, **sizes}})
            comfy.supported_models.models.insert(0, narrow)
    if is_known("Anima"):
        from comfy.ldm.anima import model

        sizes = {"source_dim": 96, "target_dim": 96, "model_dim": 96, "num_layers": 2, "num_heads": 2}
        model.LLMAdapter = functools.partial(model.LLMAdapter, **sizes)


def is_known(name: str) -> bool:
    """Whether this version of the host has the family."""
    return hasattr(comfy.supported_models, TINY[name].host_class)


def random_model(name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A tiny model's file: weights that keep activations in range, under the family's names."""
    tiny = TINY[name]
    config = getattr(comfy.supported_models, tiny.host_class)(dict(tiny.config))
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "", device=torch.device("cpu")).diffusion_model
    generator = torch.Generator().manual_seed(0)
    result = {}
    for key, value in network.state_dict().items():
        weight = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            weight /= value[0].numel() ** 0.5
        else:
            weight = 0.05 * weight + (not key.endswith("bias"))
        result[tiny.prefix + key] = weight.to(dtype)
    return result


def fill(network: torch.nn.Module) -> None:
    """Set weights that keep activations in range and are exact in fp16."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in network.named_parameters():
        weight = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            weight /= parameter[0].numel() ** 0.5
        else:
            weight = 0.05 * weight + ("norm" in name and name.endswith("weight"))
        parameter.data = weight.half().to(parameter.dtype)
