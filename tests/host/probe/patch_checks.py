"""Checks of patches: forced hooks, LoRAs that do not fit. Each returns JSON-ready facts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch

from .checks import _difference, _forward, _module


def _hooks(patcher, names: tuple[str, ...], target) -> list[comfy.hooks.HookGroup]:
    """One hook group per named LoRA file, all registered with a patcher together."""
    groups, together = [], comfy.hooks.HookGroup()
    for name in names:
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", f"{name}.safetensors"))
        groups.append(comfy.hooks.create_hook_lora(lora, 1.0, 1.0))
        together.add(groups[-1].hooks[0])
    patcher.register_all_hook_patches(together, comfy.hooks.create_target_dict(target), {})
    return groups


class _Forced:
    """A clone of a MODEL with hooks that the host applies at every load, as it does for a CLIP."""

    def __init__(self, model) -> None:
        self.patcher = model.clone()
        self.patcher.is_clip = True
        self.device = comfy.model_management.get_torch_device()
        target = comfy.hooks.EnumWeightTarget.Model
        self.groups = dict(zip(("one", "other"), _hooks(self.patcher, ("lora", "loha"), target), strict=True))

    def force(self, name: str | None) -> None:
        self.patcher.forced_hooks = self.groups[name].clone() if name else None

    def dense_results(self) -> dict[str | None, torch.Tensor]:
        """The UNet's output with each group of hooks and without hooks, fully loaded each time."""
        result = {}
        for name in ("one", "other", None):
            self.force(name)
            self.patcher.patch_model(self.device)
            result[name] = _forward(self.patcher)
            self.patcher.detach()
        return result


def forced_hooks(package: str, model, other) -> dict:
    """Forced hooks with a LoRA in every state of loading; `other` is the same model with the same LoRA, but dense."""
    comfy.model_management.unload_all_models()
    wanted = _Forced(other).dense_results()
    ours = _Forced(model)
    patcher, device, size = ours.patcher, ours.device, model.model_size()
    differences: dict[str, float] = {}
    layers = [layer for _, layer in _module(package, "patcher").nf_layers(model.model)]

    def look(state: str, hooks: str | None = "one") -> None:
        differences[state] = _difference(_forward(patcher), wanted[hooks])

    def functions() -> list[int]:
        return [len(layer.weight_function) for layer in layers]

    ours.force("one")
    patcher.patch_model(device)
    look("loaded")
    most = max(functions())
    ours.force("other")
    patcher.partially_load(device, extra_memory=1e32)
    look("switched", "other")
    ours.force("one")
    patcher.partially_load(device, extra_memory=1e32)
    look("switched back")
    patcher.partially_unload(torch.device("cpu"), size // 2)
    look("partially unloaded")
    patcher.partially_load(device, extra_memory=size // 4)
    look("partially loaded again")
    patcher.partially_load(device, extra_memory=-size // 4)
    look("less")
    ours.force("other")
    patcher.partially_load(device, extra_memory=size // 4)
    look("switched while partially loaded", "other")
    patcher.detach()
    left = max(functions())
    patcher.patch_model(device, lowvram_model_memory=size * 6 // 10)
    look("partial", "other")
    ours.force(None)
    patcher.partially_load(device, extra_memory=1e32)
    look("without", None)
    ours.force("one")
    patcher.partially_load(device, extra_memory=1e32)
    look("with again")
    patcher.detach()
    return {
        "differences": differences,
        "most functions": most,
        "left functions": [left, max(functions())],
        "hooks": [_difference(wanted[name], wanted[None]) for name in ("one", "other")],
    }


def _small_clip(**model_options) -> comfy.sd.CLIP:
    """SD 1.5's text encoder with two layers."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    model_options["clip_l_model_config"] = {"num_hidden_layers": 2}
    options = {"disable_dynamic": True} if hasattr(comfy.model_patcher, "CoreModelPatcher") else {}
    return comfy.sd.CLIP(target, embedding_directory=None, model_options=model_options, **options)


def _clips(package: str) -> tuple[comfy.sd.CLIP, comfy.sd.CLIP]:
    """A packed text encoder with random weights, and the same one dense."""
    ops, patcher = _module(package, "ops"), _module(package, "patcher")
    quantize = _module(package.rpartition(".")[0], "nfq_core").quantize
    dense, packed = _small_clip(), _small_clip(custom_operations=ops.NFOps)
    generator = torch.Generator().manual_seed(12)
    state, packed_state = {}, {}
    for name, value in dense.cond_stage_model.state_dict().items():
        weight = torch.randn(value.shape, generator=generator)
        weight = weight / weight[0].numel() ** 0.5 if value.dim() > 1 else 1 + 0.05 * weight
        packed_state[name] = state[name] = weight.to(value.dtype)
        is_layer = name.endswith("weight") and ".layers." in name and value.dim() == 2
        if is_layer or name.endswith("token_embedding.weight"):
            quantised = quantize(weight.half(), 16)
            packed_state[name] = ops.wrap(quantised, value.dtype)
            state[name] = quantised.dequantize().to(value.dtype)
    dense.cond_stage_model.load_state_dict(state, strict=False)
    packed.cond_stage_model.load_state_dict(packed_state, strict=False)
    patcher.adopt(packed.patcher)
    return packed, dense


def _clip_lora(clip: comfy.sd.CLIP, seed: int) -> dict:
    """Patches for a text encoder's Linear layers, as the host makes them from a LoRA."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in clip.cond_stage_model.state_dict().items():
        if name.endswith("fc1.weight") or name.endswith("q_proj.weight"):
            up = torch.randn(value.shape[0], 4, generator=generator) * 0.2
            down = torch.randn(4, value.shape[1], generator=generator) / value.shape[1] ** 0.5
            result[name] = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 4.0, None, None, None))
    return result


def _encoded(clip: comfy.sd.CLIP) -> torch.Tensor:
    """Every conditioning of one prompt; the host loads the text encoder."""
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize("a red fox in the snow"), show_pbar=False)
    return torch.cat([conditioning for conditioning, _ in encoded]).float()


def clip_hooks(package: str, model, other) -> dict:
    """A packed text encoder with a LoRA and hooks, loaded and encoded by the host, compared with a dense one."""
    comfy.model_management.unload_all_models()
    results: dict[str, list[torch.Tensor]] = {}
    packed, dense = _clips(package)
    for base in (packed, dense):
        patched = base.clone()
        patched.add_patches(_clip_lora(base, 1), 0.8)
        hooked, scheduled = patched.clone(), patched.clone()
        for clip, seed in ((hooked, 2), (scheduled, 3)):
            hooks = comfy.hooks.HookGroup()
            hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
            hooks.add(hook)
            hook.weights, hook.weights_clip = {}, _clip_lora(base, seed)
            hook.need_weight_init = False
            if clip is scheduled:
                frames = comfy.hooks.HookKeyframeGroup()
                for start, strength in ((0.0, 1.0), (0.5, 0.3)):
                    frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
                hooks.set_keyframes_on_hooks(frames)
                clip.use_clip_schedule = True
            clip.patcher.forced_hooks = hooks.clone()
            target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
            clip.patcher.register_all_hook_patches(hooks, target)
        order = {"plain": base, "lora": patched, "hooks": hooked, "scheduled": scheduled}
        order |= {"hooks again": hooked, "lora again": patched, "plain again": base}
        for name, clip in order.items():
            results.setdefault(name, []).append(_encoded(clip))
        comfy.model_management.unload_all_models()
    layers = [layer for _, layer in _module(package, "patcher").nf_layers(packed.cond_stage_model)]
    encoded = {name: ours for name, (ours, _) in results.items()}
    return {
        "packed": len(layers),
        "differences": {name: _difference(ours, wanted) for name, (ours, wanted) in results.items()},
        "counts": {name: len(ours) for name, ours in encoded.items()},
        "lora": _difference(encoded["lora"], encoded["plain"]),
        "hooks": _difference(encoded["hooks"], encoded["lora"]),
        "left": max(len(layer.weight_function) for layer in layers),
    }


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The warnings and errors logged inside the `with` block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


def misfits_in_states(package: str, model, other) -> dict:
    """Log lines for a LoRA that does not fit, in several states and calls; `other` is the same model, dense."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.unload_all_models()
    result: dict = {"differences": {}, "lines": {}}
    with _logged() as lines:
        other.patch_model(device)
        wanted = _forward(other)
    other.detach()
    result["dense"] = lines[:]

    def look(state: str, change: Callable) -> None:
        with _logged() as lines:
            change()
            for _ in range(3):
                result["differences"][state] = _difference(_forward(model), wanted)
        result["lines"][state] = lines[:]

    look("loaded", lambda: model.patch_model(device))
    look("partially unloaded", lambda: model.partially_unload(torch.device("cpu"), model.model_size() // 2))
    look("loaded again", lambda: model.partially_load(device, extra_memory=1e32))
    model.detach()
    look("partial", lambda: model.patch_model(device, lowvram_model_memory=model.model_size() * 6 // 10))
    model.detach()
    factors = [sum(model._factor_bytes().values()), model.model_size()]
    return result | {"factors": factors}


def half_precision_adapters(package: str, model, other) -> dict:
    """Each kind of adapter on an fp16 weight: our result and the host's for a dense model."""
    lora, misfits = _module(package, "lora"), _module(package, "misfits")
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    adapters = {
        "oft": comfy.weight_adapter.OFTAdapter(set(), (random(8, 8, 8), None, 0.0, None)),
        "constrained oft": comfy.weight_adapter.OFTAdapter(set(), (random(8, 8, 8), None, 1.0, None)),
        "boft": comfy.weight_adapter.BOFTAdapter(set(), (random(2, 8, 8, 8), None, 0.0, None)),
        "dora": comfy.weight_adapter.LoRAAdapter(set(), (random(64, 4), random(4, 48), 4.0, None, random(64, 1), None)),
    }
    weight = random(64, 48).half()
    result = {}
    for name, adapter in adapters.items():
        patch = (0.7, adapter, 1.0, None, None)
        with _logged() as lines:
            attached = lora.WeightPatch("layer.weight", [patch], (64, 48), misfits.Misfits())
            ours = [attached(weight.clone()) for _ in range(3)][-1]
        with _logged() as stock_lines:
            wanted = comfy.lora.calculate_weight([patch], weight.clone(), "layer.weight")
        result[name] = {
            "difference": _difference(ours.float(), wanted.float()),
            "change": _difference(ours.float(), weight.float()),
            "lines": lines,
            "stock lines": stock_lines,
        }
    return result
