"""Applying a layer's patches (LoRA and others) to its weight after dequantising.

All plain LoRAs of a layer form one `LowRank` and are added in one operation, those of a slice (q, k or v of a fused
weight) too. Factors are combined once. They stay on the compute device if the packed weight is there. If not, they stay
in RAM and are copied for each use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch.nn.functional import pad

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
        rows, columns = self._matrix
        plain = [patch[1].weights[1] for group in self._groups if isinstance(group, list) for patch in group]
        others = [group[1] for group in self._groups if not isinstance(group, list)]
        return sum(len(down) * (rows + columns) * dtype.itemsize for down in plain) + sum(
            tensor.nbytes for adapter in others for tensor in _tensors(adapter)
        )

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Combine the factors for a layer that will compute on a device in a dtype."""
        self._combined(device, dtype)

    def release(self) -> None:
        """Drop the factors kept on a device and keep none there from now on."""
        self._resident, self._ready, self._ready_for = False, [], None

    @property
    def _matrix(self) -> tuple[int, int]:
        return self._shape[0], prod(self._shape[1:])

    def _steps(self, device: torch.device, dtype: torch.dtype) -> list[LowRank | Patch]:
        """What to apply to a weight on a device, in order."""
        steps = self._combined(device, dtype)
        return steps if self._resident else [_moved(step, device) for step in steps]

    def _combined(self, device: torch.device, dtype: torch.dtype) -> list[LowRank | Patch]:
        """The steps on the device or, if factors do not stay there, in RAM; pinned where the host pins weights."""
        kept = device if self._resident else torch.device("cpu")
        if self._ready_for != (kept, dtype):
            steps = [
                _low_rank(group, self._matrix, kept, dtype) if isinstance(group, list) else _moved(group, kept)
                for group in self._groups
            ]
            self._ready = [_pinned(step) for step in steps] if _pins(kept, device) else steps
            self._ready_for = kept, dtype
        return self._ready

    def _grouped(self) -> list[list[Patch] | Patch]:
        """The patches that fit, in order; consecutive plain LoRAs form a list."""
        groups: list[list[Patch] | Patch] = []
        for patch in self.patches:
            if not _is_plain(patch, self._matrix):
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
    """Whether a patch only adds the product of two factors to a weight of shape (rows, columns) or to a slice of it."""
    _, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return False
    if offset is not None:
        axis, start, length = offset
        if axis not in (0, 1) or not 0 <= start <= start + length <= shape[axis]:
            return False
        shape = (length, shape[1]) if axis == 0 else (shape[0], length)
    up, down, _, *special = adapter.weights
    if up.dim() < 2 or down.dim() < 2 or not len(down):
        return False
    fits = up.shape[0] == shape[0] and down.numel() == down.shape[0] * shape[1] and up.numel() == shape[0] * len(down)
    return fits and all(value is None for value in special)


def _low_rank(patches: Sequence[Patch], shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> LowRank:
    """All plain patches together; those of a slice have zeros outside it."""
    parts = []
    for strength, adapter, _, offset, _ in patches:
        up, down, alpha, *_ = adapter.weights
        coefficient = strength if alpha is None else strength * alpha / len(down)
        if offset is not None:
            axis, start, length = offset
            around = (start, shape[axis] - start - length)
            up, down = up.to(device).flatten(1), down.to(device).flatten(1)
            up = pad(up, (0, 0, *around)) if axis == 0 else up
            down = pad(down, around) if axis == 1 else down
        parts.append((up, down, coefficient))
    return LowRank.sum(parts, device=device, dtype=dtype)


def _tensors(adapter: object) -> list[torch.Tensor]:
    """The tensors of an adapter; none for a full-size difference or an unknown kind of adapter."""
    if not isinstance(adapter, WeightAdapterBase) or not isinstance(adapter.weights, (tuple, list)):
        return []
    return [value for value in adapter.weights if isinstance(value, torch.Tensor)]


def _with_tensors(step: LowRank | Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> LowRank | Patch:
    """The step with each factor, or each of its adapter's `_tensors`, changed."""
    if isinstance(step, LowRank):
        return LowRank(change(step.up), change(step.down))
    strength, adapter, *rest = step
    if not _tensors(adapter):
        return step
    changed = copy.copy(adapter)
    changed.weights = tuple(change(one) if isinstance(one, torch.Tensor) else one for one in adapter.weights)
    return (strength, changed, *rest)


def _moved(step: LowRank | Patch, device: torch.device) -> LowRank | Patch:
    """The step on a device; copies from pinned memory do not wait."""
    at_once = comfy.model_management.device_supports_non_blocking(device)
    return _with_tensors(step, lambda tensor: tensor.to(device, non_blocking=at_once))


def _pins(kept: torch.device, device: torch.device) -> bool:
    """Whether the host pins memory from which it copies to a device."""
    return kept.type == "cpu" and device.type == "cuda" and comfy.model_management.MAX_PINNED_MEMORY > 0


def _pinned(step: LowRank | Patch) -> LowRank | Patch:
    return _with_tensors(step, torch.Tensor.pin_memory)
