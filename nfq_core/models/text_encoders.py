"""Recognise text encoders by tensor names and shapes: CLIP, T5 and decoder-only language models, in any file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from .unet import UNetInfo

Part = Literal["weight", "embedding", "kept"]
"""How a tensor of a text encoder is stored: as a layer's weight, as a table of token embeddings, or unchanged."""

_TOKENS = re.compile(r"(^|\.)(token_embedding|embed_tokens|shared|lm_head)\.weight$")
"""Tables with a row for each token, which are large. `shared` is T5's."""

_KEPT = re.compile(r"emb|text_projection|relative_attention_bias|attn_mask")
"""Small tensors that stay unchanged: positions, patches, biases of attention, and the projection of the pooled text.

OpenCLIP's `text_projection` is a bare parameter that hosts transpose; at 8 bits it would save 1.6 MB of SDXL's 2.2 GB.
"""

_PREFIX = r"((?:[^.]+\.)*?)"


@dataclass(frozen=True)
class _Family:
    """Names of one kind of text encoder.

    Args:
        layer: end of the key of a weight in its first layer, of shape (any, width).
        before: pattern of what precedes `layer`; group 1 is the prefix of all its names.
        tokens: possible names of the table of token embeddings, after the prefix.
        roots: first components of its names, after the prefix. Image encoders and heads next to it belong to it.
    """

    layer: str
    before: re.Pattern[str]
    tokens: tuple[str, ...]
    roots: frozenset[str]


_VISION = ("visual", "vision_model", "vision_tower", "visual_projection", "multi_modal_projector")

_CLIP = _Family(
    "encoder.layers.0.self_attn.q_proj.weight",
    re.compile(_PREFIX + r"(?:text_model\.)?"),
    ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    frozenset(("text_model", "embeddings", "encoder", "final_layer_norm", "text_projection", "logit_scale", *_VISION)),
)
_OPEN_CLIP = _Family(
    "transformer.resblocks.0.attn.in_proj_weight",
    re.compile(_PREFIX),
    ("token_embedding.weight",),
    frozenset(
        (
            *("transformer", "token_embedding", "positional_embedding", "ln_final"),
            *("text_projection", "logit_scale", "attn_mask", *_VISION),
        )
    ),
)
_T5 = _Family(
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    re.compile(_PREFIX),
    ("shared.weight", "encoder.embed_tokens.weight"),
    frozenset(("encoder", "decoder", "shared", "lm_head", "spiece_model")),
)
_DECODER = _Family(
    "layers.0.self_attn.q_proj.weight",
    re.compile(_PREFIX + r"(?:language_model\.)?model\.(?:language_model\.)?"),
    tuple(f"{path}.embed_tokens.weight" for path in ("model", "language_model.model", "model.language_model")),
    frozenset(("model", "language_model", "lm_head", "spiece_model", "tekken_model", *_VISION)),
)

_FAMILIES = (_CLIP, _OPEN_CLIP, _T5, _DECODER)

_CLIP_NAMES = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "OpenCLIP-G"}
"""Names of CLIP's text encoders by their width."""

_UNET_TEXT = {1280: ("OpenCLIP-G",), 2048: ("CLIP-L", "OpenCLIP-G")}
"""Text encoders that a UNet of the SDXL family reads, by the width of its text tokens."""

_CONDITIONER = "conditioner."
"""Prefix of SDXL's text encoders in a whole checkpoint."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder in a file.

    Args:
        name: such as "CLIP-L", "OpenCLIP-G", "T5-XXL" or "Qwen 3".
        prefix: what precedes its names: empty, or ends in a dot.
        roots: first components of its names, after the prefix.
    """

    name: str
    prefix: str
    roots: frozenset[str]

    def owns(self, key: str) -> bool:
        """Whether a tensor belongs to it."""
        return key.startswith(self.prefix) and key[len(self.prefix) :].partition(".")[0] in self.roots

    def part(self, key: str, shape: Sequence[int]) -> Part:
        """How one of its tensors is stored."""
        name = key[len(self.prefix) :]
        if len(shape) != 2:
            return "kept"
        if _TOKENS.search(name):
            return "embedding"
        return "kept" if _KEPT.search(name) else "weight"


def owner_finder(encoders: Sequence[TextEncoder]) -> Callable[[str], TextEncoder | None]:
    """A function that returns the text encoder to which a tensor of this name belongs; None if there is none.

    Its time does not grow with the number of text encoders, of which a hostile file may have very many.
    """
    by_prefix: dict[str, list[TextEncoder]] = {}
    for encoder in encoders:
        by_prefix.setdefault(encoder.prefix, []).append(encoder)

    def owner(key: str) -> TextEncoder | None:
        prefixes = ("", *accumulate(f"{part}." for part in key.split(".")))
        candidates = (encoder for prefix in prefixes for encoder in by_prefix.get(prefix, ()))
        return next((encoder for encoder in candidates if encoder.owns(key)), None)

    return owner


def find_text_encoders(shapes: Mapping[str, Sequence[int]]) -> list[TextEncoder]:
    """The text encoders in a file, in the order of its tensors.

    A text encoder has a first layer and a table of token embeddings of the same width under one prefix; an image
    encoder or LoRA lacks one of them. A language model inside a diffusion model is not a text encoder.

    Args:
        shapes: shape of each tensor by name.
    """
    found: dict[str, TextEncoder] = {}
    for family in _FAMILIES:
        for key, prefix, width in _first_layers(family, shapes):
            tokens = next((shapes[prefix + name] for name in family.tokens if prefix + name in shapes), ())
            if len(tokens) == 2 and tokens[1] == width and "diffusion_model." not in prefix:
                found[key] = TextEncoder(_name(family, key, shapes, tokens), prefix, family.roots)
    return [found[key] for key in shapes if key in found]


def _first_layers(family: _Family, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str, int]]:
    """Key, prefix and width of each first layer of a family."""
    for key, shape in shapes.items():
        if key.endswith(family.layer) and len(shape) == 2:
            match = family.before.fullmatch(key.removesuffix(family.layer))
            if match:
                yield key, match[1], shape[1]


def _name(family: _Family, first_layer: str, shapes: Mapping[str, Sequence[int]], tokens: Sequence[int]) -> str:
    """Name of a text encoder, from its sizes or from further names in its first layer."""
    words, width = tokens
    if family is _T5:
        return f"{'UMT5' if words > 200_000 else 'T5'}{'-XXL' if width == 4096 else ''}"
    if family is not _DECODER:
        return _CLIP_NAMES.get(width, "CLIP")
    attention = first_layer.removesuffix("q_proj.weight")
    if attention.removesuffix("self_attn.") + "pre_feedforward_layernorm.weight" in shapes:
        return "Gemma"
    if attention + "q_norm.weight" in shapes:
        return "Qwen 3"
    return "Qwen 2" if attention + "q_proj.bias" in shapes else "Llama or Mistral"


def text_encoder_warnings(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """A warning if a checkpoint of the SDXL family has other text encoders than its UNet reads.

    Args:
        info: the UNet that was detected; None for a file without one.
        shapes: shape of each tensor by name.
    """
    wanted = _UNET_TEXT.get(info.architecture.context_width) if info and info.architecture else None
    found = find_text_encoders(shapes)
    if not found or not wanted:
        return []
    usable = {encoder.name for encoder in found if encoder.prefix.startswith(_CONDITIONER)}
    missing = [name for name in wanted if name not in usable]
    if not missing:
        return []
    has = " and ".join(f"{encoder.name} ({encoder.prefix}*)" for encoder in found)
    return [
        f"the checkpoint's text encoders are {has}; its UNet also reads {' and '.join(missing)} "
        f"({_CONDITIONER}*), so load CLIP from another file"
    ]
