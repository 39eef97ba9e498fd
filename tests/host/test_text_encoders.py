"""Packed text encoders in the real host: what they encode, LoRAs and merges on them, files, memory, and refusals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driver import Host, HostError
from graphs import ORIGINAL, OURS, lora_on_both, quantize, sample, save
from models import packed_unet, random_text_adapter
from safetensors.torch import load_file, save_file

import nfq_core
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import file_info, verify_file
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, SDXL_BASE
from nfq_core.planning.settings import Settings

COMPANIONS = {"class_type": "NFQTestCompanions", "inputs": {}}
ADAPTERS = {"kohya": {}, "diffusers": {}, "dora": {"layout": "kohya", "dora": True}}
LAYERS = 3 * 6 + 31 * 6 + 2
"""Packed weights of the small text encoders: in each layer four of attention and two of the MLP; token embeddings."""


def checkpoint(name: str) -> dict:
    """The loader for a whole checkpoint: ours for `.nfq.safetensors`, the stock one for others."""
    ours = name.endswith(".nfq.safetensors")
    kind = "NFQuantizedCheckpointLoader" if ours else "CheckpointLoaderSimple"
    return {"class_type": kind, "inputs": {"ckpt_name": name}}


def load_clip(*names: str, kind: str = "sdxl") -> dict:
    inputs = {f"clip_name{number if number > 1 else ''}": name for number, name in enumerate(names, 1)}
    return {"class_type": "NFQuantizedCLIPLoader", "inputs": {**inputs, "type": kind}}


def encode(clip: list, text: str = "a red fox") -> dict:
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": clip}}


OUR_FILE, DENSE_FILE = checkpoint("text.nfq.safetensors"), checkpoint("text-dense.safetensors")
BOTH = {"ours": OUR_FILE, "dense": DENSE_FILE}
CLIP, DENSE_CLIP = ["ours", 1], ["dense", 1]


@pytest.fixture(scope="module")
def host(base: Path) -> Iterator[Host]:
    """A host whose text encoders are SDXL's with fewer and smaller layers.

    Its files are a whole checkpoint saved by our node, the same dequantised, LoRAs and an embedding.
    """
    os.environ["NFQ_TEST_SMALL_CLIP"] = "1"
    embeddings = base / "models" / "embeddings"
    embeddings.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    own = {name: torch.randn(2, width, generator=generator) for name, width in (("clip_l", 768), ("clip_g", 1280))}
    save_file(own, embeddings / "own.safetensors")
    for name, options in ADAPTERS.items():
        adapter = random_text_adapter(**{"layout": name, "seed": len(name), **options})
        save_file(adapter, base / "models" / "loras" / f"text-{name}.safetensors")
    running = Host(base)
    try:
        graph = {"model": ORIGINAL, "packed": quantize(["model", 0], levels=16), "companions": COMPANIONS}
        graph["save"] = save(["packed", 0], "text", clip=["companions", 0], vae=["companions", 1])
        running.run(graph)
        made = base / "output" / "checkpoints" / "text.nfq.safetensors"
        dequantize_file(made, made.with_name("text-dense.safetensors"))
        yield running
    finally:
        del os.environ["NFQ_TEST_SMALL_CLIP"]
        running.close()
        for path in (base / "output").glob("*/text*.safetensors"):
            path.unlink()


def compared(host: Host, graph: dict, clip: list = CLIP, other: list = DENSE_CLIP) -> dict:
    return host.check("encodings", graph, clip=clip, other_clip=other)


@pytest.mark.smoke
def test_a_packed_clip_encodes_as_the_same_weights_dense(host) -> None:
    """Bit for bit: plain, weighted, long and empty prompts, textual inversion, clip skip."""
    facts = compared(host, BOTH)
    assert set(facts["differences"].values()) == {0}, facts["differences"]
    ours, dense = facts["clips"]
    assert ours["class"] == "PackedCLIP" and ours["patcher"] == "NFModelPatcher"
    assert (ours["packed"], ours["formats"]) == (LAYERS, ["nf256_b64"]) and dense["packed"] == 0
    assert ours["model_size"] < 0.53 * ours["fp16_size"]


def test_resident_is_a_stock_clip(host) -> None:
    resident = {**OUR_FILE, "inputs": {**OUR_FILE["inputs"], "memory": "resident"}}
    facts = compared(host, {"ours": resident, "dense": DENSE_FILE})
    assert set(facts["differences"].values()) == {0}
    assert facts["clips"][0]["class"] == "CLIP" and facts["clips"][0]["packed"] == 0


def test_encoding_is_the_same_as_before_saving(host) -> None:
    """In the graph, saved in a file for each text encoder, and in a whole checkpoint; and close to the original."""
    graph = {"companions": COMPANIONS, **BOTH}
    graph["packed"] = {"class_type": "NFQuantizeCLIP", "inputs": {"clip": ["companions", 0]}}
    inputs = {"clip": ["packed", 0], "filename_prefix": "text/alone"}
    host.run(graph | {"save": {"class_type": "NFSaveCLIP", "inputs": inputs}})
    names = [f"text/alone_clip_{name}.nfq.safetensors" for name in "lg"]
    assert set(names) <= set(host.options("NFQuantizedCLIPLoader", "clip_name"))
    files = [host.output / "text_encoders" / name for name in names]
    assert all(verify_file(file)["ok"] for file in files)
    assert [file_info(file)["settings"] for file in files] == [{"text_encoders": "8bit"}] * 2
    graph["again"] = load_clip(*names)
    for clip in (["packed", 0], ["again", 0]):
        facts = compared(host, graph, clip)
        assert set(facts["differences"].values()) == {0}, facts["differences"]
        assert facts["clips"][0]["packed"] == LAYERS
    # OpenCLIP's queries, keys and values are joined again, bit for bit.
    graph |= {"model": OURS, "both": save(["model", 0], "text-joined", clip=["again", 0], vae=["ours", 2])}
    host.run(graph)
    joined = nfq_core.load(host.output / "checkpoints" / "text-joined.nfq.safetensors")
    saved = nfq_core.load(host.output / "checkpoints" / "text.nfq.safetensors")
    assert joined.keys() == saved.keys()
    changed = [key for key in saved if not torch.equal(data(joined[key]), data(saved[key]))]
    # The host reads no logit_scale from a text encoder's file; encoding does not use it.
    assert set(changed) <= {f"{OPEN_CLIP}model.logit_scale"}
    facts = compared(host, graph, ["packed", 0], ["companions", 0])
    assert 0 < max(facts["differences"].values()) < 0.1
    for file in files:
        file.unlink()


def data(value: nfq_core.NFTensor | torch.Tensor) -> torch.Tensor:
    return value.data if isinstance(value, nfq_core.NFTensor) else value


@pytest.mark.parametrize("names", [["kohya"], ["diffusers"], ["dora"], ["kohya", "dora"]], ids=" and ".join)
def test_loras_on_text_encoders(host, names: list[str]) -> None:
    graph, ends = dict(BOTH), []
    for end in ("ours", "dense"):
        last = end
        for number, name in enumerate(names):
            graph[f"{end} {number}"] = lora_on_both(f"text-{name}", 0.8 - 0.3 * number, last)
            last = f"{end} {number}"
        ends.append([last, 1])
    facts = compared(host, graph, *ends)
    # The host rounds a dense model's patched weights to fp16.
    assert max(facts["differences"].values()) < 2e-3, facts["differences"]
    assert compared(host, graph, CLIP, ends[1])["differences"]["plain"] > 2e-2
    assert facts["clips"][0]["packed"] == LAYERS
    states = host.check("clip_states", graph, clip=ends[0], other_clip=ends[1])
    assert max(states["differences"].values()) < 2e-3, states
    assert states["most_functions"] == 1
    # The LoRA leaves nothing behind.
    assert set(compared(host, BOTH)["differences"].values()) == {0}


def test_merges_of_clips(host) -> None:
    """CLIPMergeSimple with a packed CLIP on either side."""
    graph = {**BOTH, "companions": COMPANIONS}
    for name, first, second in (
        ("ours first", CLIP, ["companions", 0]),
        ("dense first", DENSE_CLIP, ["companions", 0]),
        ("ours second", ["companions", 0], CLIP),
        ("dense second", ["companions", 0], DENSE_CLIP),
    ):
        graph[name] = {"class_type": "CLIPMergeSimple", "inputs": {"clip1": first, "clip2": second, "ratio": 0.3}}
    for side in ("first", "second"):
        facts = compared(host, graph, [f"ours {side}", 0], [f"dense {side}", 0])
        assert max(facts["differences"].values()) < 2e-3, facts["differences"]


def test_stock_saves_are_dense(host) -> None:
    """CLIPSave and CheckpointSave write the dequantised weights, with a LoRA after the loader."""
    graph = {
        **BOTH,
        "lora": lora_on_both("text-kohya", 1.0, "ours"),
        "dense lora": lora_on_both("text-kohya", 1.0, "dense"),
    }
    for end, source in (("ours", "ours"), ("dense", "dense"), ("lora", "lora"), ("dense-lora", "dense lora")):
        inputs = {"clip": [source, 1], "filename_prefix": f"clip/text-{end}"}
        graph[f"save {end}"] = {"class_type": "CLIPSave", "inputs": inputs}
    inputs = {
        "model": ["ours", 0],
        "clip": ["ours", 1],
        "vae": ["ours", 2],
        "filename_prefix": "checkpoints/text-stock",
    }
    graph["save all"] = {"class_type": "CheckpointSave", "inputs": inputs}
    host.run(graph)
    for part in ("clip_l", "clip_g"):
        ours, dense, lora, dense_lora = (
            load_file(host.output / "clip" / f"text-{end}_{part}_00001_.safetensors")
            for end in ("ours", "dense", "lora", "dense-lora")
        )
        assert ours.keys() == dense.keys()
        # No SDXL checkpoint has CLIP-L's projection: ComfyUI 0.8.0 saves the memory that it happened to get.
        filled = dense.keys() - ({"text_projection.weight"} if part == "clip_l" else set())
        changed = [key for key in filled if not torch.equal(ours[key].float(), dense[key].float())]
        assert changed == []
        assert all((lora[key].float() - dense_lora[key].float()).abs().max() < 2e-3 for key in filled)
        assert any(not torch.equal(lora[key], ours[key]) for key in filled)
    stock = load_file(host.output / "checkpoints" / "text-stock_00001_.safetensors")
    dense = load_file(host.output / "checkpoints" / "text-dense.safetensors")
    assert all(torch.equal(stock[key].float(), value.float()) for key, value in dense.items())


def test_saved_again_bit_for_bit(host) -> None:
    graph = {"ours": OUR_FILE, "save": save(["ours", 0], "text-again", clip=CLIP, vae=["ours", 2])}
    host.run(graph)
    first, again = (nfq_core.load(host.output / "checkpoints" / f"text{end}.nfq.safetensors") for end in ("", "-again"))
    assert first.keys() == again.keys()
    for key, value in first.items():
        assert type(value) is type(again[key]) and torch.equal(data(value), data(again[key])), key
    infos = [file_info(host.output / "checkpoints" / f"text{end}.nfq.safetensors") for end in ("", "-again")]
    assert infos[0]["settings"] == infos[1]["settings"]
    assert infos[0]["settings"]["text_encoders"] == "8bit"


@pytest.mark.parametrize(
    ("settings", "stored", "format"),
    [
        ({"preset": "tiny"}, "5bit", "nf32_b64"),
        ({"preset": "large"}, "8bit", "nf256_b64"),
        ({"preset": "tiny", "text_encoders": "keep"}, "keep", None),
    ],
    ids=["tiny", "large", "keep"],
)
def test_text_encoders_follow_the_preset(host, settings: dict, stored: str, format: str | None) -> None:
    """The node writes the same text encoders as the command does with the same settings."""
    choice = {"text_encoders": settings["text_encoders"]} if "text_encoders" in settings else {}
    graph = {"model": ORIGINAL, "packed": quantize(["model", 0], preset=settings["preset"]), "companions": COMPANIONS}
    inputs = {"clip": ["companions", 0], "vae": ["companions", 1], **choice}
    host.run(graph | {"save": save(["packed", 0], "text-preset", **inputs)})
    path = host.output / "checkpoints" / "text-preset.nfq.safetensors"
    info = file_info(path)
    assert info["settings"]["text_encoders"] == stored
    layers = {layer["name"]: layer["format"] for layer in info["layers"] if layer["name"].startswith("conditioner.")}
    linear = {name: layer for name, layer in layers.items() if "token_embedding" not in name}
    assert set(linear.values()) == ({format} if format else set())
    facts = host.check("sizes", {"ours": checkpoint(path.name)}, model=["ours", 0])
    assert facts["class"] == "NFModelPatcher"
    if stored != "keep":
        original = host.output / "checkpoints" / "text-original.safetensors"
        dense = {"class_type": "CheckpointSave", "inputs": {"model": ["model", 0], **inputs}}
        dense["inputs"] = {**dense["inputs"], "filename_prefix": "checkpoints/text-original"}
        dense["inputs"].pop("text_encoders", None)
        host.run({"model": ORIGINAL, "companions": COMPANIONS, "save": dense})
        original = original.with_name("text-original_00001_.safetensors")
        quantize_file(original, path, Settings.of(preset=settings["preset"]), overwrite=True)
        by_command = nfq_core.load(path, layers)
        host.run({**graph, "save": save(["packed", 0], "text-preset", overwrite=True, **inputs)})
        by_node = nfq_core.load(path, layers)
        assert all(torch.equal(by_node[key].data, by_command[key].data) for key in layers)
        original.unlink()
    path.unlink()


def test_model_and_clip_in_the_hosts_accounting(host, base) -> None:
    """SDXL with random codes of 16 levels: MODEL and CLIP take at most 0.36 of what they take as fp16."""
    unet = {CHECKPOINT_PREFIX + key: value for key, value in packed_unet(SDXL_BASE, "ldm").items()}
    others = nfq_core.load(host.output / "checkpoints" / "text.nfq.safetensors")
    others = {key: value for key, value in others.items() if not key.startswith(CHECKPOINT_PREFIX)}
    nfq_core.save(unet | others, base / "models" / "checkpoints" / "text-large.nfq.safetensors")
    graph = {"ours": checkpoint("text-large.nfq.safetensors")}
    model = host.check("sizes", graph, model=["ours", 0])
    clip = compared(host, graph, CLIP, CLIP)["clips"][0]
    host.free()
    (base / "models" / "checkpoints" / "text-large.nfq.safetensors").unlink()
    # SDXL's text encoders have 817 million weights; the small ones show their share of fp16.
    text = 2 * 817_000_000
    share = clip["model_size"] / clip["fp16_size"]
    # A CPU host holds kept tensors of the UNet as fp32; a host that computes in fp16 needs half of that.
    packed = model["packed"] + 2 * model["dense_weights"] + share * text
    assert packed <= 0.36 * (model["fp16_size"] + text)


CLIP_L, OPEN_CLIP = "conditioner.embedders.0.", "conditioner.embedders.1."


def missing(tensors: dict, *prefixes: str) -> dict:
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


def of_sd1(tensors: dict) -> dict:
    """CLIP-L alone, under the names of SD 1.5's checkpoints."""
    return {key.replace(CLIP_L, "cond_stage_model."): value for key, value in missing(tensors, OPEN_CLIP).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda tensors: missing(tensors, CLIP_L, OPEN_CLIP), "it has no text encoders", id="none"),
        pytest.param(
            lambda tensors: missing(tensors, OPEN_CLIP),
            r"text encoders are CLIP-L \(.*its UNet also reads OpenCLIP-G",
            id="clip l",
        ),
        pytest.param(
            lambda tensors: missing(tensors, CLIP_L),
            r"text encoders are OpenCLIP-G \(.*its UNet also reads CLIP-L",
            id="clip g",
        ),
        pytest.param(of_sd1, r"text encoders are CLIP-L \(.*also reads CLIP-L and OpenCLIP-G", id="SD 1.5's"),
    ],
)
def test_checkpoints_without_their_text_encoders(host, base, change, message: str) -> None:
    """MODEL and VAE load; using CLIP fails with one sentence that names the nodes to use."""
    path = base / "models" / "checkpoints" / "text-lacking.nfq.safetensors"
    nfq_core.save(change(nfq_core.load(host.output / "checkpoints" / "text.nfq.safetensors")), path)
    graph = {"ours": checkpoint(path.name)}
    uses = (
        {"use": encode(CLIP)},
        {"lora": lora_on_both("text-kohya", 1.0, "ours"), "use": encode(["lora", 1])},
        {"use": {"class_type": "NFQuantizeCLIP", "inputs": {"clip": CLIP}}},
    )
    look = {"look": {"class_type": "PreviewAny", "inputs": {"source": ["use", 0]}}}
    try:
        assert torch.isfinite(host.latent(sample(graph, ["ours", 0], steps=1))).all()
        for use in uses:
            with pytest.raises(HostError, match=f"{message}.*with Load NFQ CLIP or DualCLIPLoader") as error:
                host.run(graph | use | look)
            assert "\n" not in str(error.value)
    finally:
        host.free()
        path.unlink()


def test_refused_clips(host, base) -> None:
    """Wrong type, wrong folder, quantised twice, not quantised, a LoRA after quantising: one sentence each."""
    encoders, unets = base / "models" / "text_encoders", base / "models" / "diffusion_models"
    encoders.mkdir(exist_ok=True)
    graph = {
        "companions": COMPANIONS,
        "packed": {"class_type": "NFQuantizeCLIP", "inputs": {"clip": ["companions", 0]}},
    }
    inputs = {"clip": ["packed", 0], "filename_prefix": "text/alone", "overwrite": True}
    host.run(graph | {"save": {"class_type": "NFSaveCLIP", "inputs": inputs}})
    clip_l, clip_g = (f"text/alone_clip_{name}.nfq.safetensors" for name in "lg")
    (encoders / "unet.nfq.safetensors").symlink_to(unets / "narrow.nfq.safetensors")
    (encoders / "whole.nfq.safetensors").symlink_to(host.output / "checkpoints" / "text.nfq.safetensors")
    (unets / "clip.nfq.safetensors").symlink_to(host.output / "text_encoders" / clip_l)
    made = {**graph, "ours": OUR_FILE, "model": OURS, "lora": lora_on_both("text-kohya", 1.0, "ours")}
    save_clip = {"class_type": "NFSaveCLIP", "inputs": {"filename_prefix": "text/no"}}

    def saved(clip: list) -> dict:
        return made | {"save": {**save_clip, "inputs": {**save_clip["inputs"], "clip": clip}}}

    def loaded(*names: str, kind: str = "sdxl") -> dict:
        clip = {"clip": load_clip(*names, kind=kind), "use": encode(["clip", 0])}
        return clip | {"look": {"class_type": "PreviewAny", "inputs": {"source": ["use", 0]}}}

    again = {"again": {"class_type": "NFQuantizeCLIP", "inputs": {"clip": CLIP}}}
    cases = {
        "type sdxl needs the files of CLIP-L and OpenCLIP-G": loaded(clip_l),
        "type sdxl does not fit CLIP-L and CLIP-L": loaded(clip_l, clip_l),
        "type flux does not fit CLIP-L and OpenCLIP-G; choose the type": loaded(clip_l, clip_g, kind="flux"),
        "is a UNet.*belongs in models/diffusion_models, where Load NFQ Diffusion Model": loaded(
            "unet.nfq.safetensors", kind="stable_diffusion"
        ),
        "is a whole checkpoint; it belongs in models/checkpoints, where Load NFQ Checkpoint": loaded(
            "whole.nfq.safetensors", kind="stable_diffusion"
        ),
        r"is a text encoder \(CLIP-L\).*models/text_encoders, where Load NFQ CLIP finds it": sample(
            {"model": {**OURS, "inputs": {"unet_name": "clip.nfq.safetensors"}}}, ["model", 0]
        ),
        "quantised already; connect the loader of the original to NFQ Quantize CLIP": {**saved(["again", 0]), **again},
        "put NFQ Quantize CLIP before Save NFQ CLIP": saved(["companions", 0]),
        "apply it before NFQ Quantize CLIP": saved(["lora", 1]),
        "was added to a quantised CLIP": made | {"save": save(["model", 0], "x", clip=["lora", 1], vae=["ours", 2])},
        "'gone.nfq.safetensors' is not in models/text_encoders; put it there": loaded("gone.nfq.safetensors"),
    }
    try:
        for message, case in cases.items():
            with pytest.raises(HostError, match=message) as error:
                host.run(case)
            assert "\n" not in str(error.value), message
        assert not (host.output / "checkpoints" / "x.nfq.safetensors").exists()
    finally:
        host.free()
        for path in (
            encoders / "unet.nfq.safetensors",
            encoders / "whole.nfq.safetensors",
            unets / "clip.nfq.safetensors",
        ):
            path.unlink()


def test_the_loader_offers_the_hosts_types(host) -> None:
    ours = set(host.options("NFQuantizedCLIPLoader", "type"))
    stock = set(host.options("CLIPLoader", "type")) | set(host.options("DualCLIPLoader", "type"))
    # ComfyUI 0.8.0 lists flux2 too, though its `CLIPType` has none; it recognises such text encoders by their shapes.
    unknown = {"flux2"} if host.get("/system_stats")["system"]["comfyui_version"] == "0.8.0" else set()
    assert stock - ours == unknown


def test_the_newcomers_walk(host, base) -> None:
    """A whole checkpoint is quantised and saved; after a restart the file alone gives the same picture."""
    stock = base / "output" / "checkpoints" / "text-walk_00001_.safetensors"
    inputs = {"model": ["model", 0], "clip": ["companions", 0], "vae": ["companions", 1]}
    host.run(
        {
            "model": ORIGINAL,
            "companions": COMPANIONS,
            "save": {"class_type": "CheckpointSave", "inputs": {**inputs, "filename_prefix": "checkpoints/text-walk"}},
        }
    )
    graph = {"all": checkpoint(stock.name), "packed": quantize(["all", 0])}
    graph["save"] = save(["packed", 0], "text-walk", clip=["all", 1], vae=["all", 2])
    host.run(graph)
    made = base / "output" / "checkpoints" / "text-walk.nfq.safetensors"
    assert made.stat().st_size < 0.5 * stock.stat().st_size
    host.free()
    stock.unlink()
    latents = []
    for _ in range(2):
        fresh = Host(base)
        try:
            nodes = {"all": checkpoint(made.name), "prompt": encode(["all", 1])}
            walk = sample(nodes, ["all", 0], positive=["prompt", 0], negative=["prompt", 0])
            walk["decode"] = {
                "class_type": "VAEDecode",
                "inputs": {"samples": ["latent sampler", 0], "vae": ["all", 2]},
            }
            walk["image"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "walk"}}
            latents.append(fresh.latent(walk))
        finally:
            fresh.close()
    assert torch.isfinite(latents[0]).all() and latents[0].std() > 0
    assert torch.equal(*latents)
    assert list(base.glob("output/walk*.png"))
