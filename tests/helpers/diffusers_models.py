"""Tiny models of SDXL's kind for the diffusers tests."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import TINY, random_weight, unet_config

from nfq_core import NFTensor, quantize
from nfq_core.files.safetensors_io import Entry
from nfq_core.models.unet_keys import Layout, UNetArchitecture, tensor_shapes
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import Settings

diffusers = pytest.importorskip("diffusers", reason="what is tested works in diffusers")
pytest.importorskip("accelerate", reason="diffusers quantises only with it")
pytest.importorskip("diffusers.quantizers.base", reason="this diffusers has no quantisers")

LEVELS = Settings()

reads_folders = pytest.mark.skipif(
    not hasattr(diffusers.quantizers.base.DiffusersQuantizer, "maybe_update_loaded_keys"),
    reason="this diffusers does not read packed folders",
)


def write_config(folder: Path, architecture: UNetArchitecture = TINY, **changes: Any) -> Path:
    """A folder that holds a UNet's config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DConditionModel", **unet_config(architecture), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stock_unet(architecture: UNetArchitecture = TINY) -> torch.nn.Module:
    """A UNet with random fp16 weights, about as large as trained ones are."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**unet_config(architecture)).half().eval()


@lru_cache(maxsize=256)
def packed_weight(shape: tuple[int, ...], format_id: str) -> NFTensor:
    """A quantised weight; all of one shape are alike."""
    fan_in = torch.Size(shape[1:]).numel()
    return quantize((random_weight(*shape) / fan_in**0.5).half(), format=format_id)


def packed_unet(architecture: UNetArchitecture, layout: Layout) -> dict[str, NFTensor | torch.Tensor]:
    """A whole UNet's tensors with synthetic weights, quantised by the usual rules."""
    shapes = tensor_shapes(architecture, layout)
    _, plans = plan_tensors({name: Entry("F16", shape, 0, 0) for name, shape in shapes.items()}, LEVELS)

    def tensor(name: str, shape: tuple[int, ...]) -> NFTensor | torch.Tensor:
        if plans[name].format:
            return packed_weight(shape, plans[name].format.id)
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight"))).half()
        return (random_weight(*shape) / torch.Size(shape[1:]).numel() ** 0.5).half()

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def noise_of(unet: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a UNet makes of fixed inputs."""
    config, generator = unet.config, torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    guidance = random(2, config.time_cond_proj_dim) if config.time_cond_proj_dim else None
    with torch.no_grad():
        return unet(
            random(2, config.in_channels, 8, 8),
            torch.tensor(500),
            random(2, 5, config.cross_attention_dim),
            timestep_cond=guidance,
            added_cond_kwargs={"text_embeds": random(2, pooled), "time_ids": random(2, 6)},
        ).sample


def pipeline_parts(folder: Path) -> dict[str, Any]:
    """All of an SDXL pipeline but its UNet: two CLIPs of widths 16 and 32, a VAE, DPM++ 2M; `folder` for its words."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )

    return {
        "vae": AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, sample_size=16).eval(),
        "text_encoder": CLIPTextModel(text_config(16)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(32)).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": DPMSolverMultistepScheduler(beta_schedule="scaled_linear"),
    }
