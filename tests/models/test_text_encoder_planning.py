"""Text encoders are recognised by names and shapes, in every layout in which files have them."""

from __future__ import annotations

import pytest
from samples import TINY as TINY_UNET
from text_models import TINY, decoder, t5

from benchmarks.checkpoint_shapes import CLIP_L, OPEN_CLIP_G, TextSizes, clip, open_clip, sdxl_checkpoint
from nfq_core.models.components import find_components
from nfq_core.models.text_encoders import find_text_encoders, text_encoder_warnings
from nfq_core.models.unet import detect
from nfq_core.models.unet_keys import SDXL_BASE, SDXL_REFINER, tensor_shapes

LDM_L, LDM_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
WIDE = TextSizes(4096, 1, words=32128)


def without_text_model(prefix: str) -> dict[str, tuple[int, ...]]:
    """CLIP-L as old SD 1.5 checkpoints name it."""
    return {key.replace("text_model.", ""): shape for key, shape in clip(CLIP_L, prefix).items()}


FOUND = {
    "SDXL's CLIP-L": (clip(CLIP_L, LDM_L), "CLIP-L", LDM_L),
    "SDXL's OpenCLIP-G": (open_clip(OPEN_CLIP_G, LDM_G), "OpenCLIP-G", LDM_G),
    "the refiner's": (open_clip(OPEN_CLIP_G, "conditioner.embedders.0.model."), "OpenCLIP-G", LDM_G.replace("1", "0")),
    "SD 1.5": (clip(CLIP_L, "cond_stage_model.transformer."), "CLIP-L", "cond_stage_model.transformer."),
    "old SD 1.5": (without_text_model("cond_stage_model.transformer."), "CLIP-L", "cond_stage_model.transformer."),
    "SD 2": (open_clip(TextSizes(1024, 24), "cond_stage_model.model."), "OpenCLIP-H", "cond_stage_model.model."),
    "CLIP in transformers": (clip(CLIP_L), "CLIP-L", ""),
    "diffusers' second": (clip(OPEN_CLIP_G) | {"text_projection.weight": (1280, 1280)}, "OpenCLIP-G", ""),
    "OpenCLIP alone": (open_clip(OPEN_CLIP_G), "OpenCLIP-G", ""),
    "CLIP of another width": (clip(TextSizes(512, 2)), "CLIP", ""),
    "T5": (t5(TINY), "T5", ""),
    "T5-XXL": (t5(WIDE), "T5-XXL", ""),
    "UMT5": (t5(TextSizes(128, 1, words=256384)), "UMT5", ""),
    "in a host's checkpoint": (
        t5(WIDE, "text_encoders.t5xxl.transformer."),
        "T5-XXL",
        "text_encoders.t5xxl.transformer.",
    ),
    "Llama": (decoder(TINY), "Llama or Mistral", ""),
    "Qwen 2": (decoder(TINY, marks={"self_attn.q_proj.bias": (128,)}), "Qwen 2", ""),
    "Qwen 3": (decoder(TINY, marks={"self_attn.q_norm.weight": (64,)}), "Qwen 3", ""),
    "Gemma": (decoder(TINY, marks={"pre_feedforward_layernorm.weight": (128,)}), "Gemma", ""),
    "with images": (decoder(TINY, "model.language_model."), "Llama or Mistral", ""),
    "with images, older": (decoder(TINY, "language_model.model."), "Llama or Mistral", ""),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    shapes, name, prefix = FOUND[case]
    (encoder,) = find_text_encoders(shapes)
    assert (encoder.name, encoder.prefix) == (name, prefix)
    assert all(map(encoder.owns, shapes))


NOT_TEXT_ENCODERS = {
    "a UNet": tensor_shapes(SDXL_BASE, "prefixed"),
    "an image encoder": {
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (1024, 1024),
        "vision_model.embeddings.position_embedding.weight": (257, 1024),
    },
    "OpenCLIP's image encoder": {"visual.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)},
    "a LoRA": {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (8, 768)},
    "a part of one": {key: shape for key, shape in clip(CLIP_L).items() if "token_embedding" not in key},
    "another width": clip(CLIP_L) | {"text_model.embeddings.token_embedding.weight": (49408, 512)},
    "a language model that draws": decoder(TINY, "model.diffusion_model.model."),
}


@pytest.mark.parametrize("case", NOT_TEXT_ENCODERS)
def test_not_found(case):
    assert find_text_encoders(NOT_TEXT_ENCODERS[case]) == []


def test_parts():
    """Embeddings apart from layers; positions, biases and projections stay."""
    shapes = clip(CLIP_L, LDM_L) | open_clip(OPEN_CLIP_G, LDM_G)
    first, second = find_text_encoders(shapes)
    parts = {key: (first if first.owns(key) else second).part(key, shape) for key, shape in shapes.items()}
    assert {key for key, part in parts.items() if part == "embedding"} == {
        f"{LDM_L}text_model.embeddings.token_embedding.weight",
        f"{LDM_G}token_embedding.weight",
    }
    # Six weights a layer in transformers' names, four in OpenCLIP's, whose attention is fused.
    assert sum(part == "weight" for part in parts.values()) == 6 * 12 + 4 * 32
    kept = {key for key, part in parts.items() if part == "kept" and len(shapes[key]) == 2}
    assert kept == {
        f"{LDM_L}text_model.embeddings.position_embedding.weight",
        f"{LDM_G}positional_embedding",
        f"{LDM_G}text_projection",
    }


@pytest.mark.parametrize(
    ("shapes", "key", "part"),
    [
        (t5(TINY), "shared.weight", "embedding"),
        (t5(TINY), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "kept"),
        (t5(TINY), "encoder.block.1.layer.1.DenseReluDense.wo.weight", "weight"),
        (decoder(TINY), "model.embed_tokens.weight", "embedding"),
        (decoder(TINY) | {"lm_head.weight": (96, 128)}, "lm_head.weight", "embedding"),
        (
            decoder(TINY) | {"visual.patch_embed.proj.weight": (64, 3, 2, 14, 14)},
            "visual.patch_embed.proj.weight",
            "kept",
        ),
        (decoder(TINY) | {"visual.blocks.0.attn.qkv.weight": (192, 64)}, "visual.blocks.0.attn.qkv.weight", "weight"),
    ],
)
def test_parts_of_other_families(shapes, key, part):
    (encoder,) = find_text_encoders(shapes)
    assert encoder.owns(key) and encoder.part(key, shapes[key]) == part


def test_the_components_of_a_whole_checkpoint():
    shapes = sdxl_checkpoint() | {"v_pred": (0,)}
    components = find_components(detect(shapes), shapes)
    assert [(each.kind, each.name, len(each.keys)) for each in components] == [
        ("diffusion model", "SDXL", 1680),
        ("text encoder", "CLIP-L", 196),
        ("text encoder", "OpenCLIP-G", 390),
        ("VAE", "VAE", 248),
        ("other", "other", 1),
    ]
    assert sorted(key for each in components for key in each.keys) == sorted(shapes)


def test_a_plain_state_dict_is_one_component():
    """Even if its keys begin like a VAE's next to other models."""
    shapes = {"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3), "a.weight": (64, 64)}
    (only,) = find_components(detect(shapes), shapes)
    assert (only.kind, only.keys) == ("other", tuple(shapes))


def warnings(shapes):
    return text_encoder_warnings(detect(shapes), shapes)


def test_a_checkpoint_with_the_text_encoders_of_its_unet():
    unet, encoders = tensor_shapes(SDXL_BASE, "prefixed"), clip(CLIP_L, LDM_L) | open_clip(OPEN_CLIP_G, LDM_G)
    assert warnings(unet | encoders) == []
    assert warnings(unet) == []
    assert warnings(encoders) == []
    refiner = tensor_shapes(SDXL_REFINER, "prefixed")
    assert warnings(refiner | open_clip(OPEN_CLIP_G, "conditioner.embedders.0.model.")) == []
    assert warnings(tensor_shapes(TINY_UNET, "prefixed") | encoders) == []


def test_a_checkpoint_with_one_of_two_or_a_foreign_one():
    unet = tensor_shapes(SDXL_BASE, "prefixed")
    assert warnings(unet | clip(CLIP_L, LDM_L)) == [
        f"the checkpoint's text encoders are CLIP-L ({LDM_L}*); its UNet also reads OpenCLIP-G (conditioner.*), so "
        "load CLIP from another file"
    ]
    (foreign,) = warnings(unet | clip(CLIP_L, "cond_stage_model.transformer."))
    assert "are CLIP-L (cond_stage_model.transformer.*)" in foreign
    assert "its UNet also reads CLIP-L and OpenCLIP-G (conditioner.*)" in foreign
