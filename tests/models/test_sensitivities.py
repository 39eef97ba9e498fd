"""Sensitivities without a measurement: SDXL's own, by place in its relatives, by role in other models."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from samples import TINY

from nfq_core.models.roles import OTHER_CONVOLUTION, OTHER_LINEAR, ROLES
from nfq_core.models.sensitivities import BY_BLOCK, BY_LAYER, BY_ROLE, BY_WEIGHT, MEASURED, SPREAD, layer_sensitivities
from nfq_core.models.unet import UNetInfo, detect
from nfq_core.models.unet_keys import (
    KNOWN_ARCHITECTURES,
    KOALA_700M,
    SDXL_BASE,
    SDXL_INPAINTING,
    SDXL_REFINER,
    SEGMIND_VEGA,
    SSD_1B,
    UNetArchitecture,
    diffusers_to_ldm,
    tensor_shapes,
)

LIKE_SDXL = (SDXL_BASE, SDXL_INPAINTING, replace(SDXL_BASE, guidance_width=256), replace(SDXL_BASE, added_width=5632))
LAYOUTS = ("ldm", "prefixed", "diffusers")


def weights(architecture: UNetArchitecture, layout: str = "diffusers") -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in tensor_shapes(architecture, layout).items() if len(shape) > 1}


def found(architecture: UNetArchitecture, layout: str = "diffusers") -> dict[str, float]:
    return dict(layer_sensitivities(detect(tensor_shapes(architecture, layout)), weights(architecture, layout)).values)


SDXL = found(SDXL_BASE)


def transformer_mean(name: str, layers: int) -> float:
    """Mean of SDXL's sensitivities over the transformer layers of a block."""
    return sum(SDXL[name.format(number)] for number in range(layers)) / layers


def test_two_layers_by_hand() -> None:
    """Rounded to 4 bits (17 dB), the worst inner layer gives an output of 34.80 dB, these keys one of 68.12 dB."""
    assert SDXL["up_blocks.2.resnets.2.conv2.weight"] == pytest.approx(10**-1.78)
    keys = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert SDXL[keys] == pytest.approx(10**-5.11)


@pytest.mark.parametrize("architecture", LIKE_SDXL, ids=["base", "inpainting", "LCM", "another pooled width"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_of_sdxl_has_its_own(architecture: UNetArchitecture, layout: str) -> None:
    info = detect(tensor_shapes(architecture, layout))
    result = layer_sensitivities(info, weights(architecture, layout))
    assert result.basis == BY_LAYER and result.absolute
    ldm = diffusers_to_ldm(architecture)
    quantized = [name for name in weights(SDXL_BASE) if "emb" not in name]
    assert len(quantized) == 773
    assert len({SDXL[name] for name in quantized}) > 300
    for name in quantized:
        key = name if layout == "diffusers" else info.prefix + ldm[name]
        assert result.values[key] == SDXL[name]


@pytest.mark.parametrize("architecture", (SSD_1B, SEGMIND_VEGA, KOALA_700M, SDXL_REFINER), ids=lambda known: known.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relatives_get_their_places(architecture: UNetArchitecture, layout: str) -> None:
    shapes = tensor_shapes(architecture, layout)
    result = layer_sensitivities(detect(shapes), weights(architecture, layout))
    assert result.basis == BY_BLOCK and not result.absolute
    ldm, prefix = diffusers_to_ldm(architecture), "model.diffusion_model." if layout == "prefixed" else ""
    by_name = found(architecture)
    assert result.values == {
        name if layout == "diffusers" else prefix + ldm[name]: value for name, value in by_name.items()
    }


def test_a_block_s_transformer_layers_share_their_mean() -> None:
    name = "down_blocks.2.attentions.1.transformer_blocks.{}.attn1.to_v.weight"
    mean = transformer_mean(name, 10)
    for architecture, layers in ((SSD_1B, 4), (SEGMIND_VEGA, 2)):
        values = found(architecture)
        assert [values[name.format(number)] for number in range(layers)] == pytest.approx([mean] * layers)


@pytest.mark.parametrize(
    ("architecture", "theirs", "sdxl"),
    [
        (KOALA_700M, "up_blocks.2.resnets.1.conv2", "up_blocks.2.resnets.2.conv2"),
        (KOALA_700M, "up_blocks.2.resnets.0.conv1", "up_blocks.2.resnets.1.conv1"),
        (KOALA_700M, "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.1.resnets.0.conv_shortcut"),
        (KOALA_700M, "up_blocks.1.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"),
        (KOALA_700M, "conv_out", "conv_out"),
        (SDXL_REFINER, "up_blocks.3.resnets.2.conv2", "up_blocks.2.resnets.2.conv2"),
        (SDXL_REFINER, "up_blocks.2.attentions.1.proj_in", "up_blocks.1.attentions.1.proj_in"),
        (SDXL_REFINER, "up_blocks.1.resnets.0.conv2", "up_blocks.0.resnets.0.conv2"),
        (SDXL_REFINER, "up_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.0.conv2"),
        (SDXL_REFINER, "down_blocks.3.resnets.1.conv1", "down_blocks.2.resnets.1.conv1"),
        (SDXL_REFINER, "mid_block.resnets.1.conv1", "mid_block.resnets.1.conv1"),
        (SSD_1B, "up_blocks.1.resnets.2.conv1", "up_blocks.1.resnets.2.conv1"),
    ],
)
def test_places_are_counted_from_the_outside(architecture: UNetArchitecture, theirs: str, sdxl: str) -> None:
    assert found(architecture)[f"{theirs}.weight"] == pytest.approx(SDXL[f"{sdxl}.weight"])


def test_a_place_that_sdxl_lacks_gets_its_role_s_mean() -> None:
    downsamplers = [SDXL[f"down_blocks.{level}.downsamplers.0.conv.weight"] for level in (0, 1)]
    assert found(SDXL_REFINER)["down_blocks.2.downsamplers.0.conv.weight"] == pytest.approx(sum(downsamplers) / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_models_go_by_role(layout: str) -> None:
    shapes = weights(TINY, layout)
    result = layer_sensitivities(detect(tensor_shapes(TINY, layout)), shapes)
    assert result.basis == BY_ROLE and not result.absolute
    roles = {
        "attn2.to_q": [value for name, value in SDXL.items() if "attn2.to_q" in name],
        ("out_layers.3", "conv2"): [value for name, value in SDXL.items() if "conv2" in name],
    }
    for names, values in roles.items():
        names = (names,) if isinstance(names, str) else names
        theirs = [value for key, value in result.values.items() if any(name in key for name in names)]
        assert theirs == pytest.approx([sum(values) / len(values)] * len(theirs)) and theirs


def test_layers_without_a_role_get_the_mean_of_their_kind() -> None:
    """The first and last convolution do not count, since no other layer is like them."""
    kept = ("emb", "conv_in.", "conv_out.")
    kinds = {2: [], 4: []}
    for name, shape in weights(SDXL_BASE).items():
        if not any(part in name for part in kept):
            kinds[len(shape)].append(SDXL[name])
    info = detect(tensor_shapes(TINY, "diffusers"))
    values = layer_sensitivities(info, {"a": (64, 64), "b": (64, 64, 3, 3), "c.proj_in.weight": (64, 64)}).values
    assert [len(kinds[2]), len(kinds[4])] == [722, 49]
    assert values["a"] == pytest.approx(sum(kinds[2]) / 722)
    assert values["b"] == pytest.approx(sum(kinds[4]) / 49)
    assert values["c.proj_in.weight"] == found(TINY)["down_blocks.1.attentions.0.proj_in.weight"]


def test_layers_of_transformers_count_by_their_weights() -> None:
    """A fused layer is as sensitive per weight as its parts on average."""
    shapes = {name: shape for name, shape in weights(SDXL_BASE).items() if "attn1.to_" in name}
    mean = {
        part: sum(SDXL[name] for name in shapes if f"to_{part}." in name)
        / sum(prod(shape) for name, shape in shapes.items() if f"to_{part}." in name)
        for part in "qkv"
    }
    layers = {
        "transformer_blocks.0.attn.to_v.weight": (64, 64),
        "transformer_blocks.1.attn.to_v.weight": (128, 64),
        "double_blocks.0.img_attn.qkv.weight": (192, 64),
        "double_blocks.0.img_mod.lin.weight": (384, 64),
    }
    result = layer_sensitivities(None, layers)
    assert result.basis == BY_WEIGHT and not result.absolute
    assert list(result.values.values()) == pytest.approx(
        [4096 * mean["v"], 8192 * mean["v"], 4096 * sum(mean.values()), 6 * 4096 * mean["v"]]
    )


def test_every_role_is_one_of_sdxl() -> None:
    unknown = layer_sensitivities(None, {part.name: (64, 64) for part in (*ROLES, OTHER_LINEAR, OTHER_CONVOLUTION)})
    assert all(value > 0 for value in unknown.values.values())


def test_measured_values_come_first_and_scale_the_others() -> None:
    """Two like layers, one of them measured: the other is taken to be as sensitive."""
    shapes = {"a.attn1.to_q.weight": (64, 64), "b.attn1.to_q.weight": (64, 64)}
    result = layer_sensitivities(None, shapes, {"a.attn1.to_q.weight": 7.0, "of another model": 9.0})
    assert result.values == pytest.approx(dict.fromkeys(shapes, 7.0))
    assert result.basis == MEASURED and result.absolute
    info = UNetInfo("diffusers", "", SDXL_BASE)
    assert layer_sensitivities(info, weights(SDXL_BASE), {"of another model": 9.0}).basis == BY_LAYER


def test_what_is_not_known_layer_by_layer_counts_as_if_it_were_less_far_apart() -> None:
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64)}
    measured = layer_sensitivities(None, shapes, {"a.weight": 1e-4, "b.weight": 1.0})
    assert measured.values == {"a.weight": 1e-4, "b.weight": 1.0}
    assert measured.priorities == pytest.approx({"a.weight": 1e-4**SPREAD, "b.weight": 1.0})
    by_role = layer_sensitivities(None, weights(TINY))
    assert by_role.priorities == pytest.approx({name: value**SPREAD for name, value in by_role.values.items()})
    by_layer = layer_sensitivities(UNetInfo("diffusers", "", SDXL_BASE), weights(SDXL_BASE))
    assert by_layer.priorities == by_layer.values


def test_the_family_is_covered() -> None:
    bases = {
        known.name: layer_sensitivities(detect(tensor_shapes(known, "ldm")), {}).basis for known in KNOWN_ARCHITECTURES
    }
    assert [name for name, basis in bases.items() if basis == BY_LAYER] == [
        "SDXL",
        "SDXL inpainting",
        "SDXL instruct-pix2pix",
    ]
    assert set(bases.values()) == {BY_LAYER, BY_BLOCK}
