"""Random models with real shapes for the host: UNets, and LoRAs of every stock kind."""

from __future__ import annotations

from dataclasses import replace
from math import prod, sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file

from nfq_core import NFTensor, quantize
from nfq_core.files.safetensors_io import describe
from nfq_core.models.unet_keys import KOALA_700M, SEGMIND_VEGA, UNetArchitecture, tensor_shapes
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import Formats, Settings

NARROW, NARROW_KOALA = (
    replace(architecture, name=f"narrow {architecture.name}", channels=(64, 128, 256))
    for architecture in (SEGMIND_VEGA, KOALA_700M)
)
"""Real architectures at a fifth of their width, which the probe makes known to the host: the same code in less time."""

KINDS = ("lora", "locon", "loha", "lokr", "dora")

BY_LEVELS = Settings(Formats())
"""16 levels, 32 for convolutions: every byte is a valid code."""


def random_unet(architecture: UNetArchitecture, layout: str = "ldm", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp16 weights that keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, shape in tensor_shapes(architecture, layout).items():
        weight = torch.empty(shape).normal_(generator=generator)
        if len(shape) > 1:
            weight /= sqrt(prod(shape[1:]))
        else:
            weight *= 0.05
            is_norm = key.endswith(".weight")
            weight += 1.0 if is_norm else 0.0
        result[key] = weight.half()
    return result


def write_unet(path: Path, architecture: UNetArchitecture, layout: str = "ldm", seed: int = 0, **markers) -> None:
    save_file(random_unet(architecture, layout, seed) | markers, path, metadata={"format": "pt"})


def random_adapter(architecture: UNetArchitecture, kind: str, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """An adapter of one of `KINDS` for some of a UNet's Linear layers and convolutions, with trainers' key names."""
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int, std: float = 0.0) -> torch.Tensor:
        return torch.empty(shape).normal_(generator=generator) * (std or 1 / sqrt(prod(shape[1:])))

    result: dict[str, torch.Tensor] = {}
    for key, shape in tensor_shapes(architecture, "ldm").items():
        is_convolution = len(shape) == 4 and ".in_layers.2." in key
        is_attention = ".attn1.to_q." in key or ".attn2.to_k." in key or ".ff.net.2." in key
        if not key.endswith(".weight") or not (is_attention or (is_convolution and kind != "lora")):
            continue
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        rows, columns = shape[0], prod(shape[1:])
        if kind in ("lora", "locon", "dora"):
            result[f"{name}.lora_down.weight"] = factor(rank, *shape[1:])
            result[f"{name}.lora_up.weight"] = factor(rows, rank, *[1] * (len(shape) - 2), std=0.2)
            result[f"{name}.alpha"] = torch.tensor(float(rank))
            if kind == "dora":
                result[f"{name}.dora_scale"] = factor(rows, *[1] * (len(shape) - 1), std=0.1) + 1.0
        elif kind == "loha":
            for half in ("w1", "w2"):
                result[f"{name}.hada_{half}_a"] = factor(rows, rank, std=0.5)
                result[f"{name}.hada_{half}_b"] = factor(rank, columns)
            result[f"{name}.alpha"] = torch.tensor(float(rank))
        else:
            result[f"{name}.lokr_w1"] = factor(4, 4, std=0.2)
            result[f"{name}.lokr_w2"] = factor(rows // 4, shape[1] // 4, *shape[2:])
    return {key: value.half() if value.dim() else value for key, value in result.items()}


_KOHYA, _DIFFUSERS = "lora_te{}_text_model_encoder_layers_{{}}_", "text_encoder{}.text_model.encoder.layers.{{}}."
TEXT_LAYOUTS = {
    "kohya": (*(_KOHYA.format(number) for number in (1, 2)), "_", "lora_down", "lora_up"),
    "diffusers": (*(_DIFFUSERS.format(number) for number in ("", "_2")), ".", "lora_A", "lora_B"),
}
"""Names of adapters for SDXL's text encoders: of a layer in each, separator, and the two factors."""


def random_text_adapter(layout: str, seed: int, dora: bool = False, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA, or a DoRA, for the first layers of SDXL's text encoders, with the key names of one of TEXT_LAYOUTS."""
    generator = torch.Generator().manual_seed(seed)
    *prefixes, separator, down, up = TEXT_LAYOUTS[layout]
    result: dict[str, torch.Tensor] = {}
    for prefix, width in zip(prefixes, (768, 1280), strict=True):
        for index in range(3):
            for layer in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj"):
                name = prefix.format(index) + layer.replace(".", separator)
                result[f"{name}.{down}.weight"] = torch.randn(rank, width, generator=generator) / sqrt(width)
                result[f"{name}.{up}.weight"] = torch.randn(width, rank, generator=generator) * 0.2
                if dora:
                    result[f"{name}.dora_scale"] = torch.randn(width, 1, generator=generator) * 0.1 + 1.0
    return {key: value.half() for key, value in result.items()}


def packed_unet(
    architecture: UNetArchitecture, layout: str, settings: Settings = BY_LEVELS
) -> dict[str, NFTensor | torch.Tensor]:
    """A UNet with the formats of the usual rules and random codes, which is fast at any size.

    A weight has the same codes in every layout.
    """
    names = list(tensor_shapes(architecture, layout))
    shapes = tensor_shapes(architecture, "ldm")
    state = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    plans = plan_tensors(describe(state), settings)[1]
    result: dict[str, NFTensor | torch.Tensor] = {}
    for seed, (name, (key, shape)) in enumerate(zip(names, shapes.items(), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        fmt = plans[key].format
        if fmt is None:
            weight = torch.empty(shape).normal_(generator=generator)
            is_norm = len(shape) == 1 and key.endswith(".weight")
            weight *= 1 / sqrt(prod(shape[1:])) if len(shape) > 1 else 0.05
            result[name] = (weight + (1.0 if is_norm else 0.0)).half()
            continue
        # Levels and scale parameters come from a small weight. For 16 and 32 levels and trellises every byte is valid.
        sample = quantize(torch.empty(64, 64).normal_(generator=generator) / sqrt(prod(shape[1:])), format=fmt.id)
        data = torch.randint(0, 256, (fmt.packed_bytes(prod(shape)),), dtype=torch.uint8, generator=generator)
        result[name] = NFTensor(data, fmt, shape, torch.float16)
        result[name].levels.copy_(sample.levels)
        data[result[name].sections.scales : -2] = sample.data[sample.sections.scales : -2].mode().values
        data[-2:] = sample.data[-2:]
    return result
