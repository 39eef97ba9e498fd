"""Small models of other families: the host's tensor names by hand, and diffusers' own classes."""

from __future__ import annotations

import torch

WIDTH = 64

Shapes = dict[str, tuple[int, ...]]


def layers(path: str, *names: str, inputs: int = WIDTH) -> Shapes:
    """Linear layers with biases."""
    shapes: Shapes = {}
    for name in names:
        shapes |= {f"{path}{name}.weight": (WIDTH, inputs), f"{path}{name}.bias": (WIDTH,)}
    return shapes


def blocks(path: str, *names: str, count: int = 24, inputs: int = WIDTH) -> Shapes:
    """Blocks of such layers."""
    shapes: Shapes = {}
    for number in range(count):
        shapes |= layers(f"{path}.{number}.", *names, inputs=inputs)
    return shapes


def of_streams(names: str, *streams: str) -> list[str]:
    """Names of the layers of both streams."""
    return [name.format(stream) for stream in streams for name in names.split()]


_FLUX = blocks("double_blocks", *of_streams("{}_attn.qkv {}_attn.proj {}_mlp.0 {}_mlp.2", "img", "txt")) | blocks(
    "single_blocks", "linear1", "linear2"
)
_MMDIT = of_streams("{}.attn.qkv {}.attn.proj {}.mlp.fc1 {}.mlp.fc2 {}.adaLN_modulation.1", "x_block", "context_block")
_NEXT_DIT = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_REFINERS = (
    blocks("layers", *_NEXT_DIT)
    | blocks("noise_refiner", *_NEXT_DIT, count=2)
    | {"noise_refiner.0.attention_norm1.weight": (WIDTH,)}
    | blocks("context_refiner", *_NEXT_DIT, count=2)
)
_NEXT_DIT_OUTER = layers(
    "", "x_embedder", "t_embedder.mlp.0", "cap_embedder.1", "final_layer.linear", "final_layer.adaLN_modulation.1"
)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
_COSMOS = blocks(
    "blocks",
    *(f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in _ATTENTION),
    *("mlp.layer1", "mlp.layer2"),
    *(f"adaln_modulation_{part}.{n}" for part in ("self_attn", "cross_attn", "mlp") for n in (1, 2)),
)
_COSMOS_OUTER = layers(
    "", "x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "final_layer.linear",
    "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2",
)  # fmt: skip
_QWEN = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *("attn.to_out.0", "attn.to_add_out", "img_mod.1", "txt_mod.1"),
    *of_streams("{}_mlp.net.0.proj {}_mlp.net.2", "img", "txt"),
)

COMFYUI: dict[str, tuple[Shapes, Shapes]] = {
    "Flux.1": (
        _FLUX | blocks("double_blocks", "img_mod.lin", "txt_mod.lin") | blocks("single_blocks", "modulation.lin"),
        layers(
            "", "img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1",
            *(f"{part}_in.{side}_layer" for part in ("time", "vector", "guidance") for side in ("in", "out")),
        ),
    ),
    "Flux.2": (
        _FLUX,
        layers(
            "", "img_in", "txt_in", "time_in.in_layer", "guidance_in.in_layer", "final_layer.linear",
            "final_layer.adaLN_modulation.1", "double_stream_modulation_img.lin", "double_stream_modulation_txt.lin",
            "single_stream_modulation.lin",
        ),
    ),
    "Chroma": (
        _FLUX,
        layers(
            "", "img_in", "txt_in", "final_layer.linear", "distilled_guidance_layer.in_proj",
            "distilled_guidance_layer.layers.0.in_layer", "distilled_guidance_layer.layers.1.in_layer",
            "distilled_guidance_layer.out_proj",
        ),
    ),
    "Stable Diffusion 3": (
        blocks("joint_blocks", *_MMDIT, "x_block.attn2.qkv", "x_block.attn2.proj"),
        layers(
            "", "t_embedder.mlp.0", "y_embedder.mlp.0", "context_embedder", "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        ) | {"x_embedder.proj.weight": (WIDTH, 16, 2, 2), "pos_embed": (1, 64, WIDTH)},
    ),
    "Qwen-Image": (
        blocks("transformer_blocks", *_QWEN),
        layers("", "img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "proj_out")
        | {"txt_norm.weight": (WIDTH,)},
    ),
    "Z-Image": (
        _REFINERS
        | blocks("layers", "adaLN_modulation.0", inputs=16)
        | blocks("noise_refiner", "adaLN_modulation.0", count=2, inputs=16),
        _NEXT_DIT_OUTER | {"x_pad_token": (1, 4096), "cap_pad_token": (1, 4096)},
    ),
    "Lumina 2": (
        _REFINERS
        | blocks("layers", "adaLN_modulation.1", inputs=16)
        | blocks("noise_refiner", "adaLN_modulation.1", count=2, inputs=16),
        _NEXT_DIT_OUTER,
    ),
    "Anima": (
        _COSMOS
        | blocks("llm_adapter.blocks", "self_attn.q_proj", "self_attn.o_proj", "cross_attn.q_proj", "mlp.0", count=2)
        | layers("llm_adapter.", "out_proj"),
        _COSMOS_OUTER | {"llm_adapter.embed.weight": (512, WIDTH)},
    ),
    "Cosmos-Predict2": (_COSMOS, _COSMOS_OUTER),
    "Wan": (
        blocks(
            "blocks",
            *(f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"),
            *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"),
        ),
        layers("", "text_embedding.0", "time_embedding.0", "time_projection.1", "head.head", "img_emb.proj.1")
        | {"patch_embedding.weight": (WIDTH, 16, 1, 2, 2), "head.modulation": (1, 2, 4096)}
        | {f"blocks.{number}.modulation": (1, 6, 1024) for number in range(24)},
    ),
}  # fmt: skip
"""By family: tensors of the repeated blocks and of the rest, as ComfyUI 0.33's model classes name them."""

CAREFUL = {
    "Flux.2": ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
    "Qwen-Image": ("transformer_blocks.0.img_mod",),
    "Z-Image": ("adaLN_modulation.0",),
    "Lumina 2": ("adaLN_modulation.1", ".norm1.linear"),
    "Anima": ("blocks.0.", "blocks.1.adaln_modulation", "llm_adapter."),
    "Cosmos-Predict2": ("blocks.0.", "blocks.1.adaln_modulation", "blocks.1.norm"),
    "Wan": ("time_projection", "time_proj."),
}
"""By family: parts of the names of layers that get 8 bits, except in the final layer."""


def random_tensors(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Gaussian tensors of these shapes."""
    generator = torch.Generator().manual_seed(0)
    return {key: (torch.randn(shape, generator=generator) * 0.03).to(dtype) for key, shape in shapes.items()}


def diffusers_models() -> dict[str, torch.nn.Module]:
    """A small model of diffusers' own class by family, with random weights."""
    import diffusers as d

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 32}
    joint = {**heads, "joint_attention_dim": 64}
    deep = {"num_layers": 2, "num_single_layers": 2}
    next_dit = {"axes_lens": (16, 16, 16), "cap_feat_dim": 64, "n_refiner_layers": 1}
    return {
        "Flux.1": d.FluxTransformer2DModel(
            in_channels=16, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12), **joint, **deep
        ),
        "Flux.2": d.Flux2Transformer2DModel(in_channels=16, axes_dims_rope=(8, 8, 8, 8), **joint, **deep),
        "Chroma": d.ChromaTransformer2DModel(
            in_channels=16, axes_dims_rope=(8, 12, 12), approximator_hidden_dim=64, approximator_layers=2, **joint,
            **deep,
        ),
        "Stable Diffusion 3": d.SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=2, caption_projection_dim=64, pooled_projection_dim=32,
            out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm", **joint,
        ),
        "Qwen-Image": d.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, axes_dims_rope=(8, 12, 12), **joint
        ),
        "Z-Image": d.ZImageTransformer2DModel(
            in_channels=4, dim=64, n_layers=2, n_heads=2, n_kv_heads=2, axes_dims=[8, 12, 12], **next_dit
        ),
        "Lumina 2": d.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=64, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=32, axes_dim_rope=(8, 12, 12), axes_lens=(16, 16, 16), cap_feat_dim=64,
        ),
        "Cosmos-Predict2": d.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_layers=2, text_embed_dim=64, adaln_lora_dim=32, max_size=(8, 8, 8),
            extra_pos_embed_type=None, **heads,
        ),
        "Wan": d.WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=64, freq_dim=32, ffn_dim=128, num_layers=2, rope_max_seq_len=32,
            **heads,
        ),
    }  # fmt: skip
