"""Folders whose weights another program quantised are refused; fp8 without scales is a source like others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers_models import diffusers, noise_of, reads_folders, stock_unet
from safetensors.torch import load_file, save_file

from nfq_core import NFQError, quantize
from nfq_core.diffusers import NFQConfig
from nfq_core.layers import packed_layers

UNet = diffusers.UNet2DConditionModel
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "mid_block.resnets.0.conv1"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("stock")
    stock_unet().save_pretrained(folder)
    return load_file(folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stock_unet().save_config(tmp_path)
    return tmp_path


def load(folder: Path, state: dict[str, torch.Tensor], **options: object) -> torch.nn.Module:
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return UNet.from_pretrained(folder, quantization_config=NFQConfig(7, conv_levels=7), **options)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            f"{LAYER}.weight_scale",
            "fp8 or int8 weights have scales .*convert it with `nfq quantize`, then load the result with load_unet",
        ),
        (f"{LAYER}.scale_weight", "fp8 or int8 weights have scales"),
        (f"{LAYER}.comfy_quant", "fp8 or int8 weights have scales"),
        ("scaled_fp8", "fp8 or int8 weights have scales"),
        (f"{LAYER}.weight.absmax", "quantised already, by bitsandbytes"),
        (f"{LAYER}.SCB", "quantised already, by bitsandbytes"),
        (f"{LAYER}.weight._scale", "quantised already, by optimum-quanto"),
        (f"{LAYER}.zero_point", "quantised already, by SDNQ"),
        (f"{LAYER}.wscales", r"quantised already, by SVDQuant \(Nunchaku\)"),
        (f"{LAYER}.qzeros", "quantised already, by GPTQ or AWQ"),
        (f"{LAYER}.weight_scale_inv", "quantised already, by fp8 in blocks"),
    ],
)
@reads_folders
def test_scales(folder: Path, state: dict, beside: str, message: str) -> None:
    changed = {f"{LAYER}.weight": state[f"{LAYER}.weight"].to(FP8), beside: torch.ones(1)}
    with pytest.raises(NFQError, match=f"{WEIGHTS}: its .*{message}"):
        load(folder, state | changed)


@pytest.mark.parametrize("weight", [torch.zeros(64, 64, 3, 3, dtype=torch.int8), torch.zeros(9, 1, dtype=torch.uint8)])
@reads_folders
def test_integers(folder: Path, state: dict, weight: torch.Tensor) -> None:
    with pytest.raises(NFQError, match=rf"weight '{LAYER}.weight' is u?int8, quantised already by another program"):
        load(folder, state | {f"{LAYER}.weight": weight})


@pytest.mark.parametrize("method", ["bitsandbytes", "sdnq", "torchao", "quanto", "gguf", "anything"])
def test_configs(folder: Path, state: dict, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NFQError, match=f"quantised already, by {method}; leave quantization_config out, or use"):
        load(folder, state)


@pytest.mark.parametrize("stored", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp8_without_scales(folder: Path, state: dict, stored: torch.dtype, dtype: torch.dtype) -> None:
    eight = {name: tensor.to(stored) for name, tensor in state.items()}
    unet = load(folder, eight, torch_dtype=dtype)
    assert {value.dtype for value in unet.parameters()} == {torch.uint8, dtype}
    layers = packed_layers(unet)
    assert torch.equal(layers[LAYER].packed.data, quantize(eight[f"{LAYER}.weight"].half(), 7).data)
    kept = [name for name in eight if name.removesuffix(".weight") not in layers]
    assert kept and all(torch.equal(unet.get_parameter(name), eight[name].to(dtype)) for name in kept)
    assert noise_of(unet, dtype).isfinite().all()
