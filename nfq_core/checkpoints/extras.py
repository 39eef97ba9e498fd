"""Tensors of a file that no loader uses: averaged copies, optimizer states, a second UNet, a ControlNet left in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..files.safetensors_io import Entry
from ..models.unet import UNetInfo, detect, is_unet_key, other_unets
from ..models.unet_keys import CHECKPOINT_PREFIX
from ..sizes import size_in_words
from .whole_checkpoint import COMPANIONS, MARKERS

SETTING = "drop_extras"
"""Name in a file's settings which records that extras were left out; recorded only if the source had some."""

DROP_HINT = "`--drop-extras` leaves them out"
"""End of a warning about extras: how the command drops them. The web UI replaces it by its check box."""

SILENT_BYTES = 1 << 16
"""Smaller groups, such as schedules, markers and counters, are kept without a warning."""

_NAMED = 4
"""Most groups that a message names."""

_COMPANION_PREFIXES = (
    *(prefix for prefixes in COMPANIONS.values() for prefix in prefixes),
    # Other names of text encoders and VAEs, image encoders, and modules that add noise to their output.
    *("text_encoder.", "text_encoder_2.", "text_model.", "clip_l.", "clip_g.", "encoder.", "decoder."),
    *("quant_conv.", "post_quant_conv.", "embedder.", "noise_augmentor.", "clip_vision.", "image_encoder."),
)

_AVERAGED = re.compile(r"(^|_)(emas?|shadow_params|averaged_model)($|_)", re.IGNORECASE)
"""A component of a key, among its first two, that contains averages of weights."""

_OPTIMIZER = re.compile(
    r"^(optimizers?|optimizer_states?|optims?|lr_schedulers?|exp_avg(_sq)?|momentum_buffer)\."
    r"|\.(exp_avg|exp_avg_sq|exp_avg_sq_row|exp_avg_sq_col|max_exp_avg_sq|momentum_buffer)$"
)
"""Keys of optimizer states in any file."""

_ENDINGS_AFTER_WEIGHT = {"optimizer states": r"\.(momentum|velocity)$", "EMA weights": r"[._]ema$"}
"""Endings of keys that count only if the file also has the key without the ending."""

_LEFTOVERS = {"ControlNet": r"^(control_model|controlnet)\.", "LoRA": r"(^|[._])(lora|hada|lokr|oft|dora)[._]"}
"""Other known leftovers in files with a UNet of any kind."""

_OTHERS = "others"


@dataclass(frozen=True)
class Extra:
    """A group of tensors that no loader uses.

    Args:
        kind: what they are, for messages.
        prefix: how their keys begin.
        keys: their keys.
        nbytes: bytes of all of them.
    """

    kind: str
    prefix: str
    keys: tuple[str, ...]
    nbytes: int

    def __str__(self) -> str:
        kind = "" if self.kind == _OTHERS else f"{self.kind} "
        names = f"`{self.prefix}*`, {_count(len(self.keys))}, {size_in_words(self.nbytes)}"
        return f"{kind}({names})" if kind else f"other tensors ({names})"


def find_extras(entries: Mapping[str, Entry]) -> list[Extra]:
    """The extras of a file, the largest group first; see `Extra`.

    With a UNet of the SDXL family, extras are all tensors but the UNet's, text encoders', VAE's and small groups. With
    another UNet, extras are known leftovers only; in a plain state dict, optimizer states and averages of weights that
    are in the file too.
    """
    shapes = {key: entry.shape for key, entry in entries.items()}
    info = detect(shapes)
    others = other_unets(info, shapes) if info else []
    if info and info.prefix != CHECKPOINT_PREFIX:
        # Loaders add this prefix to the UNet's keys; a single tensor that already has it would collide.
        others.append(UNetInfo("prefixed", CHECKPOINT_PREFIX, None))
    weights = _weight_shapes(entries) if info is None else {}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key in entries:
        group = _group_of(key, entries, info, others)
        if group and (info or group[0] != "EMA weights" or _has_weight(key, entries, weights)):
            groups[group].append(key)
    extras = []
    for (kind, prefix), keys in groups.items():
        nbytes = sum(entries[key].nbytes for key in keys)
        if nbytes >= SILENT_BYTES or (info and prefix == CHECKPOINT_PREFIX):
            extras.append(Extra(kind, prefix, tuple(keys), nbytes))
    return sorted(extras, key=lambda extra: -extra.nbytes)


def split_extras(entries: Mapping[str, Entry], drop: bool) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a file to convert, and a warning about its extras if it has any.

    Args:
        entries: the tensors of a file, by name.
        drop: whether extras are left out.
    """
    extras = find_extras(entries)
    if not extras:
        return dict(entries), []
    dropped = {key for extra in extras for key in extra.keys}
    amount = f"{_count(len(dropped))} ({size_in_words(sum(extra.nbytes for extra in extras))}) that no loader uses"
    named = ", ".join(map(str, extras[:_NAMED]))
    if len(extras) > _NAMED:
        named += f", and {len(extras) - _NAMED:,} more kinds"
    if drop:
        kept = {key: entry for key, entry in entries.items() if key not in dropped}
        return kept, [f"{amount} {_is_or_are(dropped)} left out: {named}"]
    return dict(entries), [f"{amount} {_is_or_are(dropped)} kept: {named}; {DROP_HINT}"]


def recorded_extras(drop: bool, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What a file's settings record about extras: that they were dropped, if the source had some."""
    return {SETTING: True} if drop and find_extras(entries) else {}


def _group_of(
    key: str, entries: Mapping[str, Entry], info: UNetInfo | None, others: list[UNetInfo]
) -> tuple[str, str] | None:
    """Kind and prefix of the group of extras that a key belongs to; None if loaders use it."""
    root = key.partition(".")[0]
    for kind, ending in _ENDINGS_AFTER_WEIGHT.items():
        weight = re.sub(ending, "", key)
        if weight != key and weight in entries:
            return kind, f"*{key[len(weight) :]}"
    if _OPTIMIZER.search(key):
        return "optimizer states", f"{root}."
    average = _average_prefix(key)
    if info is None:
        return ("EMA weights", average) if average else None
    if is_unet_key(info, key):
        return None
    if average:
        return "EMA weights", average
    if key in MARKERS or key.startswith(_COMPANION_PREFIXES):
        return None
    for other in others:
        if is_unet_key(other, key):
            return "a second UNet", other.prefix or f"{root}."
    for kind, names in _LEFTOVERS.items():
        if re.search(names, key):
            return kind, root.partition("_")[0] if kind == "LoRA" else f"{root}."
    if info.architecture is None:
        return None
    if info.prefix and key.startswith(info.prefix):
        return _OTHERS, f"{info.prefix}{key[len(info.prefix) :].partition('.')[0]}."
    # Names without dots would each be a group of their own, so they are grouped by their first word.
    return _OTHERS, f"{root}." if "." in key else root.partition("_")[0]


def _average_prefix(key: str) -> str:
    """A key up to and including the component that marks averages of weights; empty if there is none."""
    *modules, _ = key.split(".")
    for index, module in enumerate(modules[:2]):
        if _AVERAGED.search(module):
            return ".".join(modules[: index + 1]) + "."
    return ""


def _weight_shapes(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of weights by the names that averages of them may have: without dots, with or without the first part."""
    weights = [key for key in entries if not _average_prefix(key)]
    names = ((name, entries[key].shape) for key in weights for name in (key, key.partition(".")[2]) if name)
    return {name.replace(".", ""): shape for name, shape in names}


def _has_weight(key: str, entries: Mapping[str, Entry], weights: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the file has the weight that a key's tensor is an average of."""
    prefix = _average_prefix(key)
    if not prefix:
        return True
    return weights.get(key[len(prefix) :].replace(".", "")) == entries[key].shape


def _count(tensors: int) -> str:
    return f"{tensors:,} tensor{'' if tensors == 1 else 's'}"


def _is_or_are(keys: set[str]) -> str:
    return "is" if len(keys) == 1 else "are"
