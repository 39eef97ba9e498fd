"""Loading a model in Automatic1111's web UI with its own loader: a tiny UNet without text encoder and VAE."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gradio
import torch
from modules import sd_hijack, sd_models, sd_models_config, shared

CONFIG = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    disable_first_stage_autocast: True
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        weighting_config:
          target: sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling
        discretization_config:
          target: sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization
    network_config:
      target: sgm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        adm_in_channels: 80
        num_classes: sequential
        use_checkpoint: False
        in_channels: 4
        out_channels: 4
        model_channels: 32
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 2]
        num_head_channels: 64
        use_spatial_transformer: True
        use_linear_in_transformer: True
        transformer_depth: [1, 1]
        context_dim: 48
        spatial_transformer_attn_type: softmax
        legacy: False
    conditioner_config:
      target: sgm.modules.GeneralConditioner
      params: {emb_models: []}
    first_stage_config:
      target: torch.nn.Identity
      params: {ddconfig: {}}
"""
"""SDXL's configuration with the sizes of the tests' UNet."""


def output(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    latent, context, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.randn(2, 80)
    with torch.no_grad():
        return model.model.diffusion_model(latent, torch.tensor([500, 20]), context, pooled)


def change(path_of: Callable[[str], str], raised: Callable[..., str]) -> dict[str, Any]:
    """See `driver.check_change`."""
    config = path_of("tiny.yaml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(CONFIG)
    sd_models_config.find_checkpoint_config = lambda *_: config
    # These functions need a text encoder.
    sd_models.get_empty_cond = lambda _: None
    sd_hijack.model_hijack.embedding_db.load_textual_inversion_embeddings = lambda **_: None
    warnings: list[str] = []
    gradio.Warning = warnings.append

    def load(name: str) -> Any:
        return sd_models.reload_model_weights(info=sd_models.get_closet_checkpoint_match(name))

    plain = output(load("dequantised.safetensors"))
    ours = load("tiny.nfq.safetensors")
    loaded = ours.sd_checkpoint_info.name
    outputs = {"plain": torch.equal(output(ours), plain)}
    with torch.no_grad():
        ours.model.diffusion_model.out[2].bias.add_(1)
    outputs["changed"] = not torch.equal(output(ours), plain)
    outputs["forced"] = torch.equal(output(sd_models.reload_model_weights(forced_reload=True)), plain)
    answer: dict[str, Any] = {"loaded": loaded == "tiny.nfq.safetensors", "outputs": outputs}

    states = []
    for name in ("damaged", "newer", "foreign", "unet"):
        answer[name] = raised(load, f"{name}.nfq.safetensors")
        model = sd_models.model_data.sd_model
        listed = model in sd_models.model_data.loaded_sd_models
        states.append(model is ours and listed and model.sd_checkpoint_info.name == loaded)
    # As the page does: after a failed change the option gets its old value back.
    shared.opts.onchange("sd_model_checkpoint", lambda: sd_models.reload_model_weights(), call=False)
    before = shared.opts.sd_model_checkpoint
    outputs["option"] = not shared.opts.set("sd_model_checkpoint", "newer.nfq.safetensors")
    outputs["option back"] = shared.opts.sd_model_checkpoint == before
    answer |= {
        "kept": states,
        "output_after": torch.equal(output(load("tiny.nfq.safetensors")), plain),
        "warnings": warnings,
    }
    os.remove(config)
    return answer
