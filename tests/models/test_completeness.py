"""Incomplete UNets are refused when they are quantised; those that a loader will refuse are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import save_file
from samples import SMALLEST, TINY, random_unet

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.errors import CorruptFileError
from nfq_core.models.completeness import missing_tensors_message, unet_warnings
from nfq_core.models.unet import detect
from nfq_core.models.unet_keys import (
    CHECKPOINT_PREFIX,
    KNOWN_ARCHITECTURES,
    SDXL_BASE,
    SEGMIND_VEGA,
    SSD_1B,
    diffusers_to_ldm,
    tensor_shapes,
)
from nfq_core.planning.settings import Formats, Settings

LAYOUTS = ("ldm", "prefixed", "diffusers")


def lost(shapes: dict) -> str:
    return missing_tensors_message(detect(shapes), shapes)


def warnings(shapes: dict) -> list[str]:
    assert lost(shapes) == ""
    return unet_warnings(detect(shapes), shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", [SDXL_BASE, SSD_1B, SEGMIND_VEGA], ids=lambda known: known.name)
def test_a_lost_tensor_is_named(architecture, layout):
    """Among them those by which a UNet is recognised, and those that smaller relatives do not have."""
    whole = tensor_shapes(architecture, layout)
    keys = list(whole)
    for key in (keys[0], keys[1], keys[4], keys[-1], keys[-2], keys[len(keys) // 2], keys[len(keys) * 5 // 6]):
        shapes = {name: shape for name, shape in whole.items() if name != key}
        assert lost(shapes) == f"tensor {key!r} of {architecture.name}'s UNet is missing"


def test_the_count_and_lost_halves():
    whole = tensor_shapes(SDXL_BASE, "prefixed")
    shapes = {name: shape for name, shape in whole.items() if ".output_blocks.5." not in name}
    told = lost(shapes)
    assert told.startswith(
        "tensor 'model.diffusion_model.output_blocks.5.0.in_layers.0.weight' of SDXL's UNet is missing"
    )
    assert told.endswith(f", and {len(whole) - len(shapes) - 1} more")
    shapes = {name: shape for name, shape in whole.items() if ".output_blocks." not in name}
    assert lost(shapes) == "all tensors 'model.diffusion_model.output_blocks.*' of the UNet are missing"


def test_a_model_of_other_sizes_may_be_incomplete_too():
    shapes = tensor_shapes(TINY, "ldm")
    key = next(name for name in shapes if name.endswith("to_out.0.bias"))
    del shapes[key]
    assert lost(shapes) == f"tensor {key!r} of the UNet is missing"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", KNOWN_ARCHITECTURES, ids=lambda known: known.name)
def test_what_loaders_take_passes_in_silence(architecture, layout):
    for known in (architecture, replace(architecture, guidance_width=256), replace(architecture, in_channels=12)):
        assert warnings(tensor_shapes(known, layout)) == []


STABLE_DIFFUSION_1 = replace(
    TINY,
    channels=(320, 640, 1280, 1280),
    down_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
    middle_depth=1,
    up_depths=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    context_width=768,
)


def without_sizes(architecture, layout: str) -> dict:
    shapes = tensor_shapes(architecture, layout)
    return {key: shape for key, shape in shapes.items() if "label_emb" not in key and "add_embedding" not in key}


@pytest.mark.parametrize("convolutions", [False, True])
def test_stable_diffusion_1_is_taken_under_ldm_names_alone(convolutions):
    ldm, diffusers = (without_sizes(STABLE_DIFFUSION_1, layout) for layout in ("prefixed", "diffusers"))
    if convolutions:
        for shapes in (ldm, diffusers):
            shapes |= {
                key: (*shape, 1, 1)
                for key, shape in shapes.items()
                if key.endswith(("proj_in.weight", "proj_out.weight"))
            }
    assert warnings(ldm) == []
    (warning,) = warnings(diffusers)
    assert "only diffusers' `load_unet` takes the result" in warning
    del ldm[CHECKPOINT_PREFIX + diffusers_to_ldm(STABLE_DIFFUSION_1)["conv_norm_out.bias"]]
    assert "out.0.bias' of the UNet is missing" in lost(ldm)


@pytest.mark.parametrize("architecture", [TINY, SMALLEST, replace(SDXL_BASE, context_width=1280)])
def test_sizes_of_no_known_model(architecture):
    (warning,) = warnings(tensor_shapes(architecture, "ldm"))
    assert "ComfyUI and the web UIs load no model of its sizes" in warning


def test_other_names_inside_are_another_architecture():
    shapes = {
        key.replace("ff.net.0.proj", "ff.net.0.0"): shape for key, shape in tensor_shapes(SDXL_BASE, "ldm").items()
    }
    (warning,) = warnings(shapes)
    assert "ff.net.0.proj.weight' of SDXL's UNet is missing, and 139 more; no loader takes the result" in warning
    (warning,) = warnings(without_sizes(replace(SDXL_BASE, context_width=512), "ldm"))
    assert "ComfyUI takes the result only if it knows its architecture" in warning


@pytest.mark.parametrize(("layout", "refusal"), [("prefixed", "loaders may refuse"), ("diffusers", "only diffusers'")])
def test_tensors_that_do_not_belong_are_named(layout, refusal):
    shapes = tensor_shapes(SDXL_BASE, layout)
    module = next(key for key in shapes if key.endswith("attn2.to_k.weight")).removesuffix(".to_k.weight")
    extra = {f"{module}.to_k_ip.weight": (1280, 2048), f"{module}.to_v_ip.weight": (1280, 2048)}
    (warning,) = warnings(shapes | extra)
    assert warning.startswith(f"tensor '{module}.to_k_ip.weight' and 1 more are not part of SDXL's UNet; {refusal}")


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"weight": (64, 64)},
        {"output_blocks.0.0.in_layers.2.weight": (64, 64, 3, 3)},
        {
            key: shape
            for key, shape in tensor_shapes(SDXL_BASE, "diffusers").items()
            if not key.startswith(("up", "conv_out"))
        },
        {"control_model." + key: s for key, s in tensor_shapes(SDXL_BASE, "ldm").items() if not key.startswith("out")},
    ],
    ids=["empty", "plain", "other", "ControlNet", "LDM ControlNet"],
)
def test_anything_else_is_no_incomplete_unet(shapes):
    assert lost(shapes) == "" and unet_warnings(detect(shapes), shapes) == []


def test_quantising_refuses_and_warns(tmp_path):
    tensors = random_unet(architecture=TINY)
    save_file(tensors, tmp_path / "whole")
    (warning,) = quantize_file(tmp_path / "whole", tmp_path / "a", Settings(Formats()))["warnings"]
    assert "ComfyUI and the web UIs load no model of its sizes" in warning
    del tensors["out.0.bias"]
    save_file(tensors, tmp_path / "part")
    with pytest.raises(
        CorruptFileError, match=r"is incomplete: tensor 'out\.0\.bias' of the UNet is missing; fetch the"
    ):
        quantize_file(tmp_path / "part", tmp_path / "b")
    assert not (tmp_path / "b").exists()
