"""Memory that the host counts, moves and frees; copies; its dynamic patcher; every architecture of the family."""

from __future__ import annotations

import pytest
import torch
from graphs import DENSE, OURS, VEGA, loader, lora, sample
from models import packed_unet

import nfq_core
from nfq_core.checkpoints.convert import dequantize_file
from nfq_core.models.unet_keys import KOALA_1B, KOALA_700M, SDXL_BASE, SDXL_INPAINTING, SDXL_REFINER, SSD_1B
from nfq_core.planning.settings import Formats, Settings

MODEL = ["model", 0]


def test_the_host_sees_packed_bytes(host) -> None:
    sizes = host.check("sizes", {"model": OURS}, model=MODEL)
    assert sizes["class"] == "NFModelPatcher"
    assert sizes["packed_layers"] == 217
    assert sizes["model_size"] == sizes["sum"]
    # A CPU host holds kept tensors as fp32; a host that computes in fp16 needs half of that.
    assert sizes["packed"] + 2 * sizes["dense_weights"] <= 0.35 * sizes["fp16_size"]
    assert sizes["model_size"] <= 0.35 * sizes["fp16_size"]


@pytest.mark.parametrize("memory", ["resident", "auto"])
def test_resident_is_a_stock_model(host, memory: str) -> None:
    """Weights are dequantised once at load; auto does so if twice that memory is free, as in these tests."""
    resident = {**OURS, "inputs": {**OURS["inputs"], "memory": memory}}
    sizes = host.check("sizes", {"model": resident}, model=MODEL)
    assert sizes["class"].startswith("ModelPatcher") and sizes["packed_layers"] == 0
    assert sizes["model_size"] >= sizes["fp16_size"]
    assert torch.equal(host.latent(sample({"model": resident}, MODEL)), host.latent(sample({"model": OURS}, MODEL)))
    assert "narrow.nfq.safetensors is loaded resident: " in host.log.read_text()


def test_quantising_on_a_gpu_without_memory(host) -> None:
    """The CPU does it, unless the user asked for the GPU."""
    found = host.check("quantise_without_gpu_memory", {"model": DENSE}, model=MODEL)
    assert found == {"auto": 217, "gpu": "CUDA out of memory"}


def test_load_states(host) -> None:
    """Fully, partly or not on the device: the layers give the same result as a dense, patched model."""
    prompt = {"model": OURS, "lora": lora("locon", 0.8, MODEL), "other": lora("dora", 0.5, ["lora", 0])}
    prompt |= {"dense": DENSE, "dense lora": lora("locon", 0.8, ["dense", 0])}
    prompt |= {"dense other": lora("dora", 0.5, ["dense lora", 0])}
    states = host.check("memory_states", prompt, model=["other", 0], other=["dense other", 0])
    assert states.pop("detached functions") == 0
    for name, state in states.items():
        assert state["difference"] <= 2e-4, name
        assert state["most_functions"] == 1, name
    assert states["full"]["loaded"] > states["partially unloaded"]["loaded"] > 0
    assert states["partially unloaded"]["loaded"] < states["partially loaded again"]["loaded"]
    assert states["loaded again"]["loaded"] == states["full"]["loaded"]
    assert 0 < states["partial"]["loaded"] < states["more"]["loaded"] < states["full"]["loaded"]


def test_lora_factors_stay_with_their_layers(host) -> None:
    """All LoRAs of a layer form one pair of factors, which follow the layer to the device and count as loaded."""
    prompt = {"model": OURS, "lora": lora("lora", 0.8, MODEL), "other": lora("locon", 0.5, ["lora", 0])}
    facts = host.check("lora_factors", prompt, model=["other", 0])
    full, half = facts["full"], facts["half"]
    assert full["kept"] == full["patched"] > 0
    assert full["loaded"] == facts["size"] == facts["clone"]
    assert facts["counted at load"] == full["bytes"] > 0
    assert 0 < half["kept"] < full["kept"]
    assert half["patched"] == full["patched"]
    assert half["loaded"] == full["loaded"] - facts["freed"]
    assert facts["after"] == 0
    assert 0 < facts["less"]["loaded"] < facts["tight"]["loaded"] < facts["size"]
    assert 0 < facts["less"]["kept"] <= facts["tight"]["kept"]
    assert facts["nothing"] >= 0


def test_hooks_survive_a_partial_unload(host) -> None:
    facts = host.check("hooks_and_unloading", {"model": OURS}, model=MODEL)
    assert facts["hook"] > 1e-3
    assert facts["unloaded"] == facts["restored"] == 0


def test_copies_and_compiled_layers(host) -> None:
    facts = host.check("copies", {"model": OURS}, model=MODEL)
    assert facts["twin"] and facts["clone_shares"]
    assert facts["clone_class"] == "NFModelPatcher"
    assert facts["compiled"] == 0
    # bf16 keeps 8 significant bits of weights and inputs.
    assert facts["half_dtype"] == "torch.bfloat16" and facts["half"] < 0.02


def test_a_compiled_layer_with_a_lora_is_compiled_once(host) -> None:
    facts = host.check("compiled_lora", {"model": OURS, "lora": lora("lora", 1.0, MODEL)}, model=["lora", 0])
    assert facts["graphs"] == [1, 1]
    assert max(facts["differences"]) == 0


def test_copies_in_the_hosts_buffers(host) -> None:
    """The host copies offloaded weights into its own buffers, and loads the file again for another device."""
    facts = host.check("host_copies", {"model": OURS, "lora": lora("lora", 1.0, MODEL)}, model=["lora", 0])
    if not facts["supported"]:
        pytest.skip("this host has no such buffers")
    assert facts["gathered"] == 0
    # The host aligns weight and bias to 1,024 bytes each.
    assert facts["layer_bytes"] <= facts["buffer_bytes"] < facts["layer_bytes"] + 2 * 1024
    assert facts["other_device"] == 0 and not facts["other_shares"]


def test_never_the_dynamic_patcher(host) -> None:
    """Our MODELs stay static where DynamicVRAM is the default; tested with a stand-in, because a CPU has no VRAM."""
    facts = host.check("dynamic_vram", {"model": OURS}, model=MODEL)
    if not facts["supported"]:
        pytest.skip("this host has no DynamicVRAM")
    assert facts["stock"] and facts["made by us"] == 0
    assert facts["resident"] == [True, False]
    assert set(facts["classes"]) == {"NFModelPatcher"}
    assert facts["dynamic"] == [False, False, False]
    assert facts["differences"] == [0, 0, 0]
    assert "start ComfyUI with --disable-dynamic-vram" in facts["error"]


def test_runs_do_not_grow_the_host(host) -> None:
    """Repeated loading, sampling with a LoRA and freeing does not grow the process."""

    def once(strength: float) -> int:
        host.latent(sample({"model": VEGA, "lora": lora("vega-lora", strength, MODEL)}, ["lora", 0], steps=1))
        host.free()
        return host.resident_bytes()

    once(0.1)
    once(0.2)
    sizes = [once(0.3 + 0.1 * i) for i in range(6)]
    # A leaked model would add 0.5 GB each time, 2.5 GB in total; the allocator's reserve varies by up to 0.2 GB.
    assert min(sizes[-2:]) - min(sizes[:2]) < 250e6, sizes
    # torch.compile keeps one or two layers of another test; a model has 217.
    assert host.check("packed_weights_alive", {}) < 10


def test_changed_file_is_noticed(host, base) -> None:
    unets = base / "models" / "diffusion_models"
    changing = unets / "changing.nfq.safetensors"
    graph = sample({"model": {**OURS, "inputs": {"unet_name": changing.name}}}, MODEL)
    changing.write_bytes((unets / "narrow.nfq.safetensors").read_bytes())
    first = host.latent(graph)
    tensors = nfq_core.load(changing)
    tensors["out.2.weight"] = -tensors["out.2.weight"]
    nfq_core.save(tensors, changing, overwrite=True)
    second = host.latent(graph)
    changing.unlink()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("layout", ["prefixed", "diffusers"])
def test_key_layouts(host, base, layout: str) -> None:
    """The file keeps its source's names; the loader renames them."""
    path = base / "models" / "diffusion_models" / f"{layout}.nfq.safetensors"
    nfq_core.save(packed_unet(KOALA_700M, layout), path)
    latent = host.latent(sample({"model": {**OURS, "inputs": {"unet_name": path.name}}}, MODEL))
    path.unlink()
    wanted = base / "models" / "diffusion_models" / "ldm.nfq.safetensors"
    nfq_core.save(packed_unet(KOALA_700M, "ldm"), wanted)
    assert torch.equal(latent, host.latent(sample({"model": {**OURS, "inputs": {"unet_name": wanted.name}}}, MODEL)))
    wanted.unlink()


@pytest.mark.parametrize(
    "formats",
    [
        ("t4w8_b64", "t5w9_b64"),
        ("t2w8_b64", "t3w8_b64"),
        ("nf4_b64", "t6w9_b64"),
        ("nf256_b64", "t4w8_b64"),
    ],
    ids=" and ".join,
)
def test_formats_chosen_by_size(host, base, formats: tuple[str, str]) -> None:
    """Random codes of each format give the same latents as their dequantised file in the stock loader."""
    unets = base / "models" / "diffusion_models"
    path, dense = unets / "by-size.nfq.safetensors", unets / "by-size-dense.safetensors"
    nfq_core.save(packed_unet(KOALA_700M, "ldm", Settings(Formats.of(format=formats[0], conv_format=formats[1]))), path)
    dequantize_file(path, dense)
    ours, wanted = (host.latent(sample({"model": loader(file.name)}, MODEL, steps=1)) for file in (path, dense))
    path.unlink()
    dense.unlink()
    assert torch.isfinite(ours).all() and ours.std() > 0
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    "architecture", [SDXL_BASE, SSD_1B, KOALA_1B, SDXL_INPAINTING, SDXL_REFINER], ids=lambda a: a.name
)
def test_family(host, base, architecture) -> None:
    """Every architecture of the family, with random codes, loads packed and samples; the refiner only loads.

    The refiner needs another text encoding than the test's conditioning.
    """
    path = base / "models" / "diffusion_models" / "family.nfq.safetensors"
    nfq_core.save(packed_unet(architecture, "ldm"), path, overwrite=True)
    model = {**OURS, "inputs": {"unet_name": path.name}}
    sizes = host.check("sizes", {"model": model}, model=MODEL)
    if architecture != SDXL_REFINER:
        latent = host.latent(sample({"model": model}, MODEL, steps=1))
        assert torch.isfinite(latent).all() and latent.std() > 0
    host.free()
    path.unlink()
    assert sizes["model_size"] == sizes["sum"]
    assert sizes["packed"] + 2 * sizes["dense_weights"] <= 0.35 * sizes["fp16_size"]
