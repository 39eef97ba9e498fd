"""A short hash of a model's weights and of how it was sampled, which names its calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch

SAMPLES = 64
"""Weights of each tensor that are hashed, evenly spaced; every training changes nearly all of them."""

CHARACTERS = 12


def fingerprint(
    names: Iterable[str], tensor: Callable[[str], torch.Tensor], sampled_with: Mapping[str, object] | None = None
) -> str:
    """Hash a model in 12 hexadecimal characters; the dtype of the weights counts only by what it rounds.

    Args:
        names: names of its tensors.
        tensor: gives a tensor by name; on any device.
        sampled_with: further facts, such as the number of prompts.
    """
    digest = hashlib.sha256(repr(sorted((sampled_with or {}).items())).encode())
    for name in sorted(names):
        weight = tensor(name)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        if flat.numel():
            places = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
            digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:CHARACTERS]
