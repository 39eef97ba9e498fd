"""Models of other families are recognised by their names, and only their inner layers are quantised."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from family_models import CAREFUL, COMFYUI, diffusers_models

from nfq_core.files.safetensors_io import describe
from nfq_core.models.completeness import missing_tensors_message
from nfq_core.models.components import find_components, model_name
from nfq_core.models.families import FAMILIES, find_family
from nfq_core.models.roles import OTHER_LINEAR, role
from nfq_core.models.unet import UNKNOWN, detect
from nfq_core.planning.policy import MAX_CAREFUL, estimate_warnings, plan_tensors
from nfq_core.planning.settings import PRESETS, Settings

PREFIXES = ("", "model.diffusion_model.", "net.")


def is_careful(family: str, key: str) -> bool:
    return key.endswith(".weight") and "final" not in key and any(part in key for part in CAREFUL.get(family, ()))


@pytest.fixture(scope="module")
def built() -> dict[str, torch.nn.Module]:
    pytest.importorskip("diffusers")
    return diffusers_models()


def that_count(careful: set[str], planned: set[str], shapes: dict) -> set[str]:
    """Careful layers if they hold at most a tenth of the weights."""
    weights = {key: prod(shapes[key]) for key in careful | planned}
    return careful if sum(weights[key] for key in careful) <= MAX_CAREFUL * sum(weights.values()) else set()


def plans_of(tensors: dict, **settings) -> dict[str, str]:
    entries = describe(tensors)
    return {
        key: plan.format.id for key, plan in plan_tensors(entries, Settings.of(**settings))[1].items() if plan.format
    }


def meta(shapes: dict) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}


def test_every_family_has_names_here():
    assert {family.name for family in FAMILIES} == set(COMFYUI) >= set(CAREFUL)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", COMFYUI)
def test_names_of_comfyui(name, prefix):
    inner, outer = ({prefix + key: shape for key, shape in part.items()} for part in COMFYUI[name])
    shapes = inner | outer
    assert detect(shapes) is None
    found = find_family(shapes)
    assert (found.family.name, found.prefix) == (name, prefix)
    assert model_name(None, shapes) == name
    (component,) = find_components(None, shapes)
    assert (component.kind, component.name, component.keys) == ("diffusion model", name, tuple(shapes))
    plans = plans_of(meta(shapes), levels=16)
    layers = {key for key in inner if key.endswith(".weight") and len(inner[key]) == 2}
    careful = {key for key in shapes if is_careful(name, key) and len(shapes[key]) == 2 and "embed" not in key}
    assert that_count(careful, layers, shapes) == careful
    assert set(plans) == layers | careful
    assert {key for key, fmt in plans.items() if fmt == "nf256_b64"} == careful
    assert {fmt for key, fmt in plans.items() if key not in careful} == {"nf16_b64"}


def test_classes_of_diffusers(built):
    """Planned are Linear layers in the lists of blocks; parameters of no layer never are."""
    assert {"Flux.1", "Stable Diffusion 3", "Qwen-Image", "Wan"} <= set(built)
    for name, model in built.items():
        state = model.state_dict()
        found = find_family({key: tuple(tensor.shape) for key, tensor in state.items()})
        assert found is not None and (found.family.name, found.prefix) == (name, "")
        linear = {f"{path}.weight" for path, layer in model.named_modules() if type(layer) is torch.nn.Linear}
        inner = {
            key for key in linear if re.match(r"((single_)?transformer_blocks|blocks|layers|\w+_refiner)\.\d", key)
        }
        large = {key for key in linear if state[key].numel() >= 1024}
        shapes = {key: state[key].shape for key in large}
        named = {key for key in large if is_careful(name, key)}
        careful = that_count(named, inner & large, shapes)
        plans = plans_of(state, levels=16)
        assert set(plans) == inner & large | careful | {key for key in named if "embed" not in key}, name
        assert {key for key, fmt in plans.items() if fmt == "nf256_b64"} == careful, name


def test_every_inner_layer_has_a_role(built):
    states = {name: model.state_dict() for name, model in built.items()}
    states |= {f"{name}, ComfyUI": meta(inner | outer) for name, (inner, outer) in COMFYUI.items()}
    for name, state in states.items():
        for key, fmt in plans_of(state, levels=16).items():
            if fmt != "nf256_b64":
                assert role(key, (64, 64)) != OTHER_LINEAR, (name, key)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", COMFYUI)
def test_presets_count_careful_layers(name, preset):
    """At most the preset's bits over all quantised weights; small layers have coarse steps."""
    inner, outer = COMFYUI[name]
    state = meta(inner | outer)
    info, plans = plan_tensors(describe(state), Settings.of(preset=preset))
    chosen = [plan for plan in plans.values() if plan.format]
    packed = sum(plan.format.packed_bytes(prod(plan.shape)) for plan in chosen)
    bits = 8 * packed / sum(prod(plan.shape) for plan in chosen)
    assert PRESETS[preset] - 0.4 < bits <= PRESETS[preset]
    assert not estimate_warnings(info, plans, None)


def test_value_and_modulation_get_more_bits_than_query():
    inner, outer = COMFYUI["Qwen-Image"]
    plans = plan_tensors(describe(meta(inner | outer)), Settings.of(preset="balanced"))[1]
    query, value, modulation = (
        plans[f"transformer_blocks.1.{part}.weight"].sensitivity for part in ("attn.to_q", "attn.to_v", "img_mod.1")
    )
    assert query < value == modulation


def test_other_models_are_unknown():
    inner, _ = COMFYUI["Wan"]
    assert find_family(inner) is None and model_name(None, inner) == UNKNOWN
    info, plans = plan_tensors(describe(meta(inner)), Settings.of())
    assert {key for key, plan in plans.items() if plan.format} == {key for key in inner if key.endswith(".weight")}
    (warning,) = estimate_warnings(info, plans, None)
    assert warning.startswith(
        "the architecture is unknown, so its layers' sensitivities are SDXL's, by role and number"
    )


def test_a_lora_is_no_model():
    keys = {"double_blocks.0.img_attn.qkv.lora_up.weight": (64, 4), "img_in.lora_down.weight": (4, 64)}
    assert find_family(keys) is None


def test_a_text_encoder_and_a_vae_next_to_a_model():
    inner, outer = COMFYUI["Flux.1"]
    prefix = "model.diffusion_model."
    clip = {
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": (512, 768),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
    }
    vae = {"vae.decoder.conv_in.weight": (64, 16, 3, 3)}
    shapes = {prefix + key: shape for key, shape in (inner | outer).items()} | clip | vae
    assert [each.name for each in find_components(None, shapes)] == ["Flux.1", "CLIP-L", "VAE"]


@pytest.mark.parametrize("name", COMFYUI)
def test_a_missing_tensor_is_named(name):
    inner, outer = COMFYUI[name]
    assert missing_tensors_message(None, inner | outer) == ""
    path = next(key.split(".")[0] for key in inner)
    lost = next(key for key in inner if key.startswith(f"{path}.1."))
    shapes = {key: shape for key, shape in (inner | outer).items() if key != lost}
    assert missing_tensors_message(None, shapes) == f"tensor {lost!r} of {name} is missing"
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith(f"{path}.1.")}
    assert f"of {name} is missing, and " in missing_tensors_message(None, shapes)


def test_models_of_diffusers_are_complete(built):
    for model in built.values():
        assert missing_tensors_message(None, {key: tuple(t.shape) for key, t in model.state_dict().items()}) == ""
