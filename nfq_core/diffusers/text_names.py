"""Tensors of a text encoder in a file under the names that transformers' models have."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoints.state_dict import StateDict
from ..errors import UnsupportedFileError
from ..files.container import NFQFile
from ..models.text_encoders import TextEncoder, find_text_encoders
from ..models.unet import detect
from ..packed.rows import split_rows
from ..packed.tensor import NFTensor
from .model import check_shapes

ROOT = "text_model."
"""Prefix of CLIP's names in files; newer versions of transformers leave it out in some models."""

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
"""A tensor of one of OpenCLIP's layers: its number and name."""

_LAYER = re.compile(r"(text_model\.)?encoder\.(layers|block)\.\d")
"""Beginning of the name of a tensor of a model's layers."""

_IN_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
"""transformers' name of each part of OpenCLIP's layers."""

_FUSED = "attn.in_proj_"
"""OpenCLIP's queries, keys and values in one tensor; `weight` or `bias` follows."""

_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}

_PROJECTION = "text_projection.weight"

_TABLES = ("token_embedding.weight", "shared.weight")
"""Ends of the name of a model's table of token embeddings."""

_TOKENS = ("shared.weight", "encoder.embed_tokens.weight")
"""T5's table of token embeddings, which files have under one of these names and models under both."""


@dataclass(frozen=True)
class Renamed:
    """A tensor of a file and what it is in a model.

    Args:
        key: its name in the file.
        names: its names in the model.
        parts: number of parts of equally many rows into which it is split, one for each name; 1: every name is the
            whole tensor.
        transposed: whether the model has its transpose.
    """

    key: str
    names: tuple[str, ...]
    parts: int = 1
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the model of the tensor, or of each part."""
        if self.transposed:
            return stored[::-1]
        return (stored[0] // self.parts, *stored[1:])

    def tensors(self, tensor: NFTensor | torch.Tensor) -> StateDict:
        """The model's tensors by name; parts of a packed weight stay packed.

        Raises:
            NFQError: a packed weight's parts are not whole blocks.
        """
        if self.transposed:
            # Projections are kept, never packed.
            tensor = tensor.T.contiguous()
        if self.parts == 1:
            return dict.fromkeys(self.names, tensor)
        if isinstance(tensor, NFTensor):
            split = split_rows(tensor, self.parts)
        else:
            split = [part.clone() for part in tensor.chunk(self.parts)]
        return dict(zip(self.names, split, strict=True))


def rename(keys: Iterable[str], encoder: TextEncoder, wanted: Collection[str]) -> list[Renamed]:
    """What the tensors of a text encoder are in a model; tensors that the model does not have are left out.

    Tensors of a text encoder's layers are never left out, so that a file with more layers than the model is noticed.

    Args:
        keys: names of a file's tensors.
        encoder: the text encoder; others' tensors are left out.
        wanted: names in the state dict of transformers' model.
    """
    has_root = any(name.startswith(ROOT) for name in wanted)
    found = []
    for key in keys:
        if not encoder.owns(key):
            continue
        renamed = _renamed(key, key[len(encoder.prefix) :])
        names = tuple(_with_root(name, has_root) for name in renamed.names)
        if any(name in wanted or _LAYER.match(name) for name in names):
            found.append(Renamed(key, names, renamed.parts, renamed.transposed))
    return found


def _renamed(key: str, name: str) -> Renamed:
    """What a tensor is in a model whose names have the root."""
    if name in _OPEN_CLIP:
        return Renamed(key, (ROOT + _OPEN_CLIP[name],))
    if name == "text_projection":
        return Renamed(key, (_PROJECTION,), transposed=True)
    if name in _TOKENS:
        return Renamed(key, _TOKENS)
    block = _BLOCK.fullmatch(name)
    if block is None:
        return Renamed(key, (name,))
    layer, rest = f"{ROOT}encoder.layers.{block[1]}.", block[2]
    if rest.startswith(_FUSED):
        kind = rest.removeprefix(_FUSED)
        return Renamed(key, tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv"), parts=3)
    start = next((start for start in _IN_BLOCK if rest.startswith(start)), "")
    return Renamed(key, (layer + _IN_BLOCK.get(start, "") + rest.removeprefix(start),))


def _with_root(name: str, has_root: bool) -> str:
    """A name of CLIP's with or without its root; other names are not changed."""
    bare = name.removeprefix(ROOT)
    is_clip = bare.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return f"{ROOT}{bare}" if is_clip and has_root else bare


def name_in_file(name: str) -> str:
    """The name under which a tensor of a model is saved: CLIP's names have their root."""
    return _with_root(name, has_root=True)


def find_text_encoder(
    file: NFQFile, shapes: Mapping[str, tuple[int, ...]], config: str
) -> tuple[TextEncoder, list[Renamed]]:
    """The text encoder in a file that a model describes, and its tensors.

    Args:
        file: a text encoder alone or a whole checkpoint.
        shapes: shapes of the model's tensors by name.
        config: the config that the model was built from, for messages.

    Raises:
        UnsupportedFileError: the file has no such text encoder, or a tensor is missing, unknown to the model, or of
            another shape.
    """
    encoders = find_text_encoders(file.shapes())
    if not encoders:
        info = detect(file.shapes())
        held = "no text encoder of a known kind" if info is None else "a UNet and no text encoder"
        advice = "" if info is None else "; load_unet reads the UNet"
        raise UnsupportedFileError(f"{file.path} holds {held}; name a file with CLIP or T5{advice}")
    stored, found = file.shapes(), []
    for encoder in encoders:
        renamed = rename(stored, encoder, shapes)
        actual = {name: each.shape(stored[each.key]) for each in renamed for name in each.names}
        if actual == shapes:
            return encoder, renamed
        found.append(actual)
    table = next(name for name in shapes if name.endswith(_TABLES))
    similar = [actual for actual in found if actual.get(table, ())[1:] == shapes[table][1:]]
    if not similar:
        held = " and ".join(encoder.name for encoder in encoders)
        raise UnsupportedFileError(
            f"{file.path} holds {held}, but {config} describes a text encoder of width {shapes[table][1]:,}; use a "
            "file with this text encoder, or the config of the one that was quantised"
        )
    check_shapes(file, similar[0], shapes, config)
    raise AssertionError("the shapes differ")


def tied_names(names: Collection[str]) -> dict[str, str]:
    """Names of a model's tensors that are the same as another, which is given; T5's table of tokens has two names."""
    return {_TOKENS[1]: _TOKENS[0]} if names and all(name in names for name in _TOKENS) else {}
