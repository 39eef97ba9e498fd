"""Refused graphs, interrupts and damaged files: one sentence, nothing left behind, and the host goes on."""

from __future__ import annotations

import json
import urllib.error

import pytest
import torch
from driver import Host, HostError
from graphs import ORIGINAL, OURS, VEGA, VEGA_ORIGINAL, loader, lora, quantize, sample, save

import nfq_core

MODEL = ["model", 0]


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        pytest.param(
            {"save": save(["original", 0], "x")},
            r"not quantised; put NFQ Quantize Model \(NFQuantizeUNet\) before",
            id="dense",
        ),
        pytest.param({"save": save(["lora", 0], "x")}, "apply it before NFQ Quantize Model", id="lora"),
        pytest.param({"save": save(["ours", 0], "../../x")}, "leads out of .*diffusion_models", id="outside"),
        pytest.param(
            {"save": save(["ours", 0], "../checkpoints/x")}, "leads out of .*diffusion_models", id="elsewhere"
        ),
        pytest.param({"save": save(["ours", 0], "x/..")}, "has no file name", id="nameless"),
        pytest.param(
            {"save": save(["ours", 0], "x", clip=["companions", 0])}, "needs both CLIP and VAE", id="clip alone"
        ),
        pytest.param({"save": save(["resident", 0], "x")}, "set memory to packed in its NFQ loader", id="resident"),
        pytest.param(
            {"again": quantize(["ours", 0]), "look": save(["again", 0], "x")}, "quantised already", id="twice"
        ),
        pytest.param(
            {"again": quantize(["other", 0]), "look": save(["again", 0], "x")},
            "has no Linear or Conv2d layers that NFQ quantises",
            id="other model",
        ),
        pytest.param(
            {"again": quantize(["compiled", 0]), "look": save(["again", 0], "x")}, "compiled already", id="compiled"
        ),
    ],
)
def test_refused_graphs(host, graph: dict, message: str) -> None:
    nodes = {"ours": OURS, "original": ORIGINAL, "lora": lora("lora", 1.0, ["ours", 0])}
    nodes["resident"] = {**OURS, "inputs": {**OURS["inputs"], "memory": "resident"}}
    nodes["companions"] = {"class_type": "NFQTestCompanions", "inputs": {}}
    nodes["other"] = {"class_type": "NFQTestOtherModel", "inputs": {}}
    nodes["compiled"] = {"class_type": "TorchCompileModel", "inputs": {"model": ["original", 0], "backend": "inductor"}}
    with pytest.raises(HostError, match=message):
        host.run(nodes | graph)
    assert not (host.output / "diffusion_models" / "x.nfq.safetensors").exists()


def test_bypassed_adapters_are_never_lost(host) -> None:
    """LoraLoaderBypass adds no patch: neither baking nor saving may drop it silently."""
    if "LoraLoaderBypassModelOnly" not in host.get("/object_info"):
        pytest.skip("this host has no LoraLoaderBypassModelOnly")
    bypass = lora("lora", 1.0, MODEL) | {"class_type": "LoraLoaderBypassModelOnly"}
    with pytest.raises(HostError, match="works only after NFQ Quantize Model"):
        host.run({"model": ORIGINAL, "lora": bypass, "packed": quantize(["lora", 0]), "save": save(["packed", 0], "x")})
    with pytest.raises(HostError, match="apply it before NFQ Quantize Model"):
        host.run({"model": OURS, "lora": bypass, "save": save(["lora", 0], "x")})


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "corrupted":
        return data[:-100_000] + bytes(100_000)
    if kind == "newer":
        assert data.count(b'container_version\\":1') == 1
        return data.replace(b'container_version\\":1', b'container_version\\":9')
    return b"not a safetensors file at all"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cut short"),
        ("corrupted", "damaged"),
        ("newer", "update the plugin"),
        ("foreign", "safetensors"),
    ],
)
def test_damaged_files(host, base, kind: str, message: str) -> None:
    unets = base / "models" / "diffusion_models"
    bad = unets / "bad.nfq.safetensors"
    look = {"look": {"class_type": "NFInspect", "inputs": {"model": ["all", 0]}}}
    bad.write_bytes(damaged((unets / "vega.nfq.safetensors").read_bytes(), kind))
    with pytest.raises(HostError, match=message) as error:
        host.run(sample({"model": loader(bad.name)}, MODEL))
    assert "\n" not in str(error.value)
    checkpoint = base / "models" / "checkpoints" / bad.name
    bad.rename(checkpoint)
    with pytest.raises(HostError, match=message):
        host.run({"all": {"class_type": "NFQuantizedCheckpointLoader", "inputs": {"ckpt_name": bad.name}}, **look})
    checkpoint.unlink()
    host.free()
    assert host.check("packed_weights_alive", {}) == 0
    host.run({"model": OURS, "look": {"class_type": "NFInspect", "inputs": {"model": MODEL}}})


def test_incomplete_and_unknown_models(host, base) -> None:
    unets = base / "models" / "diffusion_models"
    bad = unets / "bad.nfq.safetensors"
    tensors = nfq_core.load(unets / "vega.nfq.safetensors")
    lost = "output_blocks.4.1.transformer_blocks.0.attn2.to_v.weight"
    nfq_core.save({key: value for key, value in tensors.items() if key != lost}, bad)
    with pytest.raises(HostError, match=f"tensor '{lost}' of Segmind Vega's UNet is missing"):
        host.run(sample({"model": loader(bad.name)}, MODEL))
    wide = torch.randn(tensors[lost].shape[0], tensors[lost].shape[1] + 64)
    nfq_core.save(tensors | {lost: nfq_core.quantize(wide)}, bad, overwrite=True)
    with pytest.raises(HostError, match=f"tensor '{lost}' of Segmind Vega's UNet has another shape"):
        host.run(sample({"model": loader(bad.name)}, MODEL))
    nfq_core.save(nfq_core.quantize_state_dict({"layer.weight": torch.randn(64, 64)}), bad, overwrite=True)
    with pytest.raises(HostError, match="this ComfyUI does not know its architecture"):
        host.run(sample({"model": loader(bad.name)}, MODEL))
    (base / "models" / "checkpoints" / "unet.nfq.safetensors").symlink_to(unets / "vega.nfq.safetensors")
    only = {"class_type": "NFQuantizedCheckpointLoader", "inputs": {"ckpt_name": "unet.nfq.safetensors"}}
    with pytest.raises(HostError, match="use Load NFQ Diffusion Model"):
        host.run(sample({"model": only}, MODEL))
    (base / "models" / "checkpoints" / "unet.nfq.safetensors").unlink()
    bad.unlink()


def test_missing_file_is_explained(host) -> None:
    """The error explains how to make the file, from the recipe that the page wrote into the workflow."""
    recipe = host.get("/nfq/file?folder=diffusion_models&name=vega.nfq.safetensors")["recipe"]
    assert recipe["source"] == "vega.safetensors" and len(recipe["source_sha256"]) == 64
    inputs = {"unet_name": "gone.nfq.safetensors", "recipe": json.dumps(recipe)}
    model = {"class_type": "NFQuantizedUNetLoader", "inputs": inputs}
    with pytest.raises(HostError) as error:
        host.run(sample({"model": model}, MODEL))
    node_inputs = "preset=levels effort=fast levels=16 conv_levels=32"
    for part in ("vega.safetensors", recipe["source_sha256"], node_inputs, "filename_prefix 'gone'"):
        assert part in str(error.value)
    recipe["settings"]["baked"] = ["LoRA style.safetensors at 0.8"]
    inputs["recipe"] = json.dumps(recipe)
    with pytest.raises(HostError, match=rf" plus LoRA style\.safetensors at 0\.8 with {node_inputs}"):
        host.run(sample({"model": model}, MODEL))
    with pytest.raises(HostError, match="put it there, or choose another"):
        host.run(sample({"model": loader("gone.nfq.safetensors")}, MODEL))
    for name in ("vega.safetensors", 5):
        inputs["unet_name"] = name
        with pytest.raises(HostError, match="load others with a stock loader"):
            host.run(sample({"model": model}, MODEL))


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("folder=loras&name=lora.safetensors", 400),
        ("folder=diffusion_models&name=../diffusion_models/vega.nfq.safetensors", 404),
        ("folder=diffusion_models&name=vega.safetensors", 404),
        ("folder=checkpoints&name=vega.nfq.safetensors", 404),
        ("", 400),
    ],
)
def test_route_takes_listed_names_only(host, query: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        host.get(f"/nfq/file?{query}")
    assert raised.value.code == status and json.load(raised.value)["error"]


def test_route_only_reads(host) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        host.post("/nfq/file?folder=diffusion_models&name=vega.nfq.safetensors", {})
    assert raised.value.code == 405


def test_route_reports_a_damaged_file(host, base) -> None:
    bad = base / "models" / "diffusion_models" / "cut.nfq.safetensors"
    bad.write_bytes((bad.parent / "vega.nfq.safetensors").read_bytes()[:1000])
    try:
        with pytest.raises(urllib.error.HTTPError) as raised:
            host.get(f"/nfq/file?folder=diffusion_models&name={bad.name}")
        error = json.load(raised.value)["error"]
        assert raised.value.code == 422 and error.startswith(bad.name) and str(base) not in error
    finally:
        bad.unlink()


@pytest.mark.parametrize("stage", ["quantising", "saving"])
def test_interrupt(host, stage: str) -> None:
    """When a run is stopped half-way, nothing partial remains and the host goes on."""
    nodes = {"model": VEGA_ORIGINAL, "packed": quantize(MODEL, effort="best" if stage == "quantising" else "fast")}
    if stage == "saving":
        nodes = {"packed": VEGA}
        host.run({"packed": VEGA, "look": {"class_type": "NFInspect", "inputs": {"model": ["packed", 0]}}})
    else:
        host.latent(sample({"model": VEGA_ORIGINAL}, MODEL, steps=1))
    queued = host.queue(nodes | {"save": save(["packed", 0], "stopped")})
    if stage == "saving":
        host.wait_until(lambda _: host.leftovers(), "it did not begin to save")
    else:
        host.wait_until(lambda state: state["progress"].get("packed", 0) > 0, "it did not begin to quantise")
    host.post("/interrupt", {})
    node = "NFQuantizeUNet" if stage == "quantising" else "NFSaveCheckpoint"
    with pytest.raises(HostError, match=f"interrupted in {node}"):
        host.wait(queued)
    assert not host.leftovers()
    assert not (host.output / "diffusion_models" / "stopped.nfq.safetensors").exists()
    host.free()
    assert host.check("packed_weights_alive", {}) == 0
    host.run({"model": VEGA, "look": {"class_type": "NFInspect", "inputs": {"model": MODEL}}})


def test_full_disk(base) -> None:
    """A save to a full disk fails with one sentence and leaves nothing; the host goes on."""
    host = Host(base, file_limit=100_000_000)
    try:
        with pytest.raises(HostError, match="could not be written: File too large; nothing was changed"):
            host.run({"model": VEGA, "save": save(MODEL, "too-large")})
        assert not host.leftovers()
        assert not (host.output / "diffusion_models" / "too-large.nfq.safetensors").exists()
        host.run({"model": VEGA, "look": {"class_type": "NFInspect", "inputs": {"model": MODEL}}})
    finally:
        host.close()
