"""Checks of CLIPs: what they encode, in every state of loading. Each returns JSON-ready facts."""

from __future__ import annotations

import os
import time

import comfy.model_management
import comfy.sd1_clip
import torch

from .checks import _difference, _module

SMALL = {"clip_l_model_config": 3, "clip_g_model_config": 31}
"""Layers of SDXL's small text encoders; the host recognises OpenCLIP-G by its 31st layer."""

PROMPTS = {
    "plain": "a red fox in the snow",
    "weighted": "a (red:1.4) fox in the [snow:0.6]",
    "long": " ".join(["a red fox in the snow, photograph, detailed"] * 12),
    "empty": "",
    "textual inversion": "a red fox, embedding:own in the snow",
}


def shrink_text_encoders() -> None:
    """Make all of SDXL's text encoders small if NFQ_TEST_SMALL_CLIP is set: their widths are those that files have."""
    if not os.environ.get("NFQ_TEST_SMALL_CLIP"):
        return
    make = comfy.sd1_clip.SDClipModel.__init__
    sizes = {name: {"num_hidden_layers": layers, "intermediate_size": 64} for name, layers in SMALL.items()}

    def make_small(self, *arguments, model_options=None, **named) -> None:
        make(self, *arguments, model_options={**(model_options or {}), **sizes}, **named)

    comfy.sd1_clip.SDClipModel.__init__ = make_small


def _encode(clip, prompt: str) -> torch.Tensor:
    """Conditioning and pooled output of one prompt as one tensor."""
    conditioning, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return torch.cat([conditioning.flatten(), pooled.flatten()]).float()


def encodings(package: str, model, other, clip, other_clip) -> dict:
    """Every prompt's difference between two CLIPs, and that of clip skip; facts about both."""
    differences = {}
    for name, prompt in PROMPTS.items():
        differences[name] = _difference(_encode(clip, prompt), _encode(other_clip, prompt))
    skipping = [each.clone() for each in (clip, other_clip)]
    for each in skipping:
        each.clip_layer(-3)
    differences["clip skip"] = _difference(*(_encode(each, PROMPTS["plain"]) for each in skipping))
    return {"differences": differences, "clips": [_facts(package, each) for each in (clip, other_clip)]}


def _facts(package: str, clip) -> dict:
    layers = dict(_module(package, "patcher").nf_layers(clip.patcher.model))
    return {
        "class": type(clip).__name__,
        "patcher": type(clip.patcher).__name__,
        "packed": len(layers),
        "formats": sorted({layer.weight._params.format.id for layer in layers.values()}),
        "model_size": clip.patcher.model_size(),
        "fp16_size": 2 * sum(value.numel() for value in clip.cond_stage_model.state_dict().values()),
    }


def clip_states(package: str, model, other, clip, other_clip) -> dict:
    """A CLIP loaded fully, partly, and again: differences from `other_clip`, which is fully loaded."""
    device, prompt = comfy.model_management.get_torch_device(), PROMPTS["weighted"]
    wanted = _encode(other_clip, prompt)
    comfy.model_management.unload_all_models()
    patcher, size = clip.patcher, clip.patcher.model_size()
    # The host would load it fully before encoding.
    clip.load_model = lambda *_: patcher
    differences, functions = {}, {}

    def look(state: str) -> None:
        differences[state] = _difference(_encode(clip, prompt), wanted)
        layers = [layer for _, layer in _module(package, "patcher").nf_layers(patcher.model)]
        functions[state] = max(len(layer.weight_function) for layer in layers)

    patcher.patch_model(device)
    look("full")
    patcher.partially_unload(torch.device("cpu"), size // 2)
    look("partially unloaded")
    patcher.partially_load(device, extra_memory=1e32)
    look("loaded again")
    patcher.detach()
    patcher.patch_model(device, lowvram_model_memory=size // 3)
    look("partial")
    patcher.detach()
    del clip.load_model
    return {"differences": differences, "most_functions": max(functions.values())}


def encode_seconds(package: str, model, other, clip, other_clip) -> dict:
    """Seconds to encode one prompt with each of two loaded CLIPs, five times in turns after a first."""
    seconds: dict[str, list[float]] = {"clip": [], "other_clip": []}
    for _ in range(6):
        for name, each in (("clip", clip), ("other_clip", other_clip)):
            started = time.perf_counter()
            _encode(each, PROMPTS["plain"])
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[1:] for name, taken in seconds.items()}
