"""Quantise, save, share and load again, alone and as whole checkpoints."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from driver import Host, HostError
from graphs import DENSE, ORIGINAL, OURS, loader, lora, quantize, sample, save
from models import NARROW_KOALA, write_unet
from safetensors import safe_open
from safetensors.torch import load_file

import nfq_core
from nfq_core.checkpoints.examine import file_info, verify_file

MODEL = ["model", 0]
NODES = (
    *("NFQuantizedUNetLoader", "NFQuantizeUNet", "NFSaveCheckpoint", "NFQuantizedCheckpointLoader", "NFInspect"),
    *("NFQuantizedCLIPLoader", "NFQuantizeCLIP", "NFSaveCLIP"),
)
MARKERS = {
    "v-prediction": {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
    "EDM v-prediction": {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.5)},
    "Playground": {
        "edm_mean": torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).view(1, 4, 1, 1),
        "edm_std": torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).view(1, 4, 1, 1),
    },
}
"""Tensors next to a UNet that define its kind of prediction; the last are Playground 2.5's, which the host knows."""
WORKFLOW = {"nodes": [], "links": [], "version": 0.4, "extra": {"note": "from the page"}}


@pytest.mark.parametrize("node", NODES)
def test_nodes_are_listed_and_explained(host, node: str) -> None:
    info = host.get(f"/object_info/{node}")[node]
    assert info["category"] == "NFQ"
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert all(len(spec) > 1 and spec[1].get("tooltip") for spec in inputs.values()), inputs


@pytest.mark.smoke
def test_quantise_save_load(host) -> None:
    """A MODEL quantised in the graph is saved, listed at once, verified, and samples the same when loaded."""
    nodes = {"model": ORIGINAL, "packed": quantize(MODEL, levels=12, conv_levels=24)}
    nodes["save"] = save(["packed", 0], "deep/made", overwrite=False)
    first = host.latent(sample(nodes, ["packed", 0]))
    path = host.output / "diffusion_models" / "deep" / "made.nfq.safetensors"
    assert "deep/made.nfq.safetensors" in host.options("NFQuantizedUNetLoader", "unet_name")
    assert verify_file(path)["ok"]
    info = file_info(path)
    assert info["settings"]["levels"] == 12 and info["settings"]["conv_levels"] == 24
    original = host.base / "models" / "diffusion_models" / "narrow.safetensors"
    assert info["source"]["name"] == original.name
    assert info["source"]["sha256"] == hashlib.sha256(original.read_bytes()).hexdigest()
    assert info["original_bytes"] == original.stat().st_size
    assert len(info["layers"]) == 217
    again = host.latent(sample({"model": loader("deep/made.nfq.safetensors")}, MODEL))
    assert torch.equal(first, again)
    with pytest.raises(HostError, match="exists; choose another filename_prefix, or switch overwrite on"):
        host.run({**nodes, "packed": quantize(MODEL, levels=16)})
    assert file_info(path)["settings"]["levels"] == 12
    host.run({**nodes, "packed": quantize(MODEL, levels=7), "save": save(["packed", 0], "deep/made", overwrite=True)})
    assert file_info(path)["settings"]["levels"] == 7
    path.unlink()


def test_an_existing_file_is_refused_before_the_model_is_quantised(host) -> None:
    """The node before Save would fail if it ran. Without a name, source and settings give it."""
    path = host.output / "diffusion_models" / "narrow-NF12.nfq.safetensors"
    named = {"model": ORIGINAL, "packed": quantize(MODEL, levels=12), "save": save(["packed", 0], "")}
    host.run(named)
    assert file_info(path)["settings"]["levels"] == 12
    written = path.stat().st_mtime_ns
    failing = named | {"model": OURS}
    for prefix, message in (
        ("", "exists; choose another"),
        ("narrow-NF12", "exists; choose another"),
        ("new", "this MODEL is quantised already"),
    ):
        with pytest.raises(HostError, match=message):
            host.run(failing | {"save": save(["packed", 0], prefix)})
    whole = {"clip": ["companions", 0], "vae": ["companions", 1]}
    failing["companions"] = {"class_type": "NFQTestCompanions", "inputs": {}}
    checkpoint = host.output / "checkpoints" / path.name
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    for parts, message in (
        (whole, "checkpoints.*exists; choose another"),
        ({"clip": whole["clip"]}, "connect both, or"),
    ):
        with pytest.raises(HostError, match=message):
            host.run(failing | {"save": save(["packed", 0], "", **parts)})
    checkpoint.unlink()
    assert path.stat().st_mtime_ns == written
    host.run(named | {"save": save(["packed", 0], "", overwrite=True)})
    assert path.stat().st_mtime_ns > written
    path.unlink()


def test_saved_workflow(host, base) -> None:
    """The file contains graph and prompt for the page, unless the host runs with `--disable-metadata`."""
    graph = {"model": OURS, "save": save(MODEL, "workflow")}
    host.run(graph, WORKFLOW)
    path = host.output / "diffusion_models" / "workflow.nfq.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["workflow"]) == WORKFLOW
    assert json.loads(metadata["prompt"])["save"]["class_type"] == "NFSaveCheckpoint"
    assert file_info(path)["settings"] == file_info(base / "models/diffusion_models/vega.nfq.safetensors")["settings"]
    path.unlink()
    silent = Host(base, "--disable-metadata")
    try:
        silent.run(graph, WORKFLOW)
    finally:
        silent.close()
    with safe_open(path, "pt") as file:
        assert not {"workflow", "prompt"} & file.metadata().keys()
    path.unlink()


def test_quantising_bakes_patches_and_leaves_its_input(host) -> None:
    """A LoRA upstream is baked into the packed weights; the input MODEL samples as before."""
    plain = host.latent(sample({"model": ORIGINAL}, MODEL))
    nodes = {"model": ORIGINAL, "lora": lora("locon", 0.8, MODEL), "packed": quantize(["lora", 0], levels=32)}
    nodes["save"] = save(["packed", 0], "baked")
    packed = host.latent(sample(nodes, ["packed", 0]))
    dense = host.latent(sample(nodes, ["lora", 0]))
    correlation = torch.corrcoef(torch.stack([packed.flatten(), dense.flatten()]))[0, 1]
    assert correlation > 0.9
    assert torch.corrcoef(torch.stack([packed.flatten(), plain.flatten()]))[0, 1] < correlation
    assert torch.equal(host.latent(sample({"model": ORIGINAL}, MODEL)), plain)
    (host.output / "diffusion_models" / "baked.nfq.safetensors").unlink()


def test_stock_save_exports_dense_weights(host) -> None:
    """ModelSave writes the dequantised weights of our file, including a LoRA after the loader."""
    graph = {"model": OURS, "lora": lora("lora", 1.0, MODEL)}
    graph["save"] = {"class_type": "ModelSave", "inputs": {"model": MODEL, "filename_prefix": "diffusion_models/plain"}}
    graph["save lora"] = {
        "class_type": "ModelSave",
        "inputs": {"model": ["lora", 0], "filename_prefix": "diffusion_models/patched"},
    }
    host.run(graph)
    folder = host.output / "diffusion_models"
    plain, patched = load_file(folder / "plain_00001_.safetensors"), load_file(folder / "patched_00001_.safetensors")
    dense = load_file(host.base / "models" / "diffusion_models" / "narrow-dense.safetensors")
    assert {key.removeprefix("model.diffusion_model.") for key in plain} == dense.keys()
    changed = 0
    for key, weight in dense.items():
        assert torch.equal(plain["model.diffusion_model." + key].to(weight.dtype), weight), key
        changed += not torch.equal(patched["model.diffusion_model." + key].to(weight.dtype), weight)
    assert changed == sum(key.endswith(("attn1.to_q.weight", "attn2.to_k.weight", "ff.net.2.weight")) for key in dense)
    export = loader("patched_00001_.safetensors")
    ours, wanted = host.latent(sample(graph, ["lora", 0])), host.latent(sample({"model": export}, MODEL))
    # The export rounds patched weights to fp16.
    assert (ours - wanted).abs().max() < 0.02 * wanted.abs().max()
    for path in folder.glob("p*_0000?_.safetensors"):
        path.unlink()


def test_extracted_lora(host) -> None:
    """LoraSave writes the same difference for a packed MODEL as for the dense one."""

    def extract(model: dict, name: str) -> dict[str, torch.Tensor]:
        graph = {"model": model, "lora": lora("locon", 1.0, MODEL), "original": ORIGINAL}
        difference = {"model1": ["lora", 0], "model2": ["original", 0], "multiplier": 1.0}
        graph["difference"] = {"class_type": "ModelMergeSubtract", "inputs": difference}
        settings = {"rank": 8, "lora_type": "full_diff", "bias_diff": True, "model_diff": ["difference", 0]}
        graph["save"] = {"class_type": "LoraSave", "inputs": {"filename_prefix": name, **settings}}
        host.run(graph)
        path = host.output / f"{name}_00001_.safetensors"
        tensors = load_file(path)
        path.unlink()
        return tensors

    ours, dense = extract(OURS, "ours"), extract(DENSE, "dense")
    assert ours.keys() == dense.keys() and len(ours) > 217
    for key, wanted in dense.items():
        assert (ours[key] - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6, key
    # The change by the LoRA is much larger than the change by quantising.
    changed, other = (dense[next(key for key in dense if name in key)] for name in ("attn2.to_k", "attn2.to_v"))
    assert changed.float().std() > 2 * other.float().std() > 0


@pytest.mark.parametrize("markers", MARKERS.values(), ids=MARKERS)
def test_kinds_of_prediction_are_saved(host, base, markers: dict[str, torch.Tensor]) -> None:
    """NFSaveCheckpoint also writes the tensors that define a model's kind of prediction."""
    original = base / "models" / "diffusion_models" / "kind.safetensors"
    write_unet(original, NARROW_KOALA, **markers)
    nodes = {"model": loader(original.name), "packed": quantize(MODEL), "save": save(["packed", 0], "kind")}
    first = host.latent(sample(nodes, ["packed", 0], steps=1))
    path = host.output / "diffusion_models" / "kind.nfq.safetensors"
    saved = nfq_core.load(path)
    kinds = [
        host.check("prediction", nodes | {"again": loader(path.name)}, model=source)
        for source in (MODEL, ["packed", 0], ["again", 0])
    ]
    again = host.latent(sample({"model": loader("kind.nfq.safetensors")}, MODEL, steps=1))
    original.unlink()
    path.unlink()
    # The host computes its smallest and largest sigma, so the saved values differ from the given ones by a rounding.
    assert (again - first).abs().max() <= 2e-4 * first.abs().max()
    assert kinds[0] == kinds[1] == kinds[2]
    assert {key for key in saved if "." not in key or key.startswith("edm")} == markers.keys()
    for key, marker in markers.items():
        assert torch.allclose(saved[key].float(), marker), key


def test_quantising_fp8_weights_and_merges(host) -> None:
    """Weights that a stock loader cast to fp8, and a merge with a packed MODEL."""
    fp8 = {"class_type": "UNETLoader", "inputs": {"unet_name": "narrow.safetensors", "weight_dtype": "fp8_e4m3fn"}}
    ratio = {"model1": ["original", 0], "model2": ["ours", 0], "ratio": 0.5}
    nodes = {"model": fp8, "original": ORIGINAL, "ours": OURS}
    nodes["merge"] = {"class_type": "ModelMergeSimple", "inputs": ratio}
    for number, source in enumerate((MODEL, ["merge", 0])):
        graph = {**nodes, "packed": quantize(source, levels=32), "save": save(["packed", 0], f"made{number}")}
        packed, dense = host.latent(sample(graph, ["packed", 0])), host.latent(sample(nodes, source))
        path = host.output / "diffusion_models" / f"made{number}.nfq.safetensors"
        again = host.latent(sample({"model": loader(path.name)}, MODEL))
        path.unlink()
        assert torch.equal(packed, again)
        assert torch.corrcoef(torch.stack([packed.flatten(), dense.flatten()]))[0, 1] > 0.9


def test_inspect(host) -> None:
    nodes = {"model": ORIGINAL, "packed": quantize(MODEL, levels=16), "ours": OURS}
    nodes["made"] = {"class_type": "NFInspect", "inputs": {"model": ["packed", 0]}}
    nodes["loaded"] = {"class_type": "NFInspect", "inputs": {"model": ["ours", 0], "original": MODEL}}
    nodes["file"] = {"class_type": "NFInspect", "inputs": {"file_name": "diffusion_models/vega.nfq.safetensors"}}
    outputs = host.run(nodes)
    made, loaded, file = (outputs[name]["text"][0] for name in ("made", "loaded", "file"))
    assert "from narrow.safetensors: levels 16, conv_levels 32" in made
    assert "442 MB in the file, 1.49 GB as fp16" in file
    # The errors are the same if quantised in the graph or by the command, and if measured at once or later.
    assert made.splitlines()[4] == loaded.splitlines()[4]
    assert made.splitlines()[5:] == loaded.splitlines()[5:]
    nodes = {"model": ORIGINAL, "lora": lora("locon", 1.0, MODEL), "packed": quantize(["lora", 0])}
    nodes["made"] = {"class_type": "NFInspect", "inputs": {"model": ["packed", 0]}}
    nodes["measured"] = {"class_type": "NFInspect", "inputs": {"model": ["packed", 0], "original": ["lora", 0]}}
    outputs = host.run(nodes)
    made, measured = (outputs[name]["text"][0] for name in ("made", "measured"))
    assert made == measured
    assert "baked LoRA locon.safetensors at 1" in made
    with pytest.raises(HostError, match="connect one from NFQ Quantize Model"):
        host.run({"model": ORIGINAL, "inspect": {"class_type": "NFInspect", "inputs": {"model": MODEL}}})


def test_whole_checkpoint(host) -> None:
    """UNet, unchanged CLIP and VAE, saved in one file of ours and in a stock file, sample as before they were saved."""

    def picture(nodes: dict, model: list, clip: list, vae: list) -> dict:
        encode = {"class_type": "CLIPTextEncode", "inputs": {"text": "a red fox", "clip": clip}}
        graph = sample(nodes | {"prompt": encode}, model, positive=["prompt", 0], negative=["prompt", 0])
        graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["latent sampler", 0], "vae": vae}}
        graph["image"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "image"}}
        return graph

    def run(graph: dict) -> tuple[torch.Tensor, bytes]:
        outputs = host.run(graph)
        saved, image = outputs["latent"]["latents"][0], outputs["image"]["images"][0]
        return load_file(host.output / saved["subfolder"] / saved["filename"])["latent_tensor"], image

    made = {"model": ORIGINAL, "companions": {"class_type": "NFQTestCompanions", "inputs": {}}}
    made |= {"packed": quantize(MODEL), "lora": lora("lora", 0.5, ["packed", 0])}
    both = {"clip": ["companions", 0], "vae": ["companions", 1]}
    made["save"] = save(["packed", 0], "whole", text_encoders="keep", **both)
    made["stock save"] = {
        "class_type": "CheckpointSave",
        "inputs": {
            "model": ["lora", 0],
            **both,
            "filename_prefix": "checkpoints/stock",
        },
    }
    first, _ = run(picture(made, ["packed", 0], ["companions", 0], ["companions", 1]))
    unsaved = {name: node for name, node in made.items() if "save" not in name}
    patched, _ = run(picture(unsaved, ["lora", 0], ["companions", 0], ["companions", 1]))
    host.free()
    assert "whole.nfq.safetensors" in host.options("NFQuantizedCheckpointLoader", "ckpt_name")
    ours = {"all": {"class_type": "NFQuantizedCheckpointLoader", "inputs": {"ckpt_name": "whole.nfq.safetensors"}}}
    second, image = run(picture(ours, ["all", 0], ["all", 1], ["all", 2]))
    host.free()
    name = "stock_00001_.safetensors"
    stock = {"all": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}}
    stock["again"] = quantize(["all", 0], levels=32)
    stock["look"] = {"class_type": "NFInspect", "inputs": {"model": ["again", 0]}}
    assert (
        f"from {name}: levels 32"
        in host.run({node: stock[node] for node in ("all", "again", "look")})["look"]["text"][0]
    )
    third, _ = run(picture({"all": stock["all"]}, ["all", 0], ["all", 1], ["all", 2]))
    host.free()
    assert (host.output / image["filename"]).stat().st_size > 1000
    path = host.output / "checkpoints" / "whole.nfq.safetensors"
    assert verify_file(path)["ok"]
    dynamic = host.check("dynamic_companions", {}, argument=path.name)
    if dynamic["supported"]:
        assert dynamic["dynamic"] == {"clip": True, "vae": True, "clip for hooks": False, "vae reloaded": True}
        assert dynamic["saved"] > 700
    host.free()
    # CLIP and VAE are stored losslessly.
    with safe_open(path, "pt") as file, safe_open(host.output / "checkpoints" / name, "pt") as plain:
        companions = [key for key in plain.keys() if not key.startswith("model.diffusion_model.")]  # noqa: SIM118
        assert len(companions) > 700
        assert all(torch.equal(file.get_tensor(key).float(), plain.get_tensor(key).float()) for key in companions)
    path.unlink()
    (host.output / "checkpoints" / name).unlink()
    assert (second - first).abs().max() <= 2e-4 * first.abs().max()
    # The export rounds patched weights to fp16.
    assert (third - patched).abs().max() <= 0.02 * patched.abs().max()
    assert (patched - first).abs().max() > 1e-3 * first.abs().max()


def test_names_from_other_systems(host, base) -> None:
    """A workflow from Windows names a file with a backslash."""
    folder = base / "models" / "diffusion_models" / "deep"
    folder.mkdir()
    (folder / "vega.nfq.safetensors").symlink_to("../vega.nfq.safetensors")
    model = {**OURS, "inputs": {"unet_name": "deep\\vega.nfq.safetensors"}}
    host.run({"model": model, "look": {"class_type": "NFInspect", "inputs": {"model": MODEL}}})
    (folder / "vega.nfq.safetensors").unlink()
    folder.rmdir()


def test_flags_for_dense_models(host, base) -> None:
    """`--fp8_e4m3fn-unet` is for dense models; packed models and their unquantised tensors are not changed."""
    graph = sample({"model": OURS}, MODEL)
    flagged = Host(base, "--fp8_e4m3fn-unet")
    try:
        latent = flagged.latent(graph)
    finally:
        flagged.close()
    assert torch.equal(latent, host.latent(graph))


def test_restart_and_load_again(host, base) -> None:
    """Quantise, save, restart the host, load, sample: the latent is the same."""
    nodes = {"model": ORIGINAL, "packed": quantize(MODEL, levels=16), "save": save(["packed", 0], "kept")}
    latents = []
    for graph in (sample(nodes, ["packed", 0]), sample({"model": loader("kept.nfq.safetensors")}, MODEL)):
        fresh = Host(base)
        try:
            latents.append(fresh.latent(graph))
        finally:
            fresh.close()
    (base / "output" / "diffusion_models" / "kept.nfq.safetensors").unlink()
    assert torch.equal(*latents)
    # The command quantises to the same bits as the node.
    assert torch.equal(latents[0], host.latent(sample({"model": OURS}, MODEL)))
