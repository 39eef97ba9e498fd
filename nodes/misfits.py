"""Patches that do not fit their weight, such as those of a LoRA for another base model: skipped, logged once a load.

The host's `calculate_weight` logs such a patch and returns the weight unchanged. For a dense weight the host calls it
once per load. A packed weight is patched at every step, so the same lines would be logged at every step.
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

from ..nfq_core.checkpoints.memory import is_out_of_memory

log = logging.getLogger("nfq")

Patch = tuple
"""The host's form of a patch: strength, adapter or difference, strength of the model, offset, function."""


@dataclass(frozen=True)
class _Verdict:
    patch: Patch
    """Kept so that no other adapter gets the same id."""
    reason: str = ""
    """The host's message about the patch; empty if it fits."""
    changes_nothing: bool = False
    """Whether the patch leaves the weight unchanged."""


class Misfits:
    """Finds, skips and reports the patches of one MODEL that do not fit."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple, _Verdict] = {}
        self._found: dict[tuple, str] = {}
        self._logged: set[tuple] = set()

    def start(self) -> None:
        """Forget all verdicts at the beginning of a load."""
        self._verdicts.clear()
        self._found.clear()
        self._logged.clear()

    def skips(self, key: str, patch: Patch, shape: Sequence[int]) -> bool:
        """Whether a patch can be skipped because it does not fit a weight and leaves it unchanged.

        Args:
            key: the weight's name in the model.
            patch: the patch.
            shape: shape of the weight.
        """
        name = _name(key, patch)
        if name not in self._verdicts:
            self._verdicts[name] = _dry_run(key, patch, shape)
        verdict = self._verdicts[name]
        if verdict.reason:
            self._found[name] = verdict.reason
        return verdict.changes_nothing

    def report(self) -> None:
        """Log one line about the patches that `skips` found since the last report of this load."""
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
        """Apply a patch with the host's arithmetic; the host's log lines about it are shown once per load.

        Adapters compute in fp32, as when the host loads a dense model, because OFT fails in fp16.

        Args:
            patch: the patch, as passed to `skips`.
            weight: may be overwritten.
            key: the weight's name in the model.
            original_weights: unpatched weights by name, for patches that need them.
            moved: the patch with its tensors on the weight's device.

        Raises:
            torch.cuda.OutOfMemoryError: the host would only log it, and this one step would lack the patch.
        """
        steps = [patch if moved is None else moved]
        if torch.compiler.is_compiling():
            return comfy.lora.calculate_weight(steps, weight, key, original_weights=original_weights)
        name, shape = _name(key, patch), weight.shape
        with listening(shown=name not in self._logged) as heard:
            weight = comfy.lora.calculate_weight(steps, weight, key, original_weights=original_weights)
        heard.raise_out_of_memory()
        if heard.anything:
            self._logged.add(name)
        if heard.failure:
            self._verdicts[name] = _Verdict(patch, heard.failure, _changes_nothing(patch, shape, weight.shape))
        return weight


def apply_patches(patches: Sequence[Patch], weight: torch.Tensor, key: str) -> torch.Tensor:
    """Apply patches to a weight of a stock layer with the host's arithmetic.

    Args:
        patches: the patches.
        weight: may be overwritten.
        key: the weight's name in the model.

    Raises:
        torch.cuda.OutOfMemoryError: the host would only log it, and the weight would lack a patch.
    """
    with listening(shown=True) as heard:
        result = comfy.lora.calculate_weight(patches, weight, key)
    heard.raise_out_of_memory()
    return result


def _name(key: str, patch: Patch) -> tuple:
    _, adapter, strength_model, offset, _ = patch
    return key, id(adapter), strength_model, str(offset)


def _changes_nothing(patch: Patch, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a patch that failed had not scaled or padded the weight before."""
    return patch[2] == 1.0 and tuple(before) == tuple(after)


def _dry_run(key: str, patch: Patch, shape: Sequence[int]) -> _Verdict:
    """Apply a patch to a weight without data; a patch that needs data counts as fitting."""
    if not _supports_dry_run(patch):
        return _Verdict(patch)
    weight = torch.empty(tuple(shape), device="meta")
    with listening(shown=False) as heard:
        try:
            result = comfy.lora.calculate_weight([patch], weight, key)
        except Exception:
            # The host does not catch this error either: applying the patch will raise it again.
            return _Verdict(patch)
    if not heard.failure or "meta" in heard.failure:
        return _Verdict(patch)
    return _Verdict(patch, heard.failure, _changes_nothing(patch, shape, result.shape))


def _supports_dry_run(patch: Patch) -> bool:
    """Whether shapes alone decide if a patch fits: it has no function and needs no weights of another model."""
    _, adapter, _, _, function = patch
    if function is not None or not isinstance(adapter, (tuple, WeightAdapterBase)):
        return False
    needs_weights = isinstance(adapter, tuple) and isinstance(adapter[0], str) and adapter[0] != "diff"
    return not needs_weights


class Listener(logging.Filter):
    """Watches what one thread logs through the root logger, which the host uses; `shown` is whether users see it."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self._shown = shown
        self._thread = logging.LogRecord("", 0, "", 0, "", None, None).thread
        self.anything = False
        self.warnings: list[str] = []
        """Texts of all warnings and errors."""
        self.out_of_memory = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether users see the line."""
        if record.thread != self._thread:
            return True
        self.anything = True
        caught = sys.exc_info()[1]
        if caught is not None and is_out_of_memory(caught):
            self.out_of_memory = str(caught) or "not enough memory for a LoRA"
            return False
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())
        return self._shown

    def raise_out_of_memory(self) -> None:
        """Raise the torch.cuda.OutOfMemoryError that the host caught and logged, if it did."""
        if self.out_of_memory:
            raise torch.cuda.OutOfMemoryError(self.out_of_memory)

    @property
    def failure(self) -> str:
        """Text of the first warning or error; empty if there is none."""
        return next(iter(self.warnings), "")


@contextmanager
def listening(shown: bool) -> Iterator[Listener]:
    """Listen to the host's log lines inside the `with` block; users see them only if `shown`."""
    listener, root = Listener(shown), logging.getLogger()
    root.addFilter(listener)
    try:
        yield listener
    finally:
        root.removeFilter(listener)
