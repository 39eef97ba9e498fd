"""The models in one file: a diffusion model, text encoders, a VAE, and tensors of no known model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .completeness import HOST_WIDTHS, context_width
from .families import FamilyModel, find_family
from .text_encoders import TextEncoder, find_text_encoders, owner_finder
from .unet import UNKNOWN, UNetInfo, is_unet_key

Kind = Literal["diffusion model", "text encoder", "VAE", "other"]

VAE_PREFIXES = ("first_stage_model.", "vae.")
"""Prefixes of a VAE's keys next to another model."""


@dataclass(frozen=True)
class Component:
    """One of the models in a file.

    Args:
        kind: what it is.
        name: such as "SDXL", "Flux.1" or "CLIP-L"; the kind if it has no name of its own.
        keys: its tensors, in the file's order.
        encoder: the text encoder, if it is one.
        family: the model of a known family, if it is one.
    """

    kind: Kind
    name: str
    keys: tuple[str, ...]
    encoder: TextEncoder | None = None
    family: FamilyModel | None = None


def model_name(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> str:
    """Name of the architecture or family of a file's diffusion model, such as "SDXL" or "Flux.1", or `UNKNOWN`.

    Args:
        info: the UNet that was detected; None for a file without one.
        shapes: shape of each tensor by name.
    """
    if info is None:
        model = find_family(shapes)
        return model.family.name if model else UNKNOWN
    if info.architecture is None:
        return HOST_WIDTHS.get(context_width(shapes), UNKNOWN)
    return info.name


def find_components(info: UNetInfo | None, shapes: Mapping[str, Sequence[int]]) -> list[Component]:
    """The models in a file; every tensor belongs to exactly one. Empty ones are left out.

    Without a UNet of a known layout or a model of a known family, tensors of no known model are "other": a diffusion
    model of an unknown family, for example. A VAE is recognised only next to another model.

    Args:
        info: the UNet that was detected; None for a file without one.
        shapes: shape of each tensor by name.
    """
    encoders = find_text_encoders(shapes)
    family = None if info else find_family(shapes)
    name = model_name(info, shapes)
    groups = [Component("diffusion model", "diffusion model" if name == UNKNOWN else name, (), None, family)]
    groups += [Component("text encoder", encoder.name, (), encoder) for encoder in encoders]
    groups += [Component("VAE", "VAE", ()), Component("other", "other", ())]
    keys: list[list[str]] = [[] for _ in groups]
    has_other_models = info is not None or family is not None or bool(encoders)
    owner, number_of = owner_finder(encoders), {id(encoder): number for number, encoder in enumerate(encoders, 1)}
    for key in shapes:
        if info and is_unet_key(info, key):
            index = 0
        elif has_other_models and key.startswith(VAE_PREFIXES):
            index = len(groups) - 2
        else:
            index = number_of.get(id(owner(key)), 0 if family and key.startswith(family.prefix) else len(groups) - 1)
        keys[index].append(key)
    return [replace(group, keys=tuple(own)) for group, own in zip(groups, keys, strict=True) if own]
