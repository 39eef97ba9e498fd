"""Diffusion models other than SDXL's UNets: recognised by tensor names, and which of their layers need care.

In models of every family, known or not, only weights of Linear and Conv2d layers are quantised, and not those of KEPT.

Sources of FAMILIES:

- names: `comfy/model_detection.py` and the model classes of ComfyUI 0.33; the model classes of diffusers 0.42.
- KEPT: what ComfyUI-GGUF's converter stores as fp16 or fp32 (`tools/lcpp.patch`: `img_in`, `txt_in`, `time_in`,
  `vector_in`, `guidance_in`, `final_layer`, embeddings), and what convert_to_quant does not quantise
  (`convert_to_quant/constants.py`: Chroma's distilled guidance, Wan's `head`, Qwen-Image's `norm_out` and `proj_out`).
- `Family.careful`: what convert_to_quant does not quantise beyond KEPT. 8 bits take half the bytes of its bf16.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .unet_keys import CHECKPOINT_PREFIX

KEPT = re.compile(r"emb|^\w+_in\.|^(all_)?final_layer\.|^(head|norm_out|proj_out|distilled_guidance_layer)\.")
"""Layers that stay as they are: the first and last ones, embeddings, and distilled guidance, by names after the prefix.

They hold few weights, and every token passes through them or is scaled by them.
"""

_ANY_PREFIX = re.compile(r"^(model\.)?(diffusion_model|model|net)\.")

WEIGHT_DIMENSIONS = (2, 4)
"""Dimensions of the weights of Linear and Conv2d layers."""


@dataclass(frozen=True)
class Family:
    """Models of one structure.

    Args:
        name: as users know it.
        marks: for each layout, names that identify the family. All of them must follow the same prefix.
        careful: pattern of the layers that get 8 bits in any setting, by names after the prefix; empty if none do.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    careful: str = ""


_REFINED = r"^(layers|noise_refiner|context_refiner)\.\d+\.(adaLN_modulation\.|norm1\.linear\.)"
_COSMOS = r"^(transformer_)?blocks\.(0\.|1\.(adaln_modulation_|norm\d\.linear_))"

FAMILIES = (
    Family(
        "Flux.2",
        (("double_stream_modulation_img.lin.weight",), ("double_stream_modulation_img.linear.weight",)),
        r"^(double_stream_modulation_(img|txt)|single_stream_modulation)\.",
    ),
    Family(
        "Chroma",
        (
            ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"),
            ("distilled_guidance_layer.in_proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        ),
    ),
    Family(
        "Flux.1",
        (
            ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "img_in.weight"),
            (
                "single_transformer_blocks.0.proj_mlp.weight",
                "time_text_embed.text_embedder.linear_1.weight",
                "x_embedder.weight",
            ),
        ),
    ),
    Family(
        "Stable Diffusion 3",
        (
            ("joint_blocks.0.context_block.attn.qkv.weight",),
            ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight", "context_embedder.weight"),
        ),
    ),
    Family(
        "Qwen-Image",
        (("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),),
        r"^transformer_blocks\.0\.img_mod\.",
    ),
    Family(
        "Z-Image",
        (("layers.0.adaLN_modulation.0.weight", "noise_refiner.0.attention_norm1.weight", "cap_embedder.1.weight"),),
        _REFINED,
    ),
    Family(
        "Lumina 2",
        (
            ("layers.0.adaLN_modulation.1.weight", "noise_refiner.0.attention_norm1.weight", "cap_embedder.1.weight"),
            ("layers.0.norm1.linear.weight", "time_caption_embed.caption_embedder.1.weight"),
        ),
        _REFINED,
    ),
    Family(
        "Anima",
        (("llm_adapter.blocks.0.cross_attn.q_proj.weight", "blocks.0.mlp.layer1.weight"),),
        rf"{_COSMOS}|^llm_adapter\.(blocks|in_proj|out_proj)\.",
    ),
    Family(
        "Cosmos-Predict2",
        (
            ("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_mlp.1.weight"),
            ("transformer_blocks.0.norm3.linear_1.weight", "time_embed.t_embedder.linear_1.weight"),
        ),
        _COSMOS,
    ),
    Family(
        "Wan",
        (
            ("head.modulation", "blocks.0.self_attn.q.weight"),
            ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
        ),
        r"^(time_projection\.1|condition_embedder\.time_proj)\.",
    ),
)
"""The known families; the first whose marks a file has counts."""


@dataclass(frozen=True)
class FamilyModel:
    """A model of a known family in a file.

    Args:
        family: its family.
        prefix: what precedes its names: empty, or ends in a dot.
    """

    family: Family
    prefix: str

    def is_careful(self, key: str) -> bool:
        """Whether a weight of it gets 8 bits in any setting."""
        return bool(self.family.careful and re.search(self.family.careful, key[len(self.prefix) :]))


def find_family(shapes: Mapping[str, Sequence[int]]) -> FamilyModel | None:
    """The first model of a known family in a file; None if there is none.

    Args:
        shapes: shape of each tensor by name.
    """
    for family in FAMILIES:
        for first, *others in family.marks:
            prefixes = {key.removesuffix(first) for key in shapes if key.endswith(first)}
            for prefix in sorted(prefixes, key=lambda prefix: (prefix != CHECKPOINT_PREFIX, len(prefix), prefix)):
                if (not prefix or prefix.endswith(".")) and all(prefix + name in shapes for name in others):
                    return FamilyModel(family, prefix)
    return None


def is_layer_to_quantize(key: str, shape: Sequence[int], prefix: str = "") -> bool:
    """Whether a tensor is the weight of a Linear or Conv2d layer that KEPT does not name.

    Args:
        key: its name.
        shape: its shape.
        prefix: prefix of the model's names; if empty, those that programs put before any model's names are removed.
    """
    name = key[len(prefix) :] if prefix else _ANY_PREFIX.sub("", key)
    return f".{key}".endswith(".weight") and len(shape) in WEIGHT_DIMENSIONS and not KEPT.search(name)


def missing_from_blocks(model: FamilyModel, keys: Iterable[str]) -> list[str]:
    """Names that a model lacks in one of its numbered blocks, although the blocks before and after have them."""
    blocks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for key in keys:
        match = re.match(r"(\w*(?:blocks|layers|refiner))\.(\d{1,4})\.(.+)", key.removeprefix(model.prefix))
        if match and key.startswith(model.prefix):
            blocks[match[1]][int(match[2])].add(match[3])
    missing = []
    for name, own in blocks.items():
        numbers = sorted(own)
        for index, before in enumerate(numbers):
            number = before + 1
            after = next((later for later in numbers[index + 1 : index + 3] if later > number), None)
            if after is None:
                continue
            wanted = own[before] & own[after]
            missing += [f"{model.prefix}{name}.{number}.{rest}" for rest in sorted(wanted - own.get(number, set()))]
    return missing
