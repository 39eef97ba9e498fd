"""The tests' UNet in Forge and Forge Neo: recognised as SDXL, in an engine without text encoders and VAE."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import backend.loader
import gradio
import torch
from backend.patcher.unet import UnetPatcher
from huggingface_guess import model_list
from modules import processing, script_callbacks, sd_models

LORA_KEYS = (
    "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
    "diffusion_model.input_blocks.1.0.in_layers.2.weight",
)
"""A Linear layer and a convolution."""


class TinySDXL(model_list.SDXL):
    """The tests' UNet, added to those that the program recognises."""

    unet_config = model_list.SDXL.unet_config | {
        "model_channels": 32,
        "transformer_depth": [0, 1],
        "context_dim": 48,
        "adm_in_channels": 80,
    }


class Engine:
    """`StableDiffusionXL` with only its UNet."""

    matched_guesses = (TinySDXL,)

    def __init__(self, estimated_config: Any, huggingface_components: dict[str, Any]) -> None:
        self.unet = UnetPatcher.from_model(
            model=huggingface_components["unet"],
            diffusers_scheduler=huggingface_components["scheduler"],
            config=estimated_config,
        )
        self.forge_objects = SimpleNamespace(unet=self.unet, vae=SimpleNamespace(upscale_ratio=8))

    @property
    def diffusion_model(self) -> torch.nn.Module:
        return self.unet.model.diffusion_model

    def run(self) -> torch.Tensor:
        """The UNet's output for fixed inputs."""
        torch.manual_seed(0)
        latent, context, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.randn(2, 80)
        with torch.inference_mode():
            return self.diffusion_model(latent, torch.tensor([500.0, 20.0]), context=context, y=pooled).clone()

    def lora_factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A LoRA: up and down of each of LORA_KEYS."""
        torch.manual_seed(1)
        state = self.unet.model.state_dict()
        factors = {}
        for key in LORA_KEYS:
            rows, columns = state[key].shape[0], state[key].shape[1:].numel()
            factors[key] = torch.randn(rows, 4) / 3, torch.randn(4, columns) / 3
        return factors

    def packed(self) -> list[torch.nn.Parameter]:
        """The packed weights."""
        return [each for each in self.diffusion_model.parameters() if getattr(each, "gguf_cls", None) is not None]


def prepare(engine: type[Engine]) -> list[str]:
    """Make the program load the tests' UNet with `engine`.

    Returns:
        The warnings that the page shows from now on.
    """
    model_list.models.append(TinySDXL)
    backend.loader.possible_models = [engine]
    component = backend.loader.load_huggingface_component

    def only_unet(guess: Any, name: str, *args: Any) -> Any:
        return component(guess, name, *args) if name in ("unet", "scheduler") else None

    backend.loader.load_huggingface_component = only_unet
    warnings: list[str] = []
    gradio.Warning = warnings.append
    script_callbacks.ui_settings_callback()
    return warnings


def load(name: str, modules: list[str] | None = None, low_bits: Any = None) -> Engine:
    """Make the program change its model."""
    info = sd_models.get_closet_checkpoint_match(name)
    wanted = {"checkpoint_info": info, "additional_modules": modules or [], "unet_storage_dtype": low_bits}
    sd_models.model_data.forge_loading_parameters = wanted
    return processing.forge_model_reload()[0]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether outputs are equal but for merged weights, which are rounded to fp16, by up to 2**-11 of each."""
    return float((one - other).abs().amax()) <= 2e-3 * float(other.abs().amax())


def broken(kept: Engine, raised: Callable[..., str]) -> dict[str, Any]:
    """Change to files that cannot be loaded: the sentences, and whether the model stays."""
    answer: dict[str, Any] = {"kept": []}
    for name in ("damaged", "newer", "foreign", "unet"):
        answer[name] = raised(load, f"{name}.nfq.safetensors")
        answer["kept"].append(sd_models.model_data.sd_model is kept)
    return answer
