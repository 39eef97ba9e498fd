"""A short hash of a model's weights and of how it was sampled, which names its calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

SAMPLES = 64
"""Weights of each tensor that are hashed, evenly spaced; every training changes nearly all of them."""

CHARACTERS = 12


def fingerprint(names: Iterable[str], tensor: Callable[[str], torch.Tensor], *facts: object) -> str:
    """Hash a model in 12 hexadecimal characters; the dtype of the weights counts only by what it rounds.

    Args:
        names: names of its tensors.
        tensor: gives a tensor by name; on any device.
        facts: what else counts, such as the number of prompts: numbers, texts, tensors, and mappings, lists and tuples
            of them. Of other objects their attribute `weights` counts, and their class.
    """
    digest = hashlib.sha256()
    _add(digest, facts)
    for name in sorted(names):
        _add(digest, (name, tensor(name)))
    return digest.hexdigest()[:CHARACTERS]


def _add(digest: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(repr(tuple(value.shape)).encode())
        flat = value.detach().reshape(-1)
        if flat.numel():
            places = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
            digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    elif isinstance(value, Mapping):
        _add(digest, sorted(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for part in value:
            _add(digest, part)
    elif value is None or isinstance(value, str | int | float):
        digest.update(repr(value).encode() + b",")
    else:
        digest.update(type(value).__name__.encode())
        _add(digest, getattr(value, "weights", None))
