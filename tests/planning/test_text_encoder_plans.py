"""Text encoders have formats of their own, which a size or levels of the diffusion model leave alone."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest
from text_models import TINY, decoder, t5

from benchmarks.checkpoint_shapes import CLIP_L, OPEN_CLIP_G, clip, open_clip, sdxl_checkpoint
from nfq_core.errors import NFQError
from nfq_core.files.safetensors_io import Entry, dtype_bytes
from nfq_core.planning.policy import plan_tensors, recorded_text_encoders
from nfq_core.planning.settings import TEXT_ENCODERS, Settings, of_unet

WHOLE = sdxl_checkpoint()
UNET = {key: shape for key, shape in WHOLE.items() if key.startswith("model.diffusion_model.")}


def entries(shapes: dict[str, tuple[int, ...]], dtype: str = "F16") -> dict[str, Entry]:
    return {key: Entry(dtype, shape, 0, 0) for key, shape in shapes.items()}


def formats(shapes: dict[str, tuple[int, ...]], dtype: str = "F16", **choice: object) -> dict[str, str]:
    """The format of each tensor that is quantised."""
    plans = plan_tensors(entries(shapes, dtype), Settings.of(**choice))[1]
    return {key: plan.format.id for key, plan in plans.items() if plan.format}


def text_formats(found: dict[str, str]) -> Counter[str]:
    return Counter(fmt for key, fmt in found.items() if key.startswith("conditioner."))


LAYERS = 6 * 12 + 4 * 32
BY_CHOICE = {
    "the default": ({}, {"nf256_b64": LAYERS + 2}),
    "large": ({"preset": "large"}, {"nf256_b64": LAYERS + 2}),
    "small": ({"preset": "small"}, {"nf32_b64": LAYERS, "nf256_b64": 2}),
    "tiny": ({"preset": "tiny"}, {"nf32_b64": LAYERS, "nf256_b64": 2}),
    "small, slowly": ({"preset": "small", "effort": "best"}, {"t5w9_b64": LAYERS, "nf256_b64": 2}),
    "the default, slowly": ({"effort": "best"}, {"nf256_b64": LAYERS + 2}),
    "many bits": ({"target_bpw": 3.5}, {"nf256_b64": LAYERS + 2}),
    "few bits": ({"target_bpw": 3.4}, {"nf32_b64": LAYERS, "nf256_b64": 2}),
    "a size": ({"target_bytes": 2_200_000_000}, {"nf256_b64": LAYERS + 2}),
    "levels": ({"levels": 12}, {"nf256_b64": LAYERS + 2}),
    "a format": ({"format": "t4w8_b64"}, {"nf256_b64": LAYERS + 2}),
    "kept": ({"text_encoders": "keep"}, {}),
    "5 bits": ({"text_encoders": "5bit"}, {"nf32_b64": LAYERS, "nf256_b64": 2}),
    "8 bits": ({"preset": "tiny", "text_encoders": "8bit"}, {"nf256_b64": LAYERS + 2}),
}


@pytest.mark.parametrize("case", BY_CHOICE)
def test_the_formats_of_a_whole_checkpoint(case):
    choice, wanted = BY_CHOICE[case]
    found = formats(WHOLE, **choice)
    assert text_formats(found) == wanted
    assert not any(key.startswith("first_stage_model.") for key in found)
    unet = {key: fmt for key, fmt in found.items() if key in UNET}
    assert len(unet) == 771
    if "target_bytes" not in choice:
        # The UNet gets what it gets by itself.
        alone = {name: value for name, value in choice.items() if name != "text_encoders"}
        assert unet == formats(UNET, **alone)


def test_a_file_size_counts_text_encoders():
    """Fewer bytes for them leave more for the UNet."""

    def unet_bytes(text_encoders: str) -> int:
        settings = Settings.of(target_bytes=2_300_000_000, text_encoders=text_encoders)
        plans = plan_tensors(entries(WHOLE), settings)[1]
        return sum(plans[key].format.packed_bytes(prod(plans[key].shape)) for key in UNET if plans[key].format)

    difference = unet_bytes("5bit") - unet_bytes("8bit")
    # 714 million weights of their layers, three bits each.
    assert difference == pytest.approx(714e6 * 3 / 8, rel=0.02)


def test_a_file_size_that_eight_bits_exceed():
    with pytest.raises(NFQError, match=r"are too few; .*; choose a larger target, or 5 bits for the text encoders"):
        formats(WHOLE, target_bytes=1_300_000_000)
    with pytest.raises(NFQError, match=r"choose a larger target$"):
        formats(WHOLE, target_bytes=1_000_000_000, text_encoders="5bit")


ALONE = {"CLIP": clip(CLIP_L), "OpenCLIP": open_clip(OPEN_CLIP_G), "T5": t5(TINY), "Qwen": decoder(TINY)}


@pytest.mark.parametrize("case", ALONE)
def test_a_text_encoder_alone(case):
    """Presets choose 8 or 5 bits; levels, formats and sizes apply to its layers."""
    shapes = ALONE[case]
    eight, five = formats(shapes), formats(shapes, preset="small")
    layers = {key for key, fmt in five.items() if fmt == "nf32_b64"}
    tokens = five.keys() - layers
    assert set(eight.values()) == {"nf256_b64"} and eight.keys() == five.keys() and len(tokens) == 1 and layers
    for choice, wanted in (({"levels": 16}, "nf16_b64"), ({"format": "t4w8_b64"}, "t4w8_b64")):
        found = formats(shapes, **choice)
        assert found == dict.fromkeys(layers, wanted) | dict.fromkeys(tokens, "nf256_b64")
    plans = plan_tensors(entries(shapes), Settings.of(target_bpw=4.3))[1]
    packed = sum(plans[key].format.packed_bytes(prod(shapes[key])) for key in layers)
    assert packed * 8 <= 4.3 * sum(prod(shapes[key]) for key in layers)
    assert formats(shapes, levels=16, text_encoders="5bit") == five
    assert formats(shapes, text_encoders="keep") == {}


def test_8_bit_floats_stay_where_8_bits_would_not_be_smaller():
    shapes = clip(CLIP_L)
    assert formats(shapes, "F8_E4M3") == {}
    assert set(formats(shapes, "F8_E4M3", text_encoders="5bit").values()) == {"nf32_b64"}
    plan = plan_tensors(entries(shapes, "F8_E4M3"), Settings())[1]["text_model.encoder.layers.0.mlp.fc1.weight"]
    assert plan.dtype == "F8_E4M3" and dtype_bytes(plan.dtype) == 1


def test_other_diffusion_models_follow_the_size_and_their_text_encoders_do_not():
    """A checkpoint of another family: its VAE stays, too."""
    shapes = {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (192, 64),
        "vae.decoder.conv_in.weight": (64, 16, 3, 3),
        **t5(TINY, "text_encoders.t5xxl.transformer."),
    }
    found = formats(shapes, levels=12)
    assert found["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"] == "nf12_b64"
    assert "vae.decoder.conv_in.weight" not in found
    assert {fmt for key, fmt in found.items() if key.startswith("text_encoders.")} == {"nf256_b64"}


def test_what_is_recorded():
    recorded = {
        "whole": recorded_text_encoders(Settings.of(preset="small"), entries(WHOLE)),
        "kept": recorded_text_encoders(Settings.of(text_encoders="keep"), entries(WHOLE)),
        "UNet": recorded_text_encoders(Settings(), entries(UNET)),
        "alone": recorded_text_encoders(Settings(), entries(clip(CLIP_L))),
        "alone by levels": recorded_text_encoders(Settings.of(levels=16), entries(clip(CLIP_L))),
    }
    assert recorded == {
        "whole": {"text_encoders": "5bit"},
        "kept": {"text_encoders": "keep"},
        "UNet": {},
        "alone": {"text_encoders": "8bit"},
        "alone by levels": {},
    }
    settings = Settings.of(preset="small")
    assert of_unet(settings.as_dict() | recorded["whole"]) == settings.as_dict()
    # What is recorded gives the same again.
    given = {"preset": "small", **recorded["whole"]}
    assert formats(WHOLE, **given) == formats(WHOLE, preset="small")


def test_an_unknown_choice():
    with pytest.raises(ValueError, match=r"text_encoders must be one of keep, 8bit, 5bit, got '4bit'"):
        Settings(text_encoders="4bit")
    assert all(Settings(text_encoders=choice).text_encoder_bits == choice for choice in TEXT_ENCODERS)
