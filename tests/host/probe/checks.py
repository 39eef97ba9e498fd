"""Checks inside the host's process for what a CPU host never does by itself; each returns JSON-ready facts."""

from __future__ import annotations

import copy
import gc
import sys
from contextlib import contextmanager
from typing import ClassVar
from unittest.mock import patch

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import torch

STEPS: list[tuple[float, float]] = []
"""Begin and end of each call of the UNet that the probe's timer saw, in seconds since the epoch."""


def nothing(package: str, model, other) -> None:
    """Do nothing: a prompt that ends after all prompts before it."""


def step_times(package: str, model, other) -> list:
    """The times that the timer recorded."""
    return STEPS


def _module(package: str, name: str):
    return sys.modules[f"{package}.{name}"]


def _forward(patcher) -> torch.Tensor:
    """The UNet's output for fixed inputs, with the patches that are attached."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, 2048, generator=generator)
    y = torch.randn(1, 2816, generator=generator)
    model = patcher.model
    where = {"device": model.device, "dtype": model.manual_cast_dtype or model.get_dtype()}
    x, context, y = (tensor.to(**where) for tensor in (x, context, y))
    return model.diffusion_model(x, torch.tensor([500.0], device=model.device), context=context, y=y).float().cpu()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def sizes(package: str, model, other) -> dict:
    """Sizes as the host sees them, and the real ones."""
    patcher = _module(package, "patcher")
    packed = sum(layer.weight._qdata.nbytes for _, layer in patcher.nf_layers(model.model))
    names = {name for name, _ in patcher.nf_layers(model.model)}
    dense = {name: value for name, value in model.model.state_dict().items() if name not in names}
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    return {
        "model_size": model.model_size(),
        "sum": packed + sum(value.nbytes for value in dense.values()),
        "packed": packed,
        "dense_weights": sum(value.numel() for value in dense.values()),
        "packed_layers": len(names),
        "fp16_size": 2 * weights,
        "class": type(model).__name__,
        "is_dynamic": getattr(model, "is_dynamic", bool)(),
    }


def memory_states(package: str, model, other) -> dict:
    """Full and partial load, partial unload, reload, detach; `other` is the same model and patches, but dense."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.unload_all_models()
    other.patch_model(device)
    wanted = _forward(other)
    other.detach()
    result = {}

    def look(state: str) -> None:
        functions = [len(m.weight_function) for _, m in _module(package, "patcher").nf_layers(model.model)]
        result[state] = {
            "difference": _difference(_forward(model), wanted),
            "loaded": model.loaded_size(),
            "most_functions": max(functions),
        }

    model.patch_model(device)
    look("full")
    model.partially_unload(torch.device("cpu"), model.model_size() // 2)
    look("partially unloaded")
    model.partially_load(device, extra_memory=model.model_size() // 4)
    look("partially loaded again")
    model.partially_load(device, extra_memory=1e32)
    look("loaded again")
    model.detach()
    result["detached functions"] = sum(
        len(m.weight_function) for _, m in _module(package, "patcher").nf_layers(model.model)
    )
    # The host reserves memory for the largest layer, dense and with its patches.
    model.patch_model(device, lowvram_model_memory=model.model_size() * 6 // 10)
    look("partial")
    model.partially_load(device, extra_memory=model.model_size() * 3 // 10)
    look("more")
    model.detach()
    model.patch_model(device, lowvram_model_memory=model.model_size() * 6 // 10, force_patch_weights=True)
    look("forced")
    model.detach()
    return result


def _ready_steps(patcher, layer) -> list:
    """What a layer's patch keeps on the compute device; factors in RAM do not count."""
    patch = patcher._attached(layer)
    return patch._ready if patch and patch._resident else []


def _low_rank_bytes(step) -> int:
    """Bytes of the two factors of a `LowRank`."""
    return step.up.nbytes + step.down.nbytes


def lora_factors(package: str, model, other) -> dict:
    """Where LoRA factors are when the model is fully and half loaded, and the bytes that the host counts for them."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.unload_all_models()
    patcher = _module(package, "patcher")
    result = {"size": model.model_size(), "clone": model.clone().model_size()}

    def look(state: str) -> None:
        _forward(model)
        layers = [layer for _, layer in patcher.nf_layers(model.model)]
        patches = [patcher._attached(layer) for layer in layers]
        kept = [step for layer in layers for step in _ready_steps(patcher, layer)]
        result[state] = {
            "loaded": model.loaded_size(),
            "patched": sum(patch is not None for patch in patches),
            "kept": len(kept),
            "bytes": sum(map(_low_rank_bytes, kept)),
        }

    model.patch_model(device)
    result["counted at load"] = sum(
        _low_rank_bytes(step) for _, layer in patcher.nf_layers(model.model) for step in _ready_steps(patcher, layer)
    )
    look("full")
    result["freed"] = model.partially_unload(torch.device("cpu"), model.model_size() // 2)
    look("half")
    model.detach()
    result["after"] = model.loaded_size()
    # A little less than the model needs with the factors: not everything may be loaded.
    model.patch_model(device, lowvram_model_memory=result["size"] - 1_000_000)
    look("tight")
    model.partially_load(device, extra_memory=-result["size"] // 4)
    look("less")
    model.partially_unload(torch.device("cpu"), 1e32)
    result["nothing"] = model.loaded_size()
    model.detach()
    return result


def packed_weights_alive(package: str, model, other) -> int:
    """Count the packed weights in this process."""
    return sum(_module(package, "ops").is_packed(thing) for thing in gc.get_objects())


def hooks_and_unloading(package: str, model, other) -> dict:
    """A scheduled hook, applied before each step as the sampler does, around a partial unload; `other` is not used."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.unload_all_models()
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", "lora.safetensors"))
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    patcher = model.clone()
    patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    patcher.patch_model(device)
    plain = _forward(patcher)
    patcher.apply_hooks(hooks)
    hooked = _forward(patcher)
    patcher.partially_unload(torch.device("cpu"), model.model_size() // 2)
    patcher.apply_hooks(hooks)
    unloaded = _forward(patcher)
    patcher.apply_hooks(None)
    restored = _forward(patcher)
    patcher.detach()
    return {
        "hook": _difference(hooked, plain),
        "unloaded": _difference(unloaded, hooked),
        "restored": _difference(restored, plain),
    }


def copies(package: str, model, other) -> dict:
    """Deep copies of layers, casts, clones, and a compiled layer."""
    patcher = _module(package, "patcher")
    name, layer = next(item for item in patcher.nf_layers(model.model) if item[1].weight.dim() == 2)
    x = torch.randn(3, layer.weight.shape[1])
    wanted = layer(x)
    twin = copy.deepcopy(layer)
    own_memory = twin.weight._qdata.data_ptr() != layer.weight._qdata.data_ptr()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), backend="eager")
    clone = model.clone()
    return {
        "name": name,
        "twin": bool(torch.equal(twin(x), wanted)) and own_memory,
        "half": _difference(half(x.bfloat16()).float(), wanted),
        "half_dtype": str(half.weight.dtype),
        "compiled": _difference(compiled(x), wanted),
        "clone_class": type(clone).__name__,
        "clone_shares": clone.model is model.model,
    }


def compiled_lora(package: str, model, other) -> dict:
    """A compiled layer with a LoRA, called twice: the number of graphs after each call."""
    patcher = _module(package, "patcher")
    comfy.model_management.unload_all_models()
    model.patch_model(comfy.model_management.get_torch_device())
    layer = next(layer for _, layer in patcher.nf_layers(model.model) if patcher._attached(layer))
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        x = torch.randn(3, layer.weight.shape[1])
        wanted = layer(x)
        compiled = torch.compile(layer, backend=count)
        result = {"graphs": [], "differences": []}
        for _ in range(2):
            result["differences"].append(_difference(compiled(x), wanted))
            result["graphs"].append(len(graphs))
    model.detach()
    # Without this the compiler would keep the layer.
    graphs.clear()
    del compiled
    torch._dynamo.reset()
    gc.collect()
    return result


def host_copies(package: str, model, other) -> dict:
    """A layer in the buffer of asynchronous offloading, and a model loaded again for a second device."""
    memory = getattr(comfy, "memory_management", None)
    if memory is None or not hasattr(model, "deepclone_multigpu"):
        return {"supported": False}
    _, layer = next(_module(package, "patcher").nf_layers(model.model))
    buffer = torch.zeros(memory.vram_aligned_size([layer.weight, layer.bias]), dtype=torch.uint8)
    weight, _ = memory.interpret_gathered_like([layer.weight, layer.bias], buffer)
    comfy.model_management.cast_to(layer.weight, None, torch.device("meta"), r=weight)
    second = model.deepclone_multigpu(comfy.model_management.get_torch_device())
    device = comfy.model_management.get_torch_device()
    model.patch_model(device)
    wanted = _forward(model)
    model.detach()
    second.patch_model(device)
    difference = _difference(_forward(second), wanted)
    second.detach()
    return {
        "supported": True,
        "gathered": _difference(weight.dequantize(), layer.weight.dequantize()),
        "buffer_bytes": buffer.numel(),
        "layer_bytes": layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes),
        "other_device": difference,
        "other_shares": second.model is model.model,
    }


class _Dynamic(comfy.model_patcher.ModelPatcher):
    """Stand-in, while `active`, for the host's dynamic patcher, which a CPU never gets: it has the same limits."""

    active: ClassVar[bool] = False
    made: ClassVar[list] = []

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model.dynamic_pins = {self.load_device: {"active": False}}
        self.made.append(self.model)

    def is_dynamic(self) -> bool:
        return _Dynamic.active

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        assert not force_patch_weights
        return super().partially_load(device_to, extra_memory)

    def partially_unload_ram(self, ram_to_unload, subsets=()):
        return 0


@contextmanager
def _dynamic_by_default():
    """Make the host's loaders use `_Dynamic`, as they use the real one on a GPU."""
    with (
        patch.object(comfy.model_patcher, "CoreModelPatcher", _Dynamic),
        patch.object(_Dynamic, "active", True),
        # It gives pinned buffers to dynamic patchers through a library that needs a GPU.
        patch.object(comfy.model_management, "reset_cast_buffers", lambda: None),
    ):
        try:
            yield
        finally:
            _Dynamic.made.clear()


def dynamic_vram(package: str, model, other) -> dict:
    """Loading and quantising where the host's default is a dynamic patcher; `model` was quantised to 16 levels."""
    if not hasattr(comfy.model_patcher, "CoreModelPatcher"):
        return {"supported": False}
    bake, recipe = _module(package, "bake"), _module(package, "recipe")
    settings = bake.Settings.of(levels=16)
    with _dynamic_by_default():
        load, arguments = model.cached_patcher_init
        loaded = [load(*arguments, disable_dynamic=True), load(*arguments)]
        made_by_us = len(_Dynamic.made)
        resident = [load(arguments[0], "resident", disable_dynamic=disable) for disable in (False, True)]
        stock = comfy.sd.load_diffusion_model(folder_paths.get_full_path("diffusion_models", "narrow.safetensors"))
        quantised = bake.quantize_model(stock, settings, "cpu", recipe.Origin())
        stock.cached_patcher_init = None
        try:
            bake.quantize_model(stock, settings, "cpu", recipe.Origin())
            refusal = ""
        except bake.NFQError as error:
            refusal = str(error)
        wanted = _forward(model)
        return {
            "supported": True,
            "stock": stock.is_dynamic(),
            "made by us": made_by_us,
            "resident": [patcher.is_dynamic() for patcher in resident],
            "classes": [type(patcher).__name__ for patcher in (*loaded, loaded[0].clone(), quantised)],
            "dynamic": [patcher.is_dynamic() for patcher in (*loaded, quantised)],
            "differences": [_difference(_forward(patcher), wanted) for patcher in (*loaded, quantised)],
            "error": refusal,
        }


def dynamic_companions(package: str, model, other, argument: str) -> dict:
    """CLIP and VAE of the checkpoint `argument` where the host's default is a dynamic patcher."""
    if not hasattr(comfy.model_patcher, "CoreModelPatcher"):
        return {"supported": False}
    path = folder_paths.get_full_path("checkpoints", argument)
    with _dynamic_by_default():
        loaded, clip, vae = _module(package, "load").load_checkpoint(path)
        reload_vae, arguments = vae.patcher.cached_patcher_init
        return {
            "supported": True,
            "dynamic": {
                "clip": clip.patcher.is_dynamic(),
                "vae": vae.patcher.is_dynamic(),
                "clip for hooks": clip.clone(disable_dynamic=True).patcher.is_dynamic(),
                "vae reloaded": reload_vae(*arguments).is_dynamic(),
            },
            "saved": len(_module(package, "save")._companions(loaded, clip, vae)),
        }


def prediction(package: str, model, other) -> dict:
    """A MODEL's kind of prediction."""
    sampling = model.get_model_object("model_sampling")
    return {
        "type": model.model.model_type.name,
        # Four digits: the host computes its sigmas, so a stored value is rounded.
        "sigma_max": float(f"{float(sampling.sigma_max):.4g}"),
        "sigma_min": float(f"{float(sampling.sigma_min):.4g}"),
        "latents": type(model.get_model_object("latent_format")).__name__,
    }


def quantise_without_gpu_memory(package: str, model, other) -> dict:
    """Quantise on a pretended GPU that has no memory: the packed layers that each choice ends with, or its error."""
    core = sys.modules[package.removesuffix(".nodes") + ".nfq_core"]
    bake, patcher, recipe = (_module(package, part) for part in ("bake", "patcher", "recipe"))
    gpu, real = torch.device("cuda"), bake.quantize_tensors

    def quantize_tensors(*arguments, device, **named):
        if device == gpu:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, device=device, **named)

    found = {}
    pretended = {"quantize_tensors": quantize_tensors, "quantizing_device": lambda choice: (gpu, "")}
    with patch.multiple(bake, **pretended):
        for choice in ("auto", "gpu"):
            try:
                made = bake.quantize_model(model, core.Settings(), choice, recipe.Origin())
                found[choice] = len(dict(patcher.nf_layers(made.model)))
            except torch.cuda.OutOfMemoryError as error:
                found[choice] = str(error)
    return found
