"""Which tensors of a model are quantised, and to which format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod

from ..errors import NFQError
from ..files.prequantized import compute_dtype
from ..files.safetensors_io import DTYPE_NAMES, Entry
from ..files.writer import Plan
from ..models.roles import OTHER, role
from ..models.sensitivities import layer_sensitivities
from ..models.unet import UNKNOWN, UNetInfo, detect, first_and_last_convolution, is_unet_key
from ..packed.tensor import QUANTIZABLE_DTYPES
from ..sizes import size_in_words
from .allocation import allocate, packed_bounds
from .settings import BitsPerWeight, FileSize, Formats, Settings

MIN_WEIGHTS = 1024
"""Smaller tensors are kept: nothing to gain."""

HEADER_BYTES = 400
"""Bytes that a tensor takes in a file's header, estimated."""

MIN_OF_SMALLEST = 0.9
"""A size below this part of the smallest file, estimated before the file is written, is refused at once."""

_QUANTIZABLE = {DTYPE_NAMES[dtype] for dtype in QUANTIZABLE_DTYPES}
_FP8 = {"F8_E4M3", "F8_E5M2"}


def plan_tensors(
    entries: Mapping[str, Entry],
    settings: Settings,
    sensitivities: Mapping[str, float] | None = None,
    packed_bytes: int | None = None,
) -> tuple[UNetInfo | None, dict[str, Plan]]:
    """Decide for every tensor of a model whether and how it is quantised.

    Only the UNet is quantised where one of the SDXL family is recognised; in any other state dict, all weights are.
    These stay as they are: 1-D tensors, tensors with `emb` in their name (as in the article), tiny ones, and integers.
    8-bit floats are quantised too, and recorded in the dtype that a host computes in, see `prequantized.compute_dtype`.

    Args:
        entries: dtype and shape of every tensor by name.
        settings: which formats, or which size.
        sensitivities: measured sensitivities by name, see `models.sensitivities`.
        packed_bytes: bytes of all packed weights, at most; by default what `settings` ask for.

    Returns:
        What was recognised (None: a plain state dict), and a plan for every tensor.

    Raises:
        NFQError: the size is too small, or no format has so many bits.
    """
    info = detect({key: entry.shape for key, entry in entries.items()})
    spared = first_and_last_convolution(info) if info and not settings.quantize_first_last else frozenset()
    shapes = {key: entry.shape for key, entry in entries.items() if _is_quantized(key, entry, info, spared)}
    choice = settings.choice
    if isinstance(choice, Formats):
        formats = {
            key: (choice.linear if len(shape) == 2 else choice.convolution, None) for key, shape in shapes.items()
        }
    else:
        kept = [Plan(entry.dtype, entry.shape, None).nbytes for key, entry in entries.items() if key not in shapes]
        beside = sum(kept) + HEADER_BYTES * len(entries)
        budget = _budget(choice, shapes, beside) if packed_bytes is None else packed_bytes
        budget = _possible_budget(choice, shapes, budget, beside, settings.effort)
        found = layer_sensitivities(info, shapes, sensitivities)
        formats = allocate(shapes, budget, found.priorities, effort=settings.effort)
    computed = compute_dtype(entries) if any(entry.dtype in _FP8 for entry in entries.values()) else ""
    plans = {}
    for key, entry in entries.items():
        if key in formats:
            dtype = computed if entry.dtype in _FP8 else entry.dtype
            plans[key] = Plan(dtype, entry.shape, *formats[key])
        else:
            plans[key] = Plan(entry.dtype, entry.shape, None)
    return info, plans


def estimate_warnings(
    info: UNetInfo | None, plans: Mapping[str, Plan], sensitivities: Mapping[str, float] | None
) -> list[str]:
    """A warning if formats were chosen by size for an unknown architecture without measured sensitivities.

    Args:
        info: what `plan_tensors` recognised.
        plans: its plans.
        sensitivities: the measured sensitivities that it was given.
    """
    sized = {key: plan.shape for key, plan in plans.items() if plan.sensitivity is not None}
    if not sized or sensitivities or (info and info.name != UNKNOWN):
        return []
    basis = layer_sensitivities(info, sized).basis
    others = sum(role(key, shape).group == OTHER for key, shape in sized.items())
    mean = f" ({others:,} of {len(sized):,} layers have none of SDXL's roles and get a mean)" if others else ""
    return [f"the architecture is unknown, so its layers' sensitivities are {basis}{mean}; a calibration measures them"]


def _is_quantized(key: str, entry: Entry, info: UNetInfo | None, spared: frozenset[str]) -> bool:
    return (
        len(entry.shape) >= 2
        and entry.dtype in _QUANTIZABLE | _FP8
        and "emb" not in key
        and key not in spared
        and (info is None or is_unet_key(info, key))
        and prod(entry.shape) >= MIN_WEIGHTS
    )


def _budget(size: BitsPerWeight | FileSize, shapes: Mapping[str, tuple[int, ...]], beside: int) -> int:
    """Packed bytes that a size allows, estimated; `beside` are the file's other bytes."""
    if isinstance(size, FileSize):
        return size.nbytes - beside
    return int(size.bits * sum(map(prod, shapes.values())) / 8)


def _possible_budget(
    size: BitsPerWeight | FileSize, shapes: Mapping[str, tuple[int, ...]], budget: int, beside: int, effort: str
) -> int:
    """Packed bytes to plan with: at least those of the smallest formats, because a file may compress below that.

    Raises:
        NFQError: no choice of formats comes near the size, or no format has so many bits.
    """
    if not shapes:
        return budget
    smallest, largest = packed_bounds(shapes, effort)
    if isinstance(size, BitsPerWeight):
        # Rounded up, so that a file of each limit exists.
        weights = sum(map(prod, shapes.values()))
        low, high = (math.ceil(bound * 8000 / weights) / 1000 for bound in (smallest, largest))
        if budget < smallest or size.bits > high:
            much, way = ("few", "more") if budget < smallest else ("many", "fewer")
            raise NFQError(
                f"{size.bits:g} packed bits per weight are too {much}; this model's can have {low:.3f} to "
                f"{high:.3f}, choose {way}"
            )
    elif size.nbytes < MIN_OF_SMALLEST * (beside + smallest):
        raise NFQError(
            f"{size_in_words(size.nbytes)} are too few; this model's file can have about "
            f"{size_in_words(beside + smallest)} to {size_in_words(beside + largest)}; choose a larger target"
        )
    return max(budget, smallest)
