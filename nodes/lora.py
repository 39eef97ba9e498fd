"""Applying a layer's patches (LoRA and others) to its weight after dequantising.

All plain LoRAs of a layer form one `LowRank` and are added in one operation. If the packed weight is on the compute
device, the factors stay there too after the first step. If not, both are copied for each use.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ..nfq_core.layers.low_rank import LowRank
from .misfits import Misfits, Patch


class WeightPatch:
    """Applies a layer's patches in order.

    Args:
        key: the weight's name in the model, for the host's messages.
        patches: the patches.
        shape: shape of the weight.
        misfits: finds the patches to skip because they do not fit.
        resident: whether factors stay on the device where they are first needed.
        original_weights: unpatched weights by name, for patches that need them.
    """

    def __init__(
        self,
        key: str,
        patches: Sequence[Patch],
        shape: Sequence[int],
        misfits: Misfits,
        *,
        resident: bool = False,
        original_weights: Mapping[str, Any] | None = None,
    ) -> None:
        self.key = key
        self.patches = list(patches)
        self._shape, self._misfits = tuple(shape), misfits
        self._groups = self._grouped()
        self._resident = resident
        self._original_weights = original_weights
        self._ready: list[LowRank | Patch] = []
        self._ready_for: tuple[torch.device, torch.dtype] | None = None

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the patched weight; `weight` must be contiguous and may be overwritten."""
        for step, group in zip(self._steps(weight.device, weight.dtype), self._groups, strict=True):
            if isinstance(step, LowRank):
                weight = step.add_to(weight)
            else:
                weight = self._misfits.apply(group, weight, self.key, self._original_weights, moved=step)
                if self._misfits.skips(self.key, group, self._shape):
                    self._groups, self._ready_for = self._grouped(), None
        return weight

    def factor_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the factors on a device that computes in `dtype`."""
        plain = [patch[1].weights[:2] for group in self._groups if isinstance(group, list) for patch in group]
        others = [group[1] for group in self._groups if not isinstance(group, list)]
        return sum(factor.numel() * dtype.itemsize for factors in plain for factor in factors) + sum(
            tensor.nbytes for adapter in others for tensor in _tensors(adapter)
        )

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors to the device where the layer will compute."""
        self._steps(device, dtype)

    def release(self) -> None:
        """Drop the factors kept on a device and keep none from now on."""
        self._resident, self._ready, self._ready_for = False, [], None

    def _steps(self, device: torch.device, dtype: torch.dtype) -> list[LowRank | Patch]:
        if self._ready_for == (device, dtype):
            return self._ready
        steps = [
            _low_rank(group, device, dtype) if isinstance(group, list) else _on_device(group, device)
            for group in self._groups
        ]
        if self._resident:
            self._ready, self._ready_for = steps, (device, dtype)
        return steps

    def _grouped(self) -> list[list[Patch] | Patch]:
        """The patches that fit, in order; consecutive plain LoRAs form a list."""
        groups: list[list[Patch] | Patch] = []
        for patch in self.patches:
            if not _is_plain(patch, (self._shape[0], prod(self._shape[1:]))):
                if not self._misfits.skips(self.key, patch, self._shape):
                    groups.append(patch)
            elif groups and isinstance(groups[-1], list):
                groups[-1].append(patch)
            else:
                groups.append([patch])
        return groups


class HookPatch(WeightPatch):
    """Applies the patches of the host's hooks after the layer's own patches."""


def _is_plain(patch: Patch, shape: tuple[int, int]) -> bool:
    """Whether a patch only adds the product of two factors to a weight of shape (rows, columns)."""
    _, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or offset is not None or function is not None:
        return False
    up, down, _, *special = adapter.weights
    if up.dim() < 2 or down.dim() < 2 or not len(down):
        return False
    fits = up.shape[0] == shape[0] and down.numel() == down.shape[0] * shape[1] and up.numel() == shape[0] * len(down)
    return fits and all(value is None for value in special)


def _low_rank(patches: Sequence[Patch], device: torch.device, dtype: torch.dtype) -> LowRank:
    parts = []
    for strength, adapter, *_ in patches:
        up, down, alpha, *_ = adapter.weights
        parts.append((up, down, strength if alpha is None else strength * alpha / len(down)))
    return LowRank.sum(parts, device=device, dtype=dtype)


def _tensors(adapter: object) -> list[torch.Tensor]:
    """The tensors of an adapter; none for a full-size difference or an unknown kind of adapter."""
    if not isinstance(adapter, WeightAdapterBase) or not isinstance(adapter.weights, (tuple, list)):
        return []
    return [value for value in adapter.weights if isinstance(value, torch.Tensor)]


def _on_device(patch: Patch, device: torch.device) -> Patch:
    """The patch with its adapter's tensors, see `_tensors`, on a device."""
    strength, adapter, *rest = patch
    if not _tensors(adapter):
        return patch
    moved = copy.copy(adapter)
    moved.weights = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in adapter.weights)
    return (strength, moved, *rest)
