"""A file's tensors under a whole checkpoint's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from samples import SMALL_MODEL, TINY, random_half

from nfq_core import NFQFile, NFTensor, UnsupportedFileError, load, quantize_state_dict, save
from nfq_core.checkpoints.whole_checkpoint import (
    checkpoint_names,
    dequantize_state_dict,
    missing_companions,
    rename_tensors,
    unet_names,
)
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, tensor_shapes

COMPANIONS = {"conditioner.x": random_half(8), "first_stage_model.y": random_half(8), "v_pred": torch.zeros(0)}


def make(path: Path, layout: str, others: dict[str, torch.Tensor]) -> Path:
    shapes = tensor_shapes(TINY, layout)
    weights = {name: random_half(*shape, seed=seed) / 16 for seed, (name, shape) in enumerate(shapes.items())}
    save(quantize_state_dict(weights) | others, path)
    return path


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_every_layout_gets_the_names_of_a_whole_checkpoint(tmp_path: Path, layout: str) -> None:
    with NFQFile(make(tmp_path / "model.nfq.safetensors", layout, COMPANIONS)) as file:
        names = checkpoint_names(file)
        assert names.keys() == set(file.keys())
        assert sorted(names.values()) == sorted({*tensor_shapes(TINY, "prefixed"), *COMPANIONS})
        assert {CHECKPOINT_PREFIX + name for name in unet_names(file).values()} == set(tensor_shapes(TINY, "prefixed"))


def test_what_a_file_lacks(tmp_path: Path) -> None:
    for others, missing in (
        (COMPANIONS, []),
        ({"first_stage_model.y": random_half(8)}, ["text encoder"]),
        ({"cond_stage_model.y": random_half(8)}, ["VAE"]),
        ({}, ["text encoder", "VAE"]),
    ):
        with NFQFile(make(tmp_path / f"{len(others)}{missing}.nfq.safetensors", "ldm", others)) as file:
            assert missing_companions(file) == missing


def test_files_without_a_whole_unet_are_refused(tmp_path: Path) -> None:
    plain, part = tmp_path / "plain.nfq.safetensors", tmp_path / "part.nfq.safetensors"
    save(quantize_state_dict(SMALL_MODEL), plain)
    whole = load(make(tmp_path / "whole.nfq.safetensors", "diffusers", {}))
    del whole["mid_block.resnets.0.conv1.weight"]
    save(whole, part)
    for path, told in ((plain, "has no UNet"), (part, "cannot be used")):
        with NFQFile(path) as file, pytest.raises(UnsupportedFileError, match=told):
            checkpoint_names(file)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    other = {CHECKPOINT_PREFIX + "time_embed.0.bias": random_half(8)}
    with (
        NFQFile(make(tmp_path / "a.nfq.safetensors", "ldm", other)) as file,
        pytest.raises(UnsupportedFileError, match=r"two tensors that a checkpoint calls 'model\.diffusion_model\.time"),
    ):
        checkpoint_names(file)


def test_dense_takes_packed_weights_out_and_leaves_kept_ones(tmp_path: Path) -> None:
    packed = quantize_state_dict(SMALL_MODEL | {"fp32.bias": torch.rand(3)})
    assert isinstance(packed["linear.weight"], NFTensor)
    wanted = {name: value.dequantize() if isinstance(value, NFTensor) else value for name, value in packed.items()}
    kept, bias = packed["norm.bias"], packed["fp32.bias"]
    found = dequantize_state_dict(packed)
    assert packed == {} and list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    assert found["norm.bias"] is kept and found["fp32.bias"] is bias


def test_renamed_keeps_order() -> None:
    assert list(rename_tensors({"a": torch.zeros(1), "b": torch.ones(1)}, {"a": "z", "b": "y"})) == ["z", "y"]
