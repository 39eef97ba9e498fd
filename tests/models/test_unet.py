"""SDXL-family UNets: derived names and shapes, renaming, detection."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from samples import TINY, unet_config

from nfq_core.models.diffusers_config import diffusers_config
from nfq_core.models.unet import (
    UNKNOWN,
    detect,
    diffusers_names,
    first_and_last_convolution,
    is_unet_key,
    ldm_names,
    mismatch_message,
)
from nfq_core.models.unet_keys import (
    CHECKPOINT_PREFIX,
    KNOWN_ARCHITECTURES,
    KOALA_700M,
    SDXL_BASE,
    SDXL_REFINER,
    SEGMIND_VEGA,
    SSD_1B,
    diffusers_to_ldm,
    ldm_to_diffusers,
    tensor_shapes,
)

LAYOUTS = ("ldm", "prefixed", "diffusers")

LCM = replace(SDXL_BASE, guidance_width=256)
"""SDXL distilled to latent consistency, as a UNet of its own."""

BESIDE_THE_UNET = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.decoder.conv_out.weight": (3, 128, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "v_pred": (0,),
    "ztsnr": (0,),
}

each_architecture = pytest.mark.parametrize("architecture", KNOWN_ARCHITECTURES, ids=lambda known: known.name)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def test_sdxl_has_its_published_size():
    for layout in LAYOUTS:
        shapes = tensor_shapes(SDXL_BASE, layout)
        assert len(shapes) == 1680
        assert sum(map(math.prod, shapes.values())) == 2_567_463_684


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [(SDXL_REFINER, 2260), (SSD_1B, 1331), (SEGMIND_VEGA, 745), (KOALA_700M, 783)],
    ids=lambda value: getattr(value, "name", None),
)
def test_relatives_have_their_published_size(architecture, millions):
    weights = sum(map(math.prod, tensor_shapes(architecture, "ldm").values()))
    assert round(weights / 1e6) == millions


def test_names_known_by_hand():
    to_ldm = diffusers_to_ldm(SDXL_BASE)
    shapes = tensor_shapes(SDXL_BASE, "ldm")
    for diffusers, ldm, shape in [
        ("conv_in.weight", "input_blocks.0.0.weight", (320, 4, 3, 3)),
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight", (1280, 2816)),
        ("down_blocks.0.downsamplers.0.conv.bias", "input_blocks.3.0.op.bias", (320,)),
        (
            "down_blocks.1.resnets.0.conv_shortcut.weight",
            "input_blocks.4.0.skip_connection.weight",
            (640, 320, 1, 1),
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
            (1280, 2048),
        ),
        ("mid_block.resnets.1.time_emb_proj.weight", "middle_block.2.emb_layers.1.weight", (1280, 1280)),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("up_blocks.2.resnets.0.norm1.weight", "output_blocks.6.0.in_layers.0.weight", (960,)),
        ("conv_out.weight", "out.2.weight", (4, 320, 3, 3)),
    ]:
        assert to_ldm[diffusers] == ldm
        assert shapes[ldm] == shape


def test_upsampler_follows_the_attention_only_where_there_is_one():
    refiner = diffusers_to_ldm(SDXL_REFINER)
    assert refiner["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.2.1.conv.weight"
    assert refiner["up_blocks.1.upsamplers.0.conv.weight"] == "output_blocks.5.2.conv.weight"


@each_architecture
def test_renaming_is_a_bijection_that_keeps_shapes(architecture):
    to_ldm, to_diffusers = diffusers_to_ldm(architecture), ldm_to_diffusers(architecture)
    ldm, diffusers = tensor_shapes(architecture, "ldm"), tensor_shapes(architecture, "diffusers")
    assert to_ldm.keys() == diffusers.keys()
    assert to_diffusers.keys() == ldm.keys()
    assert all(to_diffusers[to_ldm[key]] == key for key in diffusers)
    assert {to_ldm[key]: shape for key, shape in diffusers.items()} == ldm


def _diffusers_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference for its own names")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    return {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("architecture", [*KNOWN_ARCHITECTURES, LCM, TINY], ids=lambda known: known.name)
def test_diffusers_builds_the_same_tensors(architecture):
    assert _diffusers_shapes(unet_config(architecture)) == tensor_shapes(architecture, "diffusers")


SDXL_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
"""What SDXL's published config.json says, where it differs from diffusers' defaults, but for the depths."""


def test_the_configuration_of_sdxl_is_the_published_one():
    config = diffusers_config(SDXL_BASE)
    # The first level has no attention, so that its depth means nothing: the published file says 1.
    assert config.pop("transformer_layers_per_block")[1:] == [2, 10]
    assert config == SDXL_CONFIG


@each_architecture
@each_layout
def test_detects_a_bare_unet(architecture, layout):
    info = detect(tensor_shapes(architecture, layout))
    assert info is not None
    assert (info.name, info.layout, info.architecture) == (architecture.name, layout, architecture)
    assert info.prefix == (CHECKPOINT_PREFIX if layout == "prefixed" else "")


@each_layout
@pytest.mark.parametrize("base", [SDXL_BASE, SSD_1B, SEGMIND_VEGA], ids=lambda known: known.name)
def test_latent_consistency_unets_are_their_bases_with_one_tensor_more(base, layout):
    architecture = replace(base, guidance_width=256)
    shapes = tensor_shapes(architecture, layout)
    info = detect(shapes)
    assert info is not None
    assert (info.name, info.layout, info.architecture) == (base.name, layout, architecture)
    (extra,) = shapes.keys() - tensor_shapes(base, layout).keys()
    assert extra.endswith("cond_proj.weight") and shapes[extra] == (320, 256)
    spoilt = detect(shapes | {extra: (320,)})
    assert spoilt is not None
    assert spoilt.architecture is None


def test_detects_the_unet_of_a_whole_checkpoint():
    unet = tensor_shapes(SDXL_BASE, "prefixed")
    info = detect(BESIDE_THE_UNET | unet)
    assert info is not None
    assert (info.name, info.layout) == ("SDXL", "prefixed")
    assert all(is_unet_key(info, key) for key in unet)
    assert not any(is_unet_key(info, key) for key in BESIDE_THE_UNET)


@each_layout
def test_markers_beside_the_unet_do_not_matter(layout):
    unet = tensor_shapes(SEGMIND_VEGA, layout)
    markers = {"v_pred": (0,), "ztsnr": (0,), CHECKPOINT_PREFIX + "v_pred": (), "edm_vpred.sigma_max": ()}
    info = detect(markers | unet)
    assert info is not None
    assert info.name == "Segmind Vega"
    assert all(is_unet_key(info, key) for key in unet)
    assert not any(is_unet_key(info, key) for key in markers)


@pytest.mark.parametrize(
    ("layout", "prefix", "detected"),
    [("diffusers", "unet.", "diffusers"), ("ldm", "diffusion_model.", "prefixed")],
)
def test_another_prefix_is_found(layout, prefix, detected):
    info = detect({prefix + key: shape for key, shape in tensor_shapes(KOALA_700M, layout).items()})
    assert info is not None
    assert (info.name, info.layout, info.prefix) == ("KOALA-700M", detected, prefix)
    assert all(key.startswith(prefix) for key in first_and_last_convolution(info))


@each_layout
def test_first_and_last_convolution_are_those_that_touch_latents(layout):
    shapes = tensor_shapes(SDXL_BASE, layout)
    info = detect(shapes)
    assert info is not None
    assert {shapes[key] for key in first_and_last_convolution(info)} == {(320, 4, 3, 3), (4, 320, 3, 3)}


@each_layout
def test_a_relative_of_unknown_size_is_read_from_its_names(layout):
    info = detect(tensor_shapes(TINY, layout))
    assert info is not None
    assert (info.name, info.layout) == (UNKNOWN, layout)
    assert info.architecture == replace(TINY, name=UNKNOWN)


@each_layout
def test_each_tensor_counts_for_the_name(layout):
    """Vega's tensors are all in SSD-1B, and SSD-1B's all in SDXL: neither a lack nor an excess may pass."""
    vega, ssd, sdxl = (tensor_shapes(known, layout) for known in (SEGMIND_VEGA, SSD_1B, SDXL_BASE))
    assert vega.items() < ssd.items() < sdxl.items()
    extra_key = next(key for key in ssd if key not in vega and "transformer_blocks" in key)
    lacking_key = next(key for key in vega if key.endswith("to_out.0.bias"))
    lacking = {key: shape for key, shape in vega.items() if key != lacking_key}
    too_many = vega | {extra_key: ssd[extra_key]}
    for shapes in (too_many, lacking, vega | {lacking_key: (7,)}, vega | {lacking_key: ()}):
        info = detect(shapes)
        assert info is not None
        assert (info.name, info.layout) == (UNKNOWN, layout)
        assert info.architecture is None


@each_layout
def test_whatever_is_missing_or_too_much_detection_answers(layout):
    tiny = tensor_shapes(TINY, layout)
    for missing in tiny:
        info = detect({key: shape for key, shape in tiny.items() if key != missing})
        assert info is None or info.architecture is None
    for part in ("down_blocks.", "up_blocks.") if layout == "diffusers" else ("input_blocks.1.", "output_blocks."):
        info = detect({key: shape for key, shape in tiny.items() if part not in key})
        assert info is not None
        assert info.architecture is None
    block = "up_blocks.1.resnets.2.conv1" if layout == "diffusers" else "output_blocks.4.0.in_layers.2"
    prefix = CHECKPOINT_PREFIX if layout == "prefixed" else ""
    info = detect(tiny | {f"{prefix}{block}.weight": (32, 64, 3, 3)})  # more blocks than skip connections
    assert info is not None
    assert info.architecture is None


def test_the_checkpoints_own_unet_goes_before_another():
    another = {"ema." + key: shape for key, shape in tensor_shapes(KOALA_700M, "ldm").items()}
    info = detect(another | tensor_shapes(SEGMIND_VEGA, "prefixed"))
    assert info is not None
    assert (info.name, info.prefix) == ("Segmind Vega", CHECKPOINT_PREFIX)


def test_other_unets_are_known_by_their_layout_alone():
    stable_diffusion_1 = {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "out.2.weight": (4, 320, 3, 3),
    }
    info = detect({CHECKPOINT_PREFIX + key: shape for key, shape in stable_diffusion_1.items()})
    assert info is not None
    assert (info.name, info.layout, info.architecture) == (UNKNOWN, "prefixed", None)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"weight": (64, 64)},
        BESIDE_THE_UNET,
        {"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
        {"input_blocks.0.0.weight": (320, 4, 3, 3), "time_embed.0.weight": (1280, 320)},
        {"conv_in.weight": (64, 4), "conv_out.weight": (4, 64), "time_embedding.linear_1.weight": (64, 64)},
        {"my_" + key: shape for key, shape in tensor_shapes(TINY, "ldm").items()},
    ],
    ids=["empty", "plain", "CLIP and VAE", "ControlNet", "LDM ControlNet", "no convolutions", "half a name"],
)
def test_anything_else_is_no_unet(shapes):
    assert detect(shapes) is None


@each_layout
def test_the_rule_for_quantising_gives_sdxls_771_layers(layout):
    shapes = tensor_shapes(SDXL_BASE, layout)
    info = detect(shapes)
    assert info is not None
    candidates = {key: shape for key, shape in shapes.items() if key.endswith(".weight") and "emb" not in key}
    kept = first_and_last_convolution(info)
    dimensions = [len(shape) for key, shape in candidates.items() if key not in kept]
    assert (dimensions.count(2), dimensions.count(4)) == (722, 49)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="'ldm', 'prefixed' or 'diffusers', got 'onnx'"):
        tensor_shapes(SDXL_BASE, "onnx")


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_ldm_names_of_every_layout(layout):
    shapes = tensor_shapes(TINY, layout) | {"v_pred": (0,)}
    names = ldm_names(detect(shapes), shapes)
    assert list(names) == list(tensor_shapes(TINY, layout))
    assert list(names.values()) == list(tensor_shapes(TINY, "ldm"))


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
@pytest.mark.parametrize("architecture", [*KNOWN_ARCHITECTURES, LCM, TINY], ids=lambda known: known.name)
def test_diffusers_names_of_every_layout(layout, architecture):
    shapes = tensor_shapes(architecture, layout) | {"v_pred": (0,)}
    names = diffusers_names(detect(shapes), shapes)
    assert {names[key]: shape for key, shape in shapes.items() if key in names} == tensor_shapes(
        architecture, "diffusers"
    )


def test_ldm_names_of_an_unknown_architecture_are_refused():
    shapes = tensor_shapes(TINY, "ldm")
    del shapes["out.0.weight"]
    with pytest.raises(ValueError, match="the LDM names of an unknown architecture cannot be renamed to diffusers"):
        diffusers_names(detect(shapes), shapes)


def test_diffusers_names_of_an_unknown_architecture_are_refused():
    shapes = tensor_shapes(TINY, "diffusers")
    del shapes["conv_norm_out.weight"]
    with pytest.raises(ValueError, match="unknown architecture"):
        ldm_names(detect(shapes), shapes)


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_what_is_missing_names_the_tensor(layout):
    shapes = tensor_shapes(SEGMIND_VEGA, layout)
    lost = [key for key in shapes if "attn2.to_v" in key][:2]
    for key in lost:
        del shapes[key]
    told = mismatch_message(detect(shapes), shapes)
    assert told == f"tensor {lost[0]!r} of Segmind Vega's UNet is missing, and 1 more"
    shapes = tensor_shapes(SEGMIND_VEGA, layout)
    shapes[lost[0]] = (1, 2)
    assert mismatch_message(detect(shapes), shapes) == f"tensor {lost[0]!r} of Segmind Vega's UNet has another shape"


def test_nothing_is_missing_from_another_kind_of_model():
    shapes = tensor_shapes(TINY, "ldm")
    assert mismatch_message(detect(shapes), shapes) == ""
