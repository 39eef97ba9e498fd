"""A plugin for the host under test: inputs that need no files, and checks that run inside the host's process."""

from __future__ import annotations

import json
import sys
import time
import zlib

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from aiohttp import web
from comfy_execution.progress import get_progress_state
from server import PromptServer

from . import checks, clip_checks, dynamic_vram, family_checks, family_models, patch_checks

NARROW_CHANNELS = 64


def _know_narrow_models() -> None:
    """Let the host recognise `models.NARROW` and `NARROW_KOALA`."""
    for known in (comfy.supported_models.Segmind_Vega, comfy.supported_models.KOALA_700M):
        config = {**known.unet_config, "model_channels": NARROW_CHANNELS}
        comfy.supported_models.models.append(type(f"Narrow{known.__name__}", (known,), {"unet_config": config}))


_know_narrow_models()
clip_checks.shrink_text_encoders()
family_models.know_tiny_families()


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Conditioning:
    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0})}, "optional": {"run": ("INT", {"default": 0})}}

    def make(self, number, run=0):
        return ([[_random(number, 1, 77, 2048), {"pooled_output": _random(number + 1000, 1, 1280)}]],)


class _Words:
    """The part of a CLIP that encodes prompts, without its weights: random numbers by text."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        seed = zlib.crc32(tokens.encode())
        return [[_random(seed, 1, 77, 2048), {"pooled_output": _random(seed + 1, 1, 1280)}]]


class Clip:
    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (_Words(),)


class Image:
    """A picture of noise, or of NaN for a negative number."""

    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0, "min": -1})}}

    def make(self, number):
        picture = _random(abs(number), 1, 64, 64, 3).sigmoid()
        return (picture if number >= 0 else torch.full_like(picture, torch.nan),)


def _control_network(model) -> torch.nn.Module:
    """A network that can serve a MODEL as ControlNet."""
    config = dict(model.model.model_config.unet_config)
    for name in ("out_channels", "disable_unet_model_creation", "transformer_depth_output"):
        config.pop(name, None)
    config |= {"hint_channels": 3, "dtype": torch.float32, "operations": comfy.ops.manual_cast}
    return comfy.cldm.cldm.ControlNet(**config)


class ControlNet:
    """A ControlNet with random weights for a MODEL."""

    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("CONTROL_NET",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def make(self, model):
        network = _control_network(model)
        generator = torch.Generator().manual_seed(5)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        device = comfy.model_management.get_torch_device()
        return (comfy.controlnet.ControlNet(network, load_device=device, manual_cast_dtype=torch.float32),)


class ControlLora:
    """A Control-LoRA with random weights: the layers that the UNet lacks, and low-rank changes to the shared ones."""

    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("CONTROL_NET",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def make(self, model):
        shared = model.model.diffusion_model.state_dict().keys()
        generator = torch.Generator().manual_seed(6)
        weights = {"lora_controlnet": torch.tensor([])}
        for name, parameter in _control_network(model).named_parameters():
            if name not in shared:
                weights[name] = torch.randn(parameter.shape, generator=generator) * 0.02
            elif name.endswith(".weight") and parameter.dim() > 1:
                layer, rows = name.removesuffix("weight"), parameter.shape[0]
                columns = parameter.numel() // rows
                weights[f"{layer}up"] = torch.randn(rows, 4, generator=generator) * 0.1
                weights[f"{layer}down"] = torch.randn(4, columns, generator=generator) / columns**0.5
        return (comfy.controlnet.ControlLora(weights),)


class Companions:
    """SDXL's CLIP and VAE with random weights."""

    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
        clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"))
        family_models.fill(clip.cond_stage_model)
        sizes = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
        pixels = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
        network = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=pixels | sizes, embed_dim=4)
        family_models.fill(network)
        return (clip, comfy.sd.VAE(sd=network.half().state_dict()))


class OtherModel:
    """A small MODEL without layers to quantise."""

    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        network = torch.nn.Module()
        network.diffusion_model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Conv3d(8, 8, 3))
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=device),)


class Timer:
    """Records when each call of the UNet begins and ends; `checks.step_times` returns the times."""

    CATEGORY, FUNCTION, RETURN_TYPES = "nfq test", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def make(self, model):
        def timed(apply_model, arguments):
            started = time.time()
            result = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
            checks.STEPS.append((started, time.time()))
            return result

        timed_model = model.clone()
        timed_model.set_model_unet_function_wrapper(timed)
        return (timed_model,)


class Check:
    """Runs a function of one of the modules with checks in this process."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "nfq test", "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"check": ("STRING", {}), "run": ("INT", {"default": 0})},
            "optional": {
                **{"model": ("MODEL",), "other": ("MODEL",), "argument": ("STRING", {})},
                **{"clip": ("CLIP",), "other_clip": ("CLIP",)},
            },
        }

    def run(self, check, run, model=None, other=None, **argument):
        package = next(name for name in sys.modules if name.endswith("ComfyUI-NFQ.nodes"))
        modules = (checks, patch_checks, clip_checks, family_checks, dynamic_vram)
        function = next(getattr(module, check) for module in modules if hasattr(module, check))
        result = function(package, model, other, **argument)
        return {"ui": {"text": [json.dumps(result)]}}


@PromptServer.instance.routes.get("/nfq_test/state")
async def state(request: web.Request) -> web.Response:
    """Whether a request to free memory is still pending, and each node's progress."""
    progress = {name: node["value"] for name, node in dict(get_progress_state().nodes).items()}
    freeing = bool(PromptServer.instance.prompt_queue.get_flags(reset=False))
    return web.json_response({"freeing": freeing, "progress": progress})


NODE_CLASS_MAPPINGS = {
    "NFQTestConditioning": Conditioning,
    "NFQTestClip": Clip,
    "NFQTestImage": Image,
    "NFQTestControlNet": ControlNet,
    "NFQTestControlLora": ControlLora,
    "NFQTestCompanions": Companions,
    "NFQTestOtherModel": OtherModel,
    "NFQTestTimer": Timer,
    "NFQTestCheck": Check,
}
