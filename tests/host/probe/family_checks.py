"""Checks of whole families inside the host's process; each returns JSON-ready facts."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip as sd3_clip
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file

from .checks import _difference, _module
from .clip_checks import PROMPTS, _encode
from .family_models import TINY, fill, is_known, random_model

TEXT_ENCODERS = {
    "Stable Diffusion 1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "Stable Diffusion 3": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(t5=False)),
}
"""Tokeniser and network of the text encoders of families whose checkpoints hold them."""


def _latent(name: str, model, steps: int = 2) -> torch.Tensor:
    """A sampled latent."""
    tiny = TINY[name]
    generator = torch.Generator().manual_seed(3)
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 8, 8))
    noise = torch.randn(latent.shape, generator=generator)

    def text() -> list:
        options = {"pooled_output": torch.randn(1, tiny.pooled, generator=generator)} if tiny.pooled else {}
        return [[torch.randn(1, 32, tiny.text, generator=generator), options]]

    sampler = ("euler", "simple", text(), text(), latent)
    return comfy.sample.sample(model, noise, steps, 3.0, *sampler, seed=3, disable_pbar=True).float().cpu()


def _one_call(name: str, model) -> dict:
    """What the sampler gives to a model in its first step."""
    calls = []

    def wrapper(apply_model, arguments: dict) -> torch.Tensor:
        calls.append(arguments)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(wrapper)
    _latent(name, watched, steps=1)
    return calls[0]


@torch.inference_mode()
def _call(model, arguments: dict) -> torch.Tensor:
    return model.model.apply_model(arguments["input"], arguments["timestep"], **arguments["c"]).float().cpu()


def _lora(name: str, model) -> dict[str, torch.Tensor]:
    """A LoRA of the family's usual layout; its shapes are those of the layers, or parts of layers, that it changes."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    shapes = {key: tuple(value.shape) for key, value in model.model.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    result = {}
    for layer in TINY[name].loras:
        target = known[layer]
        rows, columns = shapes[target if isinstance(target, str) else target[0]][:2]
        if not isinstance(target, str) and target[1]:
            axis, _, length = target[1]
            rows, columns = (length, columns) if axis == 0 else (rows, length)
        ends = ("lora_down", "lora_up") if layer.startswith("lora_") else ("lora_A", "lora_B")
        result[f"{layer}.{ends[0]}.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        result[f"{layer}.{ends[1]}.weight"] = torch.randn(rows, 4, generator=generator) / 2
    return result


def _with_lora(model, lora: dict):
    return comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)[0]


def family(package: str, model, other, argument: str) -> dict | None:
    """All that users do with a model of the family `argument`; None if this host does not know it."""
    return _in_folder(_family, package, argument) if is_known(argument) else None


def _in_folder(check: Callable[[str, str, str], dict], package: str, name: str) -> dict:
    """Run a check of a family in a folder of its own, and unload its models afterwards."""
    folder = tempfile.mkdtemp()
    try:
        return check(package, name, folder)
    finally:
        comfy.model_management.unload_all_models()
        shutil.rmtree(folder)


def _family(package: str, name: str, folder: str) -> dict:
    core = sys.modules[package.removesuffix(".nodes") + ".nfq_core"]
    convert = sys.modules[core.__name__ + ".checkpoints.convert"]
    load, bake, save, patcher = (_module(package, part) for part in ("load", "bake", "save", "patcher"))
    recipe, calibration = _module(package, "recipe"), _module(package, "calibration")
    source, packed_path, dense_path = (os.path.join(folder, f"m{end}.safetensors") for end in ("", ".nfq", "-dense"))
    save_file(random_model(name), source)
    convert.quantize_file(source, packed_path)
    # fp16 has the exact values of packed weights.
    convert.dequantize_file(packed_path, dense_path, torch.float16)
    with core.NFQFile(packed_path) as file:
        quantized = len(file.quantized)
        dtypes = sorted({entry.dtype for entry in file.quantized.values()})
        family_name = file.facts.architecture if hasattr(file.facts, "architecture") else ""

    ours, dense = load.load_unet(packed_path), comfy.sd.load_diffusion_model(dense_path)
    layers = dict(patcher.nf_layers(ours.model))
    wanted = _latent(name, dense)
    facts = {
        "family": family_name,
        "class": type(ours.model.model_config).__name__,
        "quantized": quantized,
        "packed": len(layers),
        "dtypes": dtypes,
        "std": float(wanted.std()),
        "finite": bool(torch.isfinite(wanted).all()),
        "difference": _difference(_latent(name, ours), wanted),
        "resident": _difference(_latent(name, load.load_unet(packed_path, "resident")), wanted),
    }

    lora = _lora(name, dense)
    patched, ours_patched = _with_lora(dense, lora), _with_lora(ours, lora)
    with_lora = _latent(name, patched)
    facts["lora patches"] = len(ours_patched.patches)
    facts["lora changes"] = _difference(with_lora, wanted)
    facts["lora"] = _difference(_latent(name, ours_patched), with_lora)
    facts["base again"] = _difference(_latent(name, ours), wanted)

    # A sampler would load all of it.
    call = _one_call(name, patched)
    comfy.model_management.unload_all_models()
    patched.patch_model(dense.load_device)
    with_lora = _call(patched, call)
    patched.detach()
    ours_patched.patch_model(ours.load_device)
    whole = ours_patched.loaded_size()
    ours_patched.detach()
    ours_patched.patch_model(ours.load_device, lowvram_model_memory=ours_patched.model_size() * 9 // 10)
    facts["partly loaded"] = ours_patched.loaded_size() / whole
    facts["partial"] = _difference(_call(ours_patched, call), with_lora)
    ours_patched.detach()

    original = comfy.sd.load_diffusion_model(source)
    made = bake.quantize_model(original, core.Settings(), "cpu", recipe.Origin())
    facts["quantised in the graph"] = len(dict(patcher.nf_layers(made.model)))
    latent = _latent(name, made)
    facts["graph"] = _difference(latent, wanted)
    prefix = f"families-{os.path.basename(folder)}"
    path = save.save_model(made, None, None, prefix, False)
    try:
        again = load.load_unet(path)
        with core.NFQFile(path) as file:
            facts["saved dtypes"] = sorted({entry.dtype for entry in file.quantized.values()})
        facts["saved"] = _difference(_latent(name, again), latent)
        facts["saved layers"] = len(dict(patcher.nf_layers(again.model)))
        facts["size"] = os.path.getsize(path) / os.path.getsize(packed_path)
    finally:
        os.unlink(path)
    merged = bake.quantize_model(_with_lora(original, lora), core.Settings(), "cpu", recipe.Origin())
    facts["lora baked in"] = _difference(_latent(name, merged), latent)

    collecting = calibration.attach_collector(original, hessians=True, sensitivities=False)
    facts["collecting"] = _difference(_latent(name, collecting), _latent(name, original))
    path, _ = calibration.save_calibration(collecting, prefix, True)
    try:
        statistics = core.Calibration.load(path)
    finally:
        os.unlink(path)
    calibrated = bake.quantize_model(original, core.Settings(), "cpu", recipe.Origin(), calibration=statistics)
    facts["calibrated layers"] = len(statistics.inputs)
    facts["calibrated"] = _difference(_latent(name, calibrated), latent)
    return facts


def whole_checkpoint(package: str, model, other, argument: str) -> dict:
    """A family's checkpoint with its text encoders: loaded packed, beside the host's own loader of the dense file."""
    return _in_folder(_whole_checkpoint, package, argument)


def _whole_checkpoint(package: str, name: str, folder: str) -> dict:
    core = sys.modules[package.removesuffix(".nodes") + ".nfq_core"]
    convert = sys.modules[core.__name__ + ".checkpoints.convert"]
    load, patcher = (_module(package, part) for part in ("load", "patcher"))
    paths = ("unet", "source", "packed.nfq", "dense")
    unet, source, packed, dense = (os.path.join(folder, f"{path}.safetensors") for path in paths)
    save_file(random_model(name), unet)
    embeddings = folder_paths.get_folder_paths("embeddings")
    made = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*TEXT_ENCODERS[name]), embedding_directory=embeddings)
    fill(made.cond_stage_model)
    comfy.sd.save_checkpoint(source, comfy.sd.load_diffusion_model(unet), made)
    convert.quantize_file(source, packed)
    convert.dequantize_file(packed, dense, torch.float16)
    ours_model, ours_clip, _ = load.load_checkpoint(packed)
    theirs_model, theirs_clip, *_ = comfy.sd.load_checkpoint_guess_config(
        dense, True, True, embedding_directory=embeddings
    )
    wanted = _latent(name, theirs_model)
    prompts = [PROMPTS[kind] for kind in ("plain", "weighted", "empty")]
    return {
        "packed in MODEL": len(dict(patcher.nf_layers(ours_model.model))),
        "packed in CLIP": len(dict(patcher.nf_layers(ours_clip.patcher.model))),
        "share": os.path.getsize(packed) / os.path.getsize(source),
        "std": float(wanted.std()),
        "latents": _difference(_latent(name, ours_model), wanted),
        "encodings": max(_difference(_encode(ours_clip, each), _encode(theirs_clip, each)) for each in prompts),
    }
