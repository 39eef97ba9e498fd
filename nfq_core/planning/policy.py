"""Which tensors of a model are quantised, and to which format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from ..errors import NFQError
from ..files.prequantized import compute_dtype
from ..files.safetensors_io import DTYPE_NAMES, Entry
from ..files.writer import Plan
from ..fitting.codebook import effort_by_name
from ..models.unet import UNetInfo, detect, first_and_last_convolution, is_unet_key
from ..packed.formats import BlockFormat, nf_format, writable_format
from ..packed.tensor import QUANTIZABLE_DTYPES
from ..sizes import size_in_words
from .allocation import allocate, packed_bounds

MIN_WEIGHTS = 1024
"""Smaller tensors are kept: nothing to gain."""

HEADER_BYTES = 400
"""What a tensor takes in a file's header, about."""

MIN_OF_SMALLEST = 0.9
"""Below this part of the smallest file, as estimated before it is written, a size is refused at once."""

_QUANTIZABLE = {DTYPE_NAMES[dtype] for dtype in QUANTIZABLE_DTYPES}
_FP8 = {"F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Settings:
    """How a model is quantised.

    Args:
        levels: levels of 2-D weights (Linear).
        conv_levels: levels of weights of three and more dimensions (convolutions).
        effort: "fast" or "best".
        quantize_first_last: whether a UNet's first and last convolution are quantised too. They hold 0.001 % of SDXL's
            weights, and rounding the last one tints the whole picture.
        format: the format of 2-D weights, one of `formats.WRITABLE_IDS`; `levels` does not count then.
        conv_format: likewise instead of `conv_levels`.
        target_bpw: packed bits per weight, at most, instead of any formats: each layer gets its own, see `allocation`.
        target_bytes: likewise the size of the whole file.

    Raises:
        ValueError: a value is none of those allowed.
    """

    levels: int = 16
    conv_levels: int = 32
    effort: str = "fast"
    quantize_first_last: bool = False
    format: str | None = None
    conv_format: str | None = None
    target_bpw: float | None = None
    target_bytes: int | None = None

    def __post_init__(self) -> None:
        self.formats()
        effort_by_name(self.effort)
        if self.target_bpw is not None and self.target_bytes is not None:
            raise ValueError("target_bpw and target_bytes exclude each other")
        for name in ("target_bpw", "target_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1 << 63:
                raise ValueError(f"{name} must be above zero and below 2**63, got {str(value)[:20]}")

    @property
    def has_target(self) -> bool:
        """Whether a size is asked for instead of formats."""
        return self.target_bpw is not None or self.target_bytes is not None

    def formats(self) -> tuple[BlockFormat, BlockFormat]:
        """The formats of 2-D weights and of those with more dimensions."""
        linear, convolution = nf_format(self.levels), nf_format(self.conv_levels)
        return (
            linear if self.format is None else writable_format(self.format),
            convolution if self.conv_format is None else writable_format(self.conv_format),
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as the header records them: a size where one was asked for, else a format, else levels."""
        settings = asdict(self)
        for levels, format in (("levels", "format"), ("conv_levels", "conv_format")):
            if self.has_target or settings[format] is not None:
                del settings[levels]
            if self.has_target or settings[format] is None:
                del settings[format]
        return {name: value for name, value in settings.items() if value is not None}


DEFAULTS = Settings()
"""What `nfq quantize` uses unless told otherwise."""


def plan_tensors(
    entries: Mapping[str, Entry],
    settings: Settings,
    sensitivities: Mapping[str, float] | None = None,
    packed_bytes: int | None = None,
) -> tuple[UNetInfo | None, dict[str, Plan]]:
    """Decide for every tensor of a model whether and how it is quantised.

    Where a UNet of the SDXL family is recognised, only its weights are; anything else is a plain state dict, and all
    its weights are. 1-D tensors stay as they are, and so do those with `emb` in their name, as in the article, tiny
    ones, and those that are not floating. Floats of eight bits are quantised like wider ones, and then recorded in the
    dtype that a host computes in, see `prequantized.compute_dtype`.

    Args:
        entries: dtype and shape of every tensor by name.
        settings: which formats, or which size.
        sensitivities: see `allocation.allocate`.
        packed_bytes: bytes for all packed weights, at most; by default what `settings` ask for.

    Returns:
        What was recognised (None: a plain state dict), and a plan for every tensor.

    Raises:
        NFQError: the size asked for is too small, or the bits are more than any format has.
    """
    info = detect({key: entry.shape for key, entry in entries.items()})
    spared = first_and_last_convolution(info) if info and not settings.quantize_first_last else ()
    linear, convolution = settings.formats()
    computed = compute_dtype(entries) if any(entry.dtype in _FP8 for entry in entries.values()) else ""
    plans = {}
    for key, entry in entries.items():
        quantized = (
            len(entry.shape) >= 2
            and entry.dtype in _QUANTIZABLE | _FP8
            and "emb" not in key
            and key not in spared
            and (info is None or is_unet_key(info, key))
            and prod(entry.shape) >= MIN_WEIGHTS
        )
        fmt = linear if len(entry.shape) == 2 else convolution
        dtype = computed if quantized and entry.dtype in _FP8 else entry.dtype
        plans[key] = Plan(dtype, entry.shape, fmt if quantized else None)
    if settings.has_target:
        shapes = {key: plan.shape for key, plan in plans.items() if plan.format}
        budget = _budget(plans, settings) if packed_bytes is None else packed_bytes
        budget = _possible_budget(shapes, budget, settings, plans)
        for key, (fmt, sensitivity) in allocate(shapes, budget, sensitivities, effort=settings.effort).items():
            plans[key] = replace(plans[key], format=fmt, sensitivity=sensitivity)
    return info, plans


def _budget(plans: Mapping[str, Plan], settings: Settings) -> int:
    """The packed bytes that a size allows, about: what a file holds beside them is only known when it is written."""
    if settings.target_bpw is not None:
        return int(settings.target_bpw * sum(prod(plan.shape) for plan in plans.values() if plan.format) / 8)
    kept = sum(plan.nbytes for plan in plans.values() if not plan.format)
    return settings.target_bytes - kept - HEADER_BYTES * len(plans)


def _possible_budget(
    shapes: Mapping[str, tuple[int, ...]], budget: int, settings: Settings, plans: Mapping[str, Plan]
) -> int:
    """The packed bytes to plan with: at least what the smallest formats take, since a file may compress below that.

    Raises:
        NFQError: no choice of formats comes near the size, or the bits are more than any format has.
    """
    if not shapes:
        return budget
    smallest, largest = packed_bounds(shapes, settings.effort)
    if settings.target_bpw is not None:
        low, high = (bound * 8 / sum(map(prod, shapes.values())) for bound in (smallest, largest))
        if budget < smallest or settings.target_bpw > high:
            much, way = ("few", "more") if budget < smallest else ("many", "fewer")
            low, high = math.ceil(low * 1000) / 1000, math.floor(high * 1000) / 1000
            raise NFQError(
                f"{settings.target_bpw:g} packed bits per weight are too {much}; this model's can have {low:.3f} to "
                f"{high:.3f}, ask for {way}"
            )
    else:
        beside = settings.target_bytes - _budget(plans, settings)
        if settings.target_bytes < MIN_OF_SMALLEST * (beside + smallest):
            raise NFQError(
                f"{size_in_words(settings.target_bytes)} are too few; this model's file can have about "
                f"{size_in_words(beside + smallest)} to {size_in_words(beside + largest)}, ask for more"
            )
    return max(budget, smallest)
