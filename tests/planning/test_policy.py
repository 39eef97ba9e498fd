"""Which tensors are quantised: SDXL's 771 in each layout, and what is spared."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest

from nfq_core.files.safetensors_io import Entry
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, SDXL_BASE, tensor_shapes
from nfq_core.planning.policy import MIN_WEIGHTS, plan_tensors
from nfq_core.planning.settings import BitsPerWeight, FileSize, Formats, Settings, without_repetition

LAYOUTS = ("ldm", "prefixed", "diffusers")
OUTERMOST = {
    "ldm": {"input_blocks.0.0.weight", "out.2.weight"},
    "prefixed": {CHECKPOINT_PREFIX + "input_blocks.0.0.weight", CHECKPOINT_PREFIX + "out.2.weight"},
    "diffusers": {"conv_in.weight", "conv_out.weight"},
}
BESIDE_THE_UNET = {
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
}


def entry(shape: tuple[int, ...], dtype: str = "F16") -> Entry:
    return Entry(dtype, shape, 0, 0)


def formats(entries: dict[str, Entry], settings: Settings | None = None) -> dict[str, str | None]:
    plans = plan_tensors(entries, settings or Settings())[1]
    assert list(plans) == list(entries)
    assert all((plan.dtype, plan.shape) == (entries[key].dtype, entries[key].shape) for key, plan in plans.items())
    return {key: plan.format and plan.format.id for key, plan in plans.items()}


def sdxl(layout: str) -> dict[str, Entry]:
    return {key: entry(shape) for key, shape in tensor_shapes(SDXL_BASE, layout).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdxl_has_771_quantised_tensors(layout):
    entries = sdxl(layout)
    info, plans = plan_tensors(entries, Settings(Formats()))
    assert (info.name, info.layout) == ("SDXL", layout)
    chosen = {key: plan.format for key, plan in plans.items() if plan.format}
    assert len(chosen) == 771
    assert Counter(fmt.id for fmt in chosen.values()) == {"nf16_b64": 722, "nf32_b64": 49}
    assert not any("emb" in key for key in chosen)
    # The contract's "about 1.40 GB packed in all", kept tensors not counted.
    packed = sum(fmt.packed_bytes(prod(entries[key].shape)) for key, fmt in chosen.items())
    assert 1.3e9 < packed < 1.4e9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_outermost_convolutions_only_when_asked(layout):
    entries = sdxl(layout)
    usual = {key for key, fmt in formats(entries).items() if fmt}
    everything = {key for key, fmt in formats(entries, Settings(quantize_first_last=True)).items() if fmt}
    assert everything - usual == OUTERMOST[layout]
    assert usual < everything


def test_a_whole_checkpoint_keeps_clip_and_vae():
    beside = {key: entry(shape) for key, shape in BESIDE_THE_UNET.items()}
    found = formats(sdxl("prefixed") | beside)
    assert all(found[key] is None for key in beside)
    assert sum(fmt is not None for fmt in found.values()) == 771


def test_without_a_unet_the_same_tensors_are_a_plain_state_dict():
    entries = {key: entry(shape) for key, shape in BESIDE_THE_UNET.items()}
    info, plans = plan_tensors(entries, Settings())
    assert info is None
    chosen = {key for key, plan in plans.items() if plan.format}
    assert chosen == {key for key in entries if "emb" not in key}


def test_levels_go_by_dimensions():
    entries = {"linear.weight": entry((64, 64)), "conv.weight": entry((64, 64, 3, 3))}
    assert formats(entries, Settings(Formats.of(7, 12))) == {"linear.weight": "nf7_b64", "conv.weight": "nf12_b64"}
    assert formats(entries, Settings(Formats())) == {"linear.weight": "nf16_b64", "conv.weight": "nf32_b64"}


KEPT = {
    "a bias": ("a.bias", (4096,), "F16"),
    "a scalar": ("a.scale", (), "F32"),
    "a weight of three dimensions": ("a.weight", (64, 64, 3), "F16"),
    "a weight of five dimensions": ("a.weight", (64, 16, 1, 2, 2), "F16"),
    "a table": ("a.scale_shift_table", (6, 4096), "F32"),
    "the first layer of a transformer": ("img_in.weight", (64, 64), "BF16"),
    "the first layer after a prefix": ("model.diffusion_model.img_in.weight", (64, 64), "BF16"),
    "the last layer of a transformer": ("final_layer.linear.weight", (64, 64), "BF16"),
    "a time embedding": ("time_embed.0.weight", (1280, 320), "F16"),
    "emb inside a word": ("token_embedding.weight", (512, 512), "F32"),
    "just too small": ("a.weight", (1, MIN_WEIGHTS - 1), "F16"),
    "empty": ("a.weight", (0, 4096), "F16"),
    "integers": ("a.weight", (64, 64), "I64"),
    "bytes": ("a.weight", (64, 64), "U8"),
    "truth values": ("a.weight", (64, 64), "BOOL"),
    "complex numbers": ("a.weight", (64, 64), "C64"),
    "an unknown dtype": ("a.weight", (64, 64), "F8_E8M0"),
}


@pytest.mark.parametrize(("key", "shape", "dtype"), KEPT.values(), ids=KEPT)
def test_kept(key, shape, dtype):
    layer = {"layer.weight": entry((64, 64))}
    assert formats({key: entry(shape, dtype)} | layer)[key] is None


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("shape", [(1, MIN_WEIGHTS), (MIN_WEIGHTS, 1), (33, 37)])
def test_quantised(shape, dtype):
    assert formats({"a.weight": entry(shape, dtype)}, Settings(Formats())) == {"a.weight": "nf16_b64"}


def test_the_weight_of_a_single_layer():
    assert formats({"weight": entry((64, 64))}, Settings(Formats())) == {"weight": "nf16_b64"}


def test_arrays_that_are_no_layers_parameters():
    """In a file without any `….weight`, names say nothing; next to layers, other names are tables and parameters."""
    bare = {"a": entry((256, 256)), "emb": entry((256, 256)), "b": entry((64,))}
    assert [key for key, fmt in formats(bare).items() if fmt] == ["a"]
    assert [key for key, fmt in formats(bare | {"layer.weight": entry((256, 256))}).items() if fmt] == ["layer.weight"]


def test_formats_go_by_dimensions_too():
    entries = {"linear.weight": entry((64, 64)), "conv.weight": entry((64, 64, 3, 3))}
    assert formats(entries, Settings(Formats.of(format="t4w8_b64"))) == {
        "linear.weight": "t4w8_b64",
        "conv.weight": "nf32_b64",
    }
    assert formats(entries, Settings(Formats.of(conv_format="t5w9_b64"))) == {
        "linear.weight": "nf16_b64",
        "conv.weight": "t5w9_b64",
    }


def test_a_format_is_recorded_instead_of_levels():
    assert Settings(Formats.of(format="t4w8_b64")).as_dict() == {
        "conv_levels": 32,
        "effort": "fast",
        "quantize_first_last": False,
        "format": "t4w8_b64",
    }
    assert Formats.of(conv_format="t5w9_b64").as_dict() == {"levels": 16, "conv_format": "t5w9_b64"}
    assert Formats.of(conv_format="nf24_b64").as_dict() == {"levels": 16, "conv_levels": 24}
    assert Formats.of(format="nf256_b64").as_dict() == {"format": "nf256_b64", "conv_levels": 32}


def test_settings_are_recorded_whole():
    assert Settings(Formats.of(24, 12), effort="best", quantize_first_last=True).as_dict() == {
        "levels": 24,
        "conv_levels": 12,
        "effort": "best",
        "quantize_first_last": True,
    }


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"levels": 20}, "levels must be one of 32, 24, 16, 12, 7, got 20"),
        ({"conv_levels": 8}, "got 8"),
        ({"format": "t9w8_b64"}, "format must be one of nf32_b64, .*, t6w9_b64, got 't9w8_b64'"),
        ({"conv_format": "article16_b64"}, "got 'article16_b64'"),
    ],
)
def test_formats_out_of_range(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Formats.of(**settings)


def test_the_default_is_a_preset():
    assert Settings() == Settings.of() == Settings.of(preset="balanced", effort="fast")
    assert Settings().as_dict() == {
        "preset": "balanced",
        "target_bpw": 4.1,
        "effort": "fast",
        "quantize_first_last": False,
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"preset": "tiny"}, BitsPerWeight(2.8, "tiny")),
        ({"target_bpw": 3.4}, BitsPerWeight(3.4)),
        ({"target_bytes": 10}, FileSize(10)),
        ({"levels": 12}, Formats.of(12)),
        ({"conv_levels": 12}, Formats.of(16, 12)),
        ({"format": "t4w8_b64", "conv_levels": 24}, Formats.of(16, 24, format="t4w8_b64")),
    ],
)
def test_one_choice(given, wanted):
    assert Settings.of(**given, effort="best", quantize_first_last=True) == Settings(wanted, "best", True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"preset": "balanced", "levels": 16}, "preset and levels"),
        ({"preset": "small", "conv_format": "nf24_b64"}, "preset and conv_format"),
        ({"preset": "small", "target_bpw": 3.4}, "preset and target_bpw"),
        ({"target_bpw": 3.4, "target_bytes": 10}, "target_bpw and target_bytes"),
        ({"target_bytes": 10, "format": "nf24_b64", "conv_levels": 7}, "target_bytes and conv_levels and format"),
    ],
)
def test_two_choices_are_refused(given, named):
    with pytest.raises(ValueError) as caught:
        Settings.of(**given)
    assert str(caught.value) == (
        f"a preset, target_bpw, target_bytes, and levels or formats exclude each other; got {named}"
    )


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of large, balanced, small, tiny, got 'huge'"):
        Settings.of(preset="huge")


def test_levels_of_a_form_count_with_preset_levels_only():
    assert Settings.from_form("small", 12, 24, "best") == Settings.of(preset="small", effort="best")
    assert Settings.from_form("levels", 12, 24, "best") == Settings(Formats.of(12, 24), "best")


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [
        ({"preset": "small", "target_bpw": 3.4}, {"preset": "small"}),
        ({"preset": "small", "target_bpw": 3.3}, {"target_bpw": 3.3}),
        ({"preset": ["small"], "target_bpw": 3.4}, {"target_bpw": 3.4}),
        ({"preset": "small"}, {"preset": "small"}),
        ({"target_bpw": 3.4}, {"target_bpw": 3.4}),
        ({"levels": 16}, {"levels": 16}),
    ],
)
def test_recorded_settings_make_the_same_file_again(recorded, wanted):
    assert without_repetition(recorded | {"effort": "fast"}) == wanted | {"effort": "fast"}


def test_effort_out_of_range():
    with pytest.raises(ValueError, match="effort must be one of fast, best, got 'slow'"):
        Settings(effort="slow")
