"""diffusers' classes that copy the weights of another model copy them dequantised; other copies are refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers_models import diffusers
from test_diffusers_doors import SHAPE, UP, pack, small_unet

from nfq_core import NFQError
from nfq_core.diffusers import NFQConfig, patches
from nfq_core.layers import packed_layers

TIMES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
UNETS = {
    "ControlNetModel": ({}, {}),
    "ControlNetUnionModel": (TIMES, {}),
    "SparseControlNetModel": ({}, {}),
    "UNetControlNetXSModel": ({"layers_per_block": 2}, {"size_ratio": 0.5, "ctrl_optional_kwargs": {}}),
    "UNetMotionModel": ({}, {}),
}
"""The settings of the UNet, and the options of the method that copies it."""


def transformer(kind: str) -> torch.nn.Module:
    """A small one, of which the ControlNet `kind` copies layers."""
    heads = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "SD3ControlNetModel":
        sizes = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32}
        # The last block is unlike those of a ControlNet.
        heads["num_layers"] = 2
        return diffusers.SD3Transformer2DModel(sample_size=8, pos_embed_max_size=8, **heads, **sizes)
    if kind == "FluxControlNetModel":
        sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
        return diffusers.FluxTransformer2DModel(in_channels=16, num_single_layers=1, **heads, **sizes)
    if kind == "QwenImageControlNetModel":
        return diffusers.QwenImageTransformer2DModel(
            in_channels=16, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), **heads
        )
    sizes = {"cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 1024, "text_len": 4}
    heads["num_layers"] = 2
    return diffusers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, hidden_size=32, text_len_t5=4, in_channels=4, **heads, **sizes
    )


TRANSFORMERS = {
    "SD3ControlNetModel": {"num_layers": 1},
    "FluxControlNetModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    },
    "QwenImageControlNetModel": {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
    "HunyuanDiT2DControlNetModel": {"transformer_num_layers": 2},
}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return pack(small_unet(), tmp_path_factory.mktemp("unet"))


def check_copies(kind: str, packed: torch.nn.Module, **options: object) -> None:
    """See that a class makes the same copy of a packed model as of its dequantised twin."""
    method = next(name for doors in patches._COPYING.values() for door, name in doors.items() if door == kind)
    stock, results = copy.deepcopy(packed).dequantize(), []
    for model in (packed, stock):
        torch.manual_seed(0)
        results.append(getattr(getattr(diffusers, kind), method)(model, **options).state_dict())
    found, wanted = results
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    weights = {tensor.flatten()[0].item() for name, tensor in stock.state_dict().items() if name.endswith("weight")}
    copied = [name for name in wanted if name.endswith("weight") and wanted[name].flatten()[0].item() in weights - {1}]
    assert len(copied) > 5
    assert packed_layers(packed) and not packed_layers(stock)


@pytest.mark.parametrize("kind", UNETS)
def test_unets_are_copied(kind: str, unet: torch.nn.Module, tmp_path: Path) -> None:
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    settings, options = UNETS[kind]
    if settings:
        torch.manual_seed(0)
        unet = pack(diffusers.UNet2DConditionModel(**SHAPE | UP | settings), tmp_path)
    check_copies(kind, unet, **options)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_are_copied(kind: str, tmp_path: Path) -> None:
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    check_copies(kind, pack(transformer(kind), tmp_path), **TRANSFORMERS[kind])


def test_an_unknown_class_that_copies_is_refused(unet: torch.nn.Module) -> None:
    door = diffusers.ControlNetModel.from_unet.__func__.__wrapped__
    with pytest.raises(NFQError, match=r"the packed weight '.*weight' cannot be copied into a layer that is not"):
        door(diffusers.ControlNetModel, unet)


def test_classes_that_cannot_be_imported_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("Failed to import diffusers.models.controlnets")

    monkeypatch.setattr(patches, "diffusers", Broken())
    patches.wrap_copying.__wrapped__(diffusers.UNet2DConditionModel)
    monkeypatch.setattr(patches, "diffusers", SimpleNamespace())
    patches.wrap_copying.__wrapped__(diffusers.UNet2DConditionModel)


def test_methods_are_wrapped_once(unet: torch.nn.Module) -> None:
    before = diffusers.ControlNetModel.from_unet.__func__
    patches.wrap_copying.__wrapped__(diffusers.UNet2DConditionModel)
    assert diffusers.ControlNetModel.from_unet.__func__ is before and hasattr(before, "__wrapped__")
    auto = diffusers.quantizers.auto.DiffusersAutoQuantizer
    before = auto.merge_quantization_configs.__func__
    NFQConfig()
    assert auto.merge_quantization_configs.__func__ is before


def test_importing_wraps_nothing() -> None:
    program = """if True:
        from diffusers.quantizers.auto import DiffusersAutoQuantizer as auto
        before = auto.merge_quantization_configs.__func__
        import nfq_core.diffusers
        assert auto.merge_quantization_configs.__func__ is before
        nfq_core.diffusers.NFQConfig()
        assert auto.merge_quantization_configs.__func__ is not before
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
