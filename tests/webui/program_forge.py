"""Loading a model in Forge with its own loader, layers and LoRA; text encoders, VAE and engine are stubs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backend.loader
import gradio
import torch
from backend import utils
from backend.args import dynamic_args
from backend.patcher.unet import UnetPatcher
from huggingface_guess import model_list
from modules import processing, script_callbacks, sd_models, shared

LORA_KEYS = (
    "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
    "diffusion_model.input_blocks.1.0.in_layers.2.weight",
)
"""A Linear layer and a convolution."""


class TinySDXL(model_list.SDXL):
    """The tests' UNet, added to those that Forge recognises."""

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

    def output(self) -> torch.Tensor:
        torch.manual_seed(0)
        latent, context, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.randn(2, 80)
        with torch.inference_mode():
            self.unet.refresh_loras()
            unet = self.unet.model.diffusion_model
            return unet(latent, torch.tensor([500.0, 20.0]), context=context, y=pooled).clone()

    def with_lora(self, online: bool) -> torch.Tensor:
        """The output with a LoRA, which is removed afterwards."""
        torch.manual_seed(1)
        state = self.unet.model.state_dict()
        patches = {}
        for key in LORA_KEYS:
            rows, columns = state[key].shape[0], state[key].shape[1:].numel()
            up, down = torch.randn(rows, 4) / 3, torch.randn(4, columns) / 3
            patches[key] = ("lora", (up, down, None, None, None, None))
        plain, self.unet = self.unet, self.unet.clone()
        assert self.unet.add_patches(filename="lora", patches=patches, online_mode=online) == set(LORA_KEYS)
        result = self.output()
        self.unet = plain
        return result

    def packed_layers(self) -> int:
        parameters = self.unet.model.diffusion_model.parameters()
        return sum(getattr(parameter, "gguf_cls", None) is not None for parameter in parameters)


def load(name: str, modules: list[str] | None = None, low_bits: Any = None) -> Engine:
    info = sd_models.get_closet_checkpoint_match(name)
    wanted = {"checkpoint_info": info, "additional_modules": modules or [], "unet_storage_dtype": low_bits}
    sd_models.model_data.forge_loading_parameters = wanted
    model, _ = processing.forge_model_reload()
    return model


def change(path_of: Callable[[str], str], raised: Callable[..., str]) -> dict[str, Any]:
    """See `driver.check_change`."""
    model_list.models.append(TinySDXL)
    backend.loader.possible_models[:] = [Engine]
    component = backend.loader.load_huggingface_component

    def only_unet(guess: Any, name: str, *args: Any) -> Any:
        return component(guess, name, *args) if name in ("unet", "scheduler") else None

    backend.loader.load_huggingface_component = only_unet
    warnings: list[str] = []
    gradio.Warning = warnings.append
    script_callbacks.ui_settings_callback()

    stock = load("dequantised.safetensors")
    plain, merged, online = stock.output(), stock.with_lora(False), stock.with_lora(True)
    kept = load("tiny.nfq.safetensors")
    packed = kept.packed_layers()
    saved = utils.get_state_dict_after_quant(kept.unet.model.diffusion_model)
    reference = utils.get_state_dict_after_quant(stock.unet.model.diffusion_model)

    def close(one: torch.Tensor, other: torch.Tensor) -> bool:
        # Merged weights are rounded to fp16, by up to 2**-11 of each; a tiny UNet's output varies less than this bound.
        return float((one - other).abs().amax()) <= 2e-3 * float(other.abs().amax())

    outputs = {
        "plain": torch.equal(kept.output(), plain),
        "lora moves it": not close(merged, plain),
        "merged": close(kept.with_lora(False), merged),
        "merged, dense": kept.packed_layers() == packed - 1,
        "lora gone": torch.equal(kept.output(), plain) and kept.packed_layers() == packed,
        "online": close(kept.with_lora(True), online),
        "saved": all(torch.equal(saved[key].float(), reference[key].float()) for key in reference),
    }
    answer: dict[str, Any] = {"loaded": isinstance(kept, Engine) and packed > 20, "outputs": outputs}

    states = []
    for name in ("damaged", "newer", "foreign", "unet"):
        answer[name] = raised(load, f"{name}.nfq.safetensors")
        states.append(sd_models.model_data.sd_model is kept)
    again = load("tiny.nfq.safetensors")
    answer |= {
        "kept": states,
        "output_after": again is kept and torch.equal(again.output(), plain),
        "warnings": warnings,
    }

    companion = load("unet.nfq.safetensors", [path_of("dequantised.safetensors")])
    outputs["unet alone with modules"] = torch.equal(companion.output(), plain)
    eight = load("tiny.nfq.safetensors", low_bits=torch.float8_e4m3fn)
    outputs["low bits: not packed"] = eight.packed_layers() == 0
    dynamic_args["forge_unet_storage_dtype"] = None
    shared.opts.data["nfq_keep_packed"] = False
    dense = load("tiny.nfq.safetensors")
    outputs["setting: not packed"] = dense.packed_layers() == 0 and torch.equal(dense.output(), plain)
    return answer
