"""Which tensors of a model are quantised, and to which format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

from ..errors import NFQError
from ..files.prequantized import compute_dtype
from ..files.safetensors_io import DTYPE_NAMES, Entry, dtype_bytes
from ..files.writer import Plan
from ..models.components import Component, find_components, model_name
from ..models.families import WEIGHT_DIMENSIONS, is_layer_to_quantize
from ..models.roles import OTHER, role
from ..models.sensitivities import layer_sensitivities
from ..models.text_encoders import Part
from ..models.unet import UNKNOWN, UNetInfo, detect, first_and_last_convolution
from ..packed.formats import FORMATS
from ..packed.layout import BlockFormat
from ..packed.tensor import QUANTIZABLE_DTYPES
from ..sizes import size_in_words
from .allocation import allocate, packed_bounds
from .settings import TEXT_ENCODERS_SETTING, BitsPerWeight, FileSize, Formats, Settings

MIN_WEIGHTS = 1024
"""Smaller tensors are kept: nothing to gain."""

HEADER_BYTES = 400
"""Bytes that a tensor takes in a file's header, estimated."""

MIN_OF_SMALLEST = 0.9
"""A size below this part of the smallest file, estimated before the file is written, is refused at once."""

CAREFUL_FORMAT = "nf256_b64"
"""Format of the layers that `Family.careful` names."""

MAX_CAREFUL = 0.1
"""Largest share of these layers among the weights to quantise, which leaves room in every preset.

In a model with more, such as one of few blocks, they have no format of their own.
"""

EMBEDDING_FORMAT = "nf256_b64"
"""Format of text encoders' token embeddings."""

TEXT_ENCODER_FORMATS = {
    ("8bit", "fast"): "nf256_b64",
    ("8bit", "best"): "nf256_b64",
    ("5bit", "fast"): "nf32_b64",
    ("5bit", "best"): "t5w9_b64",
}
"""Format of text encoders' layers, by `Settings.text_encoder_bits` and effort."""

_QUANTIZABLE = {DTYPE_NAMES[dtype] for dtype in QUANTIZABLE_DTYPES}
_FP8 = {"F8_E4M3", "F8_E5M2"}


def plan_tensors(
    entries: Mapping[str, Entry],
    settings: Settings,
    sensitivities: Mapping[str, float] | None = None,
    packed_bytes: int | None = None,
) -> tuple[UNetInfo | None, dict[str, Plan]]:
    """Decide for every tensor of a model whether and how it is quantised.

    A size or formats apply to the weights of Linear and Conv2d layers in the diffusion model, if a UNet or a model of a
    known family is recognised; otherwise in everything that is neither a text encoder nor a VAE next to other models.
    Tiny tensors stay as they are, and layers with `emb` in their name (as in the article), the first and last
    convolution of a UNet, and what `families.KEPT` names in other models. `Family.careful` layers get CAREFUL_FORMAT,
    which counts towards the size, unless they exceed MAX_CAREFUL. Text encoders have formats of their own, see
    TEXT_ENCODER_FORMATS and `TextEncoder.part`. If a file holds only text encoders, levels, formats and target sizes
    apply to their layers, unless `settings.text_encoders` is given.
    8-bit floats are quantised too, and recorded in the dtype that a host computes in, see `prequantized.compute_dtype`;
    a text encoder's stay as they are if the format would not make them smaller.

    Args:
        entries: dtype and shape of every tensor by name.
        settings: which formats, or which size.
        sensitivities: measured sensitivities by name, see `models.sensitivities`.
        packed_bytes: bytes of all packed weights whose formats are chosen by size, at most; by default what `settings`
            ask for.

    Returns:
        What was recognised (None: a plain state dict), and a plan for every tensor.

    Raises:
        NFQError: the size is too small, or no format has so many bits.
    """
    every = {key: entry.shape for key, entry in entries.items()}
    info = detect(every)
    shapes, careful, fixed = _split(info, entries, settings)
    choice = settings.choice
    fixed |= dict.fromkeys(careful, FORMATS[CAREFUL_FORMAT])
    formats: dict[str, tuple[BlockFormat, float | None]] = {key: (fmt, None) for key, fmt in fixed.items()}
    if isinstance(choice, Formats):
        formats |= {
            key: (choice.linear if len(shape) == 2 else choice.convolution, None) for key, shape in shapes.items()
        }
    else:
        kept = entries.keys() - shapes.keys() - fixed.keys()
        beside = sum(prod(every[key]) * dtype_bytes(entries[key].dtype) for key in kept)
        beside += sum(fmt.packed_bytes(prod(every[key])) for key, fmt in fixed.items()) + HEADER_BYTES * len(entries)
        budget = _budget(choice, shapes, careful, beside) if packed_bytes is None else packed_bytes
        way_out = "choose a larger target"
        if fixed.keys() - careful.keys() and settings.text_encoder_bits == "8bit":
            way_out += ", or 5 bits for the text encoders"
        budget = _possible_budget(choice, shapes, careful, budget, beside, settings.effort, way_out)
        found = layer_sensitivities(info, shapes, sensitivities)
        formats |= allocate(shapes, budget, found.priorities, effort=settings.effort)
    computed = compute_dtype(entries) if any(entry.dtype in _FP8 for entry in entries.values()) else ""
    plans = {}
    for key, entry in entries.items():
        if key in formats:
            dtype = computed if entry.dtype in _FP8 else entry.dtype
            plans[key] = Plan(dtype, entry.shape, *formats[key])
        else:
            plans[key] = Plan(entry.dtype, entry.shape, None)
    return info, plans


def recorded_text_encoders(settings: Settings, entries: Mapping[str, Entry]) -> dict[str, str]:
    """What a file's settings record about text encoders: how they are stored, if the source has some.

    Nothing is recorded if a size or formats apply to them.

    Args:
        settings: how it is quantised.
        entries: its tensors by name.
    """
    shapes = {key: entry.shape for key, entry in entries.items()}
    info = detect(shapes)
    parts = _text_encoder_parts(find_components(info, shapes), entries)
    if not parts or parts.keys() & _split(info, entries, settings).sized.keys():
        return {}
    return {TEXT_ENCODERS_SETTING: settings.text_encoder_bits}


def estimate_warnings(
    info: UNetInfo | None, plans: Mapping[str, Plan], sensitivities: Mapping[str, float] | None
) -> list[str]:
    """A warning if formats were chosen by size for a model of no known family without measured sensitivities.

    Args:
        info: what `plan_tensors` recognised.
        plans: its plans.
        sensitivities: the measured sensitivities that it was given.
    """
    sized = {key: plan.shape for key, plan in plans.items() if plan.sensitivity is not None}
    if not sized or sensitivities or model_name(info, {key: plan.shape for key, plan in plans.items()}) != UNKNOWN:
        return []
    basis = layer_sensitivities(info, sized).basis
    others = sum(role(key, shape).group == OTHER for key, shape in sized.items())
    mean = f" ({others:,} of {len(sized):,} layers have none of SDXL's roles and get a mean)" if others else ""
    return [f"the architecture is unknown, so its layers' sensitivities are {basis}{mean}; a calibration measures them"]


def _can_be_quantized(entry: Entry) -> bool:
    return (
        len(entry.shape) in WEIGHT_DIMENSIONS
        and entry.dtype in _QUANTIZABLE | _FP8
        and prod(entry.shape) >= MIN_WEIGHTS
    )


class _Split(NamedTuple):
    """The tensors that are quantised: shapes of those to which the size or formats apply, and of `Family.careful` ones.

    The last are the formats of text encoders' tensors.
    """

    sized: dict[str, tuple[int, ...]]
    careful: dict[str, tuple[int, ...]]
    text_encoders: dict[str, BlockFormat]


def _split(info: UNetInfo | None, entries: Mapping[str, Entry], settings: Settings) -> _Split:
    components = find_components(info, {key: entry.shape for key, entry in entries.items()})
    spared = first_and_last_convolution(info) if info and not settings.quantize_first_last else frozenset()
    main = next((each for each in components if each.kind == "diffusion model"), None)
    main = main or next((each for each in components if each.kind == "other"), None)
    own = [key for key in main.keys if _can_be_quantized(entries[key])] if main else []
    careful = [key for key in own if main.family and main.family.is_careful(key)]
    if info:
        keys = [key for key in own if key not in spared and "emb" not in key]
    else:
        prefix = main.family.prefix if main and main.family else ""
        keys = [key for key in own if is_layer_to_quantize(key, entries[key].shape, prefix)]
        if main and not any(f".{key}".endswith(".weight") for key in main.keys):
            # Arrays under names of their own, not the parameters of layers.
            keys = [key for key in own if "emb" not in key]
        every, few = ({key: entries[key].shape for key in some} for some in ({*keys, *careful}, careful))
        careful = careful if _weights(few) <= MAX_CAREFUL * _weights(every) else []
        keys = [key for key in keys if key not in careful]
    parts = _text_encoder_parts(components, entries)
    fixed = _text_encoder_formats(parts, entries, settings)
    by_preset = isinstance(settings.choice, BitsPerWeight) and bool(settings.choice.preset)
    if not keys and settings.text_encoders is None and not by_preset:
        keys = [key for key, part in parts.items() if part == "weight"]
        fixed = {key: fmt for key, fmt in fixed.items() if parts[key] != "weight"}
    return _Split({key: entries[key].shape for key in keys}, {key: entries[key].shape for key in careful}, fixed)


def _text_encoder_parts(components: Iterable[Component], entries: Mapping[str, Entry]) -> dict[str, Part]:
    """The text encoders' tensors that can be quantised, with their parts."""
    found = {}
    for component in components:
        for key in component.keys if component.encoder else ():
            part = component.encoder.part(key, entries[key].shape)
            if part != "kept" and _can_be_quantized(entries[key]):
                found[key] = part
    return found


def _text_encoder_formats(
    parts: Mapping[str, Part], entries: Mapping[str, Entry], settings: Settings
) -> dict[str, BlockFormat]:
    """Format of each of these tensors of text encoders; those that would not become smaller are left out."""
    bits = settings.text_encoder_bits
    if bits == "keep":
        return {}
    ids = {"weight": TEXT_ENCODER_FORMATS[bits, settings.effort], "embedding": EMBEDDING_FORMAT}
    formats = {key: FORMATS[ids[part]] for key, part in parts.items()}
    return {
        key: fmt
        for key, fmt in formats.items()
        if fmt.packed_bytes(prod(entries[key].shape)) < prod(entries[key].shape) * dtype_bytes(entries[key].dtype)
    }


def _careful_bytes(careful: Mapping[str, tuple[int, ...]]) -> int:
    return sum(FORMATS[CAREFUL_FORMAT].packed_bytes(prod(shape)) for shape in careful.values())


def _weights(*shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for each in shapes for shape in each.values())


def _budget(
    size: BitsPerWeight | FileSize,
    shapes: Mapping[str, tuple[int, ...]],
    careful: Mapping[str, tuple[int, ...]],
    beside: int,
) -> int:
    """Packed bytes that a size allows, estimated; `beside` are the file's other bytes, careful layers included."""
    if isinstance(size, FileSize):
        return size.nbytes - beside
    return int(size.bits * _weights(shapes, careful) / 8) - _careful_bytes(careful)


def _possible_budget(
    size: BitsPerWeight | FileSize,
    shapes: Mapping[str, tuple[int, ...]],
    careful: Mapping[str, tuple[int, ...]],
    budget: int,
    beside: int,
    effort: str,
    way_out: str,
) -> int:
    """Packed bytes to plan with: at least those of the smallest formats, because a file may compress below that.

    `way_out` is what a user can do about a file size that is too small.

    Raises:
        NFQError: no choice of formats comes near the size, or no format has so many bits.
    """
    if not shapes:
        return budget
    smallest, largest = packed_bounds(shapes, effort)
    if isinstance(size, BitsPerWeight):
        # Rounded up, so that a file of each limit exists.
        weights, fixed = _weights(shapes, careful), _careful_bytes(careful)
        low, high = (math.ceil((bound + fixed) * 8000 / weights) / 1000 for bound in (smallest, largest))
        if budget < smallest or size.bits > high:
            much, way = ("few", "more") if budget < smallest else ("many", "fewer")
            raise NFQError(
                f"{size.bits:g} packed bits per weight are too {much}; this model's can have {low:.3f} to "
                f"{high:.3f}, choose {way}"
            )
    elif size.nbytes < MIN_OF_SMALLEST * (beside + smallest):
        raise NFQError(
            f"{size_in_words(size.nbytes)} are too few; this model's file can have about "
            f"{size_in_words(beside + smallest)} to {size_in_words(beside + largest)}; {way_out}"
        )
    return max(budget, smallest)
