"""A diffusers folder and a checkpoint of SDXL's kind with random weights, small enough to draw with in a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from samples import TINY, unet_config
from text_models import random_tensors

from benchmarks.checkpoint_shapes import TextSizes, text_encoders
from nfq_core.models.unet_keys import UNetArchitecture, tensor_shapes

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
]

TEXT_L, TEXT_G = TextSizes(16, 2, words=len(WORDS)), TextSizes(32, 2, words=len(WORDS))
"""The two text encoders, together as wide as the context of `TINY`."""


def checkpoint_tensors(architecture: UNetArchitecture = TINY) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint of the same kind, named as in LDM's: both text encoders and the UNet."""
    return random_tensors(text_encoders(TEXT_L, TEXT_G) | tensor_shapes(architecture, "prefixed"))


def make_folder(folder: Path, variant: str | None = None) -> Path:
    """Write the folder, the UNet's weights included, in fp32 or as the variant "fp16".

    Its VAE makes pictures eight times as wide as latents.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)

    def text_config(sizes: TextSizes) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=sizes.words,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            max_position_embeddings=sizes.positions,
            projection_dim=sizes.width,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )

    unet = diffusers.UNet2DConditionModel(**unet_config(TINY))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        force_upcast=False,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    words = folder.with_name(f"{folder.name}-words")
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(words / "vocab.json"), str(words / "merges.txt"), unk_token=WORDS[1], model_max_length=77
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(TEXT_L)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(TEXT_G)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )
    pipeline.to(torch.float16 if variant == "fp16" else torch.float32).save_pretrained(folder, variant=variant)
    return folder
