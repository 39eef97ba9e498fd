"""Patches that do not fit their weight, such as those of a LoRA for another base model: skipped, logged once a load.

The host's `calculate_weight` logs such a patch and leaves the weight as it is. The host calls it once a load for a
dense weight. A packed weight is patched at every step, where each of these log lines would come again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase

log = logging.getLogger("nfq")

Patch = tuple
"""As the host has it: strength, adapter or difference, strength of the model, offset, function."""


@dataclass(frozen=True)
class _Verdict:
    patch: Patch
    """Kept, so that its adapter's id names no other one."""
    reason: str = ""
    """What the host says of the patch; empty where it fits."""
    changes_nothing: bool = False
    """Whether the weight is the same without the patch."""


class Misfits:
    """Finds, skips and reports the patches of one MODEL that do not fit."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple, _Verdict] = {}
        self._found: dict[tuple, str] = {}
        self._logged: set[tuple] = set()

    def start(self) -> None:
        """Forget everything: a load begins."""
        self._verdicts.clear()
        self._found.clear()
        self._logged.clear()

    def skips(self, key: str, patch: Patch, shape: Sequence[int]) -> bool:
        """Whether a patch can be left out, because it does not fit a weight and changes nothing.

        Args:
            key: the weight's name in the model.
            patch: the patch.
            shape: shape of the weight.
        """
        name = _name(key, patch)
        if name not in self._verdicts:
            self._verdicts[name] = _rehearse(key, patch, shape)
        verdict = self._verdicts[name]
        if verdict.reason:
            self._found[name] = verdict.reason
        return verdict.changes_nothing

    def report(self) -> None:
        """Log what `skips` found and no line has named since the load, all in one line."""
        new = {name: reason for name, reason in self._found.items() if name not in self._logged}
        if not new:
            return
        self._logged |= new.keys()
        log.error(
            "%d LoRA patches do not fit this model and are skipped; use a LoRA made for this base model. The first: %s",
            len(new),
            next(iter(new.values())),
        )

    def apply(
        self,
        patch: Patch,
        weight: torch.Tensor,
        key: str,
        original_weights: Mapping[str, Any] | None = None,
        *,
        moved: Patch | None = None,
    ) -> torch.Tensor:
        """The weight with a patch, by the host's arithmetic; what the host logs is shown once a load.

        Adapters compute in fp32, as when the host loads a dense model: OFT fails in fp16.

        Args:
            patch: the patch, as `skips` is asked about it.
            weight: may be overwritten.
            key: the weight's name in the model.
            original_weights: what the host hands to patches that compare with the weights before.
            moved: the patch with its tensors on the weight's device.

        Raises:
            torch.cuda.OutOfMemoryError: the host would log it, and this step alone would lack the patch.
        """
        steps = [patch if moved is None else moved]
        if torch.compiler.is_compiling():
            return comfy.lora.calculate_weight(steps, weight, key, original_weights=original_weights)
        name, shape = _name(key, patch), weight.shape
        with _listening(shown=name not in self._logged) as heard:
            weight = comfy.lora.calculate_weight(steps, weight, key, original_weights=original_weights)
        if heard.out_of_memory:
            raise torch.cuda.OutOfMemoryError(heard.out_of_memory)
        if heard.anything:
            self._logged.add(name)
        if heard.failure:
            self._verdicts[name] = _Verdict(patch, heard.failure, _changes_nothing(patch, shape, weight.shape))
        return weight


def _name(key: str, patch: Patch) -> tuple:
    _, adapter, strength_model, offset, _ = patch
    return key, id(adapter), strength_model, str(offset)


def _changes_nothing(patch: Patch, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a patch that failed neither scaled nor padded the weight before it did."""
    return patch[2] == 1.0 and tuple(before) == tuple(after)


def _rehearse(key: str, patch: Patch, shape: Sequence[int]) -> _Verdict:
    """Apply a patch to a weight without data; one that this cannot decide counts as fitting."""
    if not _has_rehearsal(patch):
        return _Verdict(patch)
    weight = torch.empty(tuple(shape), device="meta")
    with _listening(shown=False) as heard:
        try:
            result = comfy.lora.calculate_weight([patch], weight, key)
        except Exception:
            # Applying the patch raises it again, where the host does not catch it either.
            return _Verdict(patch)
    if not heard.failure or "meta" in heard.failure:
        return _Verdict(patch)
    return _Verdict(patch, heard.failure, _changes_nothing(patch, shape, result.shape))


def _has_rehearsal(patch: Patch) -> bool:
    """Whether shapes alone decide if a patch fits: no function of its own, no other model's weights."""
    _, adapter, _, _, function = patch
    if function is not None or not isinstance(adapter, (tuple, WeightAdapterBase)):
        return False
    needs_weights = isinstance(adapter, tuple) and isinstance(adapter[0], str) and adapter[0] != "diff"
    return not needs_weights


class _Listener(logging.Filter):
    """What one thread logs through the root logger, as the host does."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self._shown = shown
        self._thread = logging.LogRecord("", 0, "", 0, "", None, None).thread
        self.anything = False
        self.failure = ""
        """The first warning or error."""
        self.out_of_memory = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        self.anything = True
        caught = sys.exc_info()[1]
        if isinstance(caught, (torch.cuda.OutOfMemoryError, MemoryError)):
            self.out_of_memory = str(caught) or "not enough memory for a LoRA"
            return False
        if record.levelno >= logging.WARNING:
            self.failure = self.failure or record.getMessage()
        return self._shown


@contextmanager
def _listening(shown: bool) -> Iterator[_Listener]:
    """Hear what the host logs meanwhile; it is shown to the user only if `shown`."""
    listener, root = _Listener(shown), logging.getLogger()
    root.addFilter(listener)
    try:
        yield listener
    finally:
        root.removeFilter(listener)
