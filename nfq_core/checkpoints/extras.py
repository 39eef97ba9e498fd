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
"""The name under which a file's settings record that extras were left out; only files that had some record it."""

DROPPING = "`--drop-extras` leaves them out"
"""How the command drops extras, at the end of a warning; the web UI's page has a check box instead."""

SILENT_BYTES = 1 << 16
"""Smaller groups are kept without a word: schedules, markers, counters."""

_NAMED = 4
"""Groups that a message names one by one."""

_COMPANIONS = (
    *(beginning for beginnings in COMPANIONS.values() for beginning in beginnings),
    # Other names of text encoders and VAEs, image encoders, and what noises their output.
    *("text_encoder.", "text_encoder_2.", "text_model.", "clip_l.", "clip_g.", "encoder.", "decoder."),
    *("quant_conv.", "post_quant_conv.", "embedder.", "noise_augmentor.", "clip_vision.", "image_encoder."),
)

_AVERAGED = re.compile(r"(^|_)(emas?|shadow_params|averaged_model)($|_)", re.IGNORECASE)
"""A component of a key, among its first two, under which averages of weights lie."""

_OPTIMIZER = re.compile(
    r"^(optimizers?|optimizer_states?|optims?|lr_schedulers?|exp_avg(_sq)?|momentum_buffer)\."
    r"|\.(exp_avg|exp_avg_sq|exp_avg_sq_row|exp_avg_sq_col|max_exp_avg_sq|momentum_buffer)$"
)
"""Keys of optimizer states, whatever else is in the file."""

_BESIDE_ITS_WEIGHT = {"optimizer states": r"\.(momentum|velocity)$", "EMA weights": r"[._]ema$"}
"""Endings of keys, which count where the key without the ending is there too."""

_LEFTOVERS = {"ControlNet": r"^(control_model|controlnet)\.", "LoRA": r"(^|[._])(lora|hada|lokr|oft|dora)[._]"}
"""Other known leftovers beside a UNet of any kind."""

_OTHERS = "others"


@dataclass(frozen=True)
class Extra:
    """A group of tensors that no loader uses: its kind in words, how its names begin, the keys and their bytes."""

    kind: str
    beginning: str
    keys: tuple[str, ...]
    nbytes: int

    def __str__(self) -> str:
        kind = "" if self.kind == _OTHERS else f"{self.kind} "
        names = f"`{self.beginning}*`, {_tensors(len(self.keys))}, {size_in_words(self.nbytes)}"
        return f"{kind}({names})" if kind else f"other tensors ({names})"


def find_extras(entries: Mapping[str, Entry]) -> list[Extra]:
    """The extras of a file, the largest group first; see `Extra`.

    Beside a UNet of the SDXL family, everything is an extra that is neither that UNet, nor a text encoder or VAE, nor
    small. Beside another UNet, only what is known to be one; in a plain state dict, only optimizer states, and
    averages whose weights are in the file.
    """
    shapes = {key: entry.shape for key, entry in entries.items()}
    info = detect(shapes)
    others = other_unets(info, shapes) if info else []
    if info and info.prefix != CHECKPOINT_PREFIX:
        # Loaders give the UNet this prefix: whatever has it already, down to one tensor, is in the way.
        others.append(UNetInfo("prefixed", CHECKPOINT_PREFIX, None))
    twins = _twins(entries) if info is None else {}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key in entries:
        found = _extra(key, entries, info, others)
        if found and (info or found[0] != "EMA weights" or _has_twin(key, entries, twins)):
            groups[found].append(key)
    extras = []
    for (kind, beginning), keys in groups.items():
        nbytes = sum(entries[key].nbytes for key in keys)
        if nbytes >= SILENT_BYTES or (info and beginning == CHECKPOINT_PREFIX):
            extras.append(Extra(kind, beginning, tuple(keys), nbytes))
    return sorted(extras, key=lambda extra: -extra.nbytes)


def split_extras(entries: Mapping[str, Entry], drop: bool) -> tuple[dict[str, Entry], list[str]]:
    """What of a file is converted, and a line about its extras, if it has any.

    Args:
        entries: the tensors of a file, by name.
        drop: whether extras are left out.
    """
    extras = find_extras(entries)
    if not extras:
        return dict(entries), []
    dropped = {key for extra in extras for key in extra.keys}
    amount = f"{_tensors(len(dropped))} ({size_in_words(sum(extra.nbytes for extra in extras))}) that no loader uses"
    named = ", ".join(map(str, extras[:_NAMED]))
    if len(extras) > _NAMED:
        named += f", and {len(extras) - _NAMED:,} more kinds"
    if drop:
        kept = {key: entry for key, entry in entries.items() if key not in dropped}
        return kept, [f"{amount} {_verb(dropped)} left out: {named}"]
    return dict(entries), [f"{amount} {_verb(dropped)} kept: {named}; {DROPPING}"]


def recorded_extras(drop: bool, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What the settings of a file record of its source's extras, when they are to be dropped or not."""
    return {SETTING: True} if drop and find_extras(entries) else {}


def _extra(
    key: str, entries: Mapping[str, Entry], info: UNetInfo | None, others: list[UNetInfo]
) -> tuple[str, str] | None:
    """The kind of an extra and how its group's names begin; None for what is needed."""
    root = key.partition(".")[0]
    for kind, ending in _BESIDE_ITS_WEIGHT.items():
        twin = re.sub(ending, "", key)
        if twin != key and twin in entries:
            return kind, f"*{key[len(twin) :]}"
    if _OPTIMIZER.search(key):
        return "optimizer states", f"{root}."
    averaged = _averaged_beginning(key)
    if info is None:
        return ("EMA weights", averaged) if averaged else None
    if is_unet_key(info, key):
        return None
    if averaged:
        return "EMA weights", averaged
    if key in MARKERS or key.startswith(_COMPANIONS):
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
    # Names without dots are many: their first word stands for a group.
    return _OTHERS, f"{root}." if "." in key else root.partition("_")[0]


def _averaged_beginning(key: str) -> str:
    """A key up to the component that says that it is an average; empty where none does."""
    *modules, _ = key.split(".")
    for index, module in enumerate(modules[:2]):
        if _AVERAGED.search(module):
            return ".".join(modules[: index + 1]) + "."
    return ""


def _twins(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes by name without dots, with and without the first component: some averages are named so."""
    live = [key for key in entries if not _averaged_beginning(key)]
    names = ((name, entries[key].shape) for key in live for name in (key, key.partition(".")[2]) if name)
    return {name.replace(".", ""): shape for name, shape in names}


def _has_twin(key: str, entries: Mapping[str, Entry], twins: Mapping[str, tuple[int, ...]]) -> bool:
    beginning = _averaged_beginning(key)
    if not beginning:
        return True
    return twins.get(key[len(beginning) :].replace(".", "")) == entries[key].shape


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'' if count == 1 else 's'}"


def _verb(keys: set[str]) -> str:
    return "is" if len(keys) == 1 else "are"
