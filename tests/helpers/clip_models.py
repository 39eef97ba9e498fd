"""Tiny text encoders of transformers, and whole LDM checkpoints of tiny SDXL pipelines."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from samples import TINY, random_weight, unet_config

from nfq_core.models.unet_keys import tensor_shapes

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
TOKENS = torch.tensor([[len(WORDS) - 2, 3, 30, 7, len(WORDS) - 1, len(WORDS) - 1]])

WIDTHS = (64, 128)
"""Widths of the two text encoders, whose layers are large enough to be packed."""

ARCHITECTURE = replace(TINY, context_width=sum(WIDTHS), added_width=WIDTHS[1] + 6 * 8)


def clip_config(width: int, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": 2}
    sizes |= {"vocab_size": len(WORDS), "num_attention_heads": 2, "max_position_embeddings": 12}
    special = {"bos_token_id": len(WORDS) - 2, "eos_token_id": len(WORDS) - 1, "pad_token_id": len(WORDS) - 1}
    return CLIPTextConfig(**(sizes | special | changes))


def text_encoder(kind: str, **changes: Any) -> Any:
    """A stock text encoder of a class of transformers, with random weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "T5EncoderModel":
        sizes = {"vocab_size": len(WORDS), "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
        model = transformers.T5EncoderModel(transformers.T5Config(**(sizes | changes)))
    else:
        width = WIDTHS[kind == "CLIPTextModelWithProjection"]
        model = getattr(transformers, kind)(clip_config(width, **changes))
    return model.eval()


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its parameters moved into memory of their own.

    transformers maps files, in which tensors begin at any address. From unaligned ones, some CPUs compute other last
    bits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def hidden_states(model: torch.nn.Module) -> list[torch.Tensor]:
    """Every output of a text encoder for TOKENS."""
    with torch.no_grad():
        result = model(TOKENS, output_hidden_states=True)
    return [*result.hidden_states, *(value for value in result.values() if isinstance(value, torch.Tensor))]


def clip_names(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """A CLIP's tensors by the names that files have."""
    state = model.state_dict()
    return {
        prefix + (name if name.startswith("text_") else f"text_model.{name}"): tensor for name, tensor in state.items()
    }


def open_clip_names(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """A CLIP's tensors by OpenCLIP's names: queries, keys and values in one, the projection transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    result = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    others = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for index in range(model.config.num_hidden_layers):
        inside, layer = f"transformer.resblocks.{index}.", f"encoder.layers.{index}."
        for kind in ("weight", "bias"):
            result[f"{inside}attn.in_proj_{kind}"] = torch.cat(
                [state[f"{layer}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            )
            result |= {f"{inside}{name}.{kind}": state[f"{layer}{own}.{kind}"] for name, own in others.items()}
    return {prefix + name: tensor for name, tensor in result.items()}


_VAE = (
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)
"""LDM's names of a VAE's tensors by patterns of diffusers'."""


def vae_names(vae: torch.nn.Module, prefix: str = "first_stage_model.") -> dict[str, torch.Tensor]:
    """A VAE's tensors by LDM's names, which count the levels of the decoder from the other end."""
    last = len(vae.config.block_out_channels) - 1
    result = {}
    for name, tensor in vae.state_dict().items():
        renamed = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", name)
        for pattern, ldm in _VAE:
            renamed = re.sub(pattern, ldm, renamed)
        is_convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        result[prefix + renamed] = tensor[:, :, None, None] if is_convolution else tensor
    return result


def random_checkpoint_unet() -> dict[str, torch.Tensor]:
    """A UNet's tensors with a whole checkpoint's names."""
    shapes = tensor_shapes(ARCHITECTURE, "prefixed")
    return {
        name: torch.full(shape, float(name.endswith("weight"))).half()
        if len(shape) == 1
        else (random_weight(*shape, seed=number) / torch.Size(shape[1:]).numel() ** 0.5).half()
        for number, (name, shape) in enumerate(shapes.items())
    }


def make_settings_folder(folder: Path) -> Any:
    """Write a pipeline's folder without weights, and return a stock pipeline of the same configs, fp16."""
    import diffusers
    from transformers import CLIPTokenizer

    words = folder.with_name(f"{folder.name}-words")
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(**unet_config(ARCHITECTURE)),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=16,
            force_upcast=False,
        ),
        text_encoder=text_encoder("CLIPTextModel"),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return pipeline.to(torch.float16)


def whole_checkpoint(pipeline: Any) -> dict[str, torch.Tensor]:
    """A pipeline's models as a whole LDM checkpoint of SDXL; the UNet has other random weights."""
    return (
        random_checkpoint_unet()
        | clip_names(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        | open_clip_names(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        | vae_names(pipeline.vae)
    )
