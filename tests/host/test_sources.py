"""Sources that are already quantised: our files give the same latents as the source in the host's own loader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from driver import HostError
from graphs import loader, quantize, sample, save
from models import NARROW, random_unet
from safetensors.torch import save_file

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.files.original import Original
from nfq_core.files.prequantized import rotation_matrix
from nfq_core.planning.settings import Formats, Settings

MODEL = ["model", 0]
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    return (weight / scale).to(FP8), scale


def _described(**fields) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def old_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    codes, scale = _fp8(weight)
    return {f"{layer}.weight": codes, f"{layer}.scale_weight": scale}


def new_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    codes, scale = _fp8(weight)
    described = _described(format="float8_e4m3fn")
    return {f"{layer}.weight": codes, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": described}


def int8(layer: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    described = _described(format="int8_tensorwise")
    return {f"{layer}.weight": codes, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": described}


def rotated_int8(layer: str, weight: torch.Tensor) -> Tensors:
    rotated = (weight.unflatten(1, (-1, 64)) @ rotation_matrix(64).T).flatten(1)
    described = _described(format="int8_tensorwise", convrot=True, convrot_groupsize=64)
    return int8(layer, rotated) | {f"{layer}.comfy_quant": described}


def plain_fp8(layer: str, weight: torch.Tensor) -> Tensors:
    return {f"{layer}.weight": weight.to(FP8)}


FORMS = {"old fp8": old_fp8, "new fp8": new_fp8, "int8": int8, "rotated int8": rotated_int8, "plain fp8": plain_fp8}


def source(form: Callable[[str, torch.Tensor], Tensors]) -> Tensors:
    """The narrow model with the weights of its attention and feed-forward layers in a form that the host reads."""
    result: Tensors = {}
    for key, weight in random_unet(NARROW).items():
        is_inner = weight.ndim == 2 and ".transformer_blocks." in key
        result |= form(key.removesuffix(".weight"), weight.float()) if is_inner else {key: weight}
    if form is old_fp8:
        result["scaled_fp8"] = torch.zeros(2).to(FP8)
    return result


@pytest.fixture(params=FORMS)
def files(request, host) -> Iterator[tuple[str, str, str]]:
    """Names of the source, of the source with its scales applied, and of our file made from it."""
    folder = host.base / "models" / "diffusion_models"
    given, meant, ours = (folder / f"given{end}.safetensors" for end in ("", "-meant", ".nfq"))
    save_file(source(FORMS[request.param]), given, metadata={"format": "pt"})
    with Original(given) as original:
        save_file({key: original.tensor(key) for key in original.entries}, meant, metadata={"format": "pt"})
    quantize_file(given, ours, Settings(Formats.of(32)))
    yield given.name, meant.name, ours.name
    host.free()
    for path in (given, meant, ours):
        path.unlink()


def test_same_latents_as_from_the_stock_loader(host, files, request) -> None:
    given, meant, ours = files
    try:
        stock = host.latent(sample({"model": loader(given)}, MODEL, steps=1))
    except HostError as error:
        if "int8_tensorwise" not in str(error):
            raise
        pytest.skip(f"this host does not read it: {error}")
    packed = {"model": loader(given), "packed": quantize(MODEL, levels=32)}
    latents = {
        "scales applied": host.latent(sample({"model": loader(meant)}, MODEL, steps=1)),
        "our file": host.latent(sample({"model": loader(ours)}, MODEL, steps=1)),
        "quantised in the graph": host.latent(sample(packed, ["packed", 0], steps=1)),
    }
    errors = {name: ((latent - stock).norm() / stock.norm()).item() for name, latent in latents.items()}
    # The host rounds scales to its compute dtype, and its int8 layers round their inputs. Random weights amplify the
    # noise of 32 levels to 0.4. If scales were ignored, the latents would be unrelated to the stock ones: 1 and more.
    assert errors["scales applied"] < (0.1 if "int8" in request.node.callspec.id else 0.01), errors
    assert errors["our file"] < 0.45, errors
    assert errors["quantised in the graph"] < 0.45, errors
    assert torch.equal(host.latent(sample({"model": loader(given)}, MODEL, steps=1)), stock)
    graph = packed | {"save": save(["packed", 0], "from-given")}
    host.run(graph)
    saved = host.output / "diffusion_models" / "from-given.nfq.safetensors"
    try:
        again = host.latent(sample({"model": loader(saved.name)}, MODEL, steps=1))
        assert torch.equal(again, latents["quantised in the graph"])
    finally:
        saved.unlink()


def test_four_bits_are_refused_by_name(host) -> None:
    """A MODEL in the host's own NVFP4 format is refused with that name."""
    path = host.base / "models" / "diffusion_models" / "nvfp4.safetensors"
    tensors = random_unet(NARROW)
    layer = next(key for key in tensors if key.endswith("attn1.to_q.weight")).removesuffix(".weight")
    rows, columns = tensors[f"{layer}.weight"].shape
    tensors |= {
        f"{layer}.weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        f"{layer}.weight_scale": torch.zeros(rows, columns // 16).to(FP8),
        f"{layer}.weight_scale_2": torch.tensor(1.0),
        f"{layer}.comfy_quant": _described(format="nvfp4"),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        with pytest.raises(HostError, match="quantised already, as NVFP4"):
            host.run({"model": loader(path.name), "packed": quantize(MODEL), "save": save(["packed", 0], "x")})
    finally:
        host.free()
        path.unlink()
