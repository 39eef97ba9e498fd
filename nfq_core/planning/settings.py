"""How a model is quantised: a size or formats, and how long to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..fitting.codebook import effort_by_name
from ..packed.formats import LEVELS, nf_format, writable_format
from ..packed.layout import BlockFormat

DEFAULT_LEVELS = 16
DEFAULT_CONV_LEVELS = 32

PRESETS = {"large": 4.9, "balanced": 4.1, "small": 3.4, "tiny": 2.8}
"""Packed bits per weight by preset."""

DEFAULT_PRESET = "balanced"

BY_LEVELS = "levels"
"""The choice next to the presets in a form, with which the form's levels count."""

TEXT_ENCODERS = ("keep", "8bit", "5bit")
"""How text encoders are stored: unchanged, or with their layers in a format of so many bits."""

TEXT_ENCODERS_SETTING = "text_encoders"
"""Name in a file's settings of how its text encoders are stored; recorded only if it has some."""

FIVE_BITS_UP_TO = PRESETS["small"]
"""Sizes in bits per weight for which text encoders have 5 bits unless a user chooses; otherwise they have 8."""

_LINEAR, _CONVOLUTION = nf_format(DEFAULT_LEVELS), nf_format(DEFAULT_CONV_LEVELS)


@dataclass(frozen=True)
class Formats:
    """One format for all Linear weights, one for all convolutions.

    Args:
        linear: format of 2-D weights.
        convolution: format of weights with three or more dimensions.
    """

    linear: BlockFormat = _LINEAR
    convolution: BlockFormat = _CONVOLUTION

    @classmethod
    def of(
        cls,
        levels: int = DEFAULT_LEVELS,
        conv_levels: int = DEFAULT_CONV_LEVELS,
        format: str | None = None,
        conv_format: str | None = None,
    ) -> Formats:
        """Formats by number of levels (32, 24, 16, 12 or 7); a format id replaces the levels next to it.

        Raises:
            ValueError: there is no such number of levels, or no such writable format.
        """
        linear, convolution = nf_format(levels), nf_format(conv_levels)
        return cls(
            linear if format is None else writable_format(format),
            convolution if conv_format is None else writable_format(conv_format),
        )

    def as_dict(self) -> dict[str, Any]:
        """For a header: `levels` where the format is a NormalFloat codebook, else `format`."""
        recorded: dict[str, Any] = {}
        for prefix, fmt in (("", self.linear), ("conv_", self.convolution)):
            if fmt.levels in LEVELS and fmt == nf_format(fmt.levels):
                recorded[f"{prefix}levels"] = fmt.levels
            else:
                recorded[f"{prefix}format"] = fmt.id
        return recorded


@dataclass(frozen=True)
class BitsPerWeight:
    """A size: packed bits per weight, at most. Each layer gets its own format, see `allocation`.

    Args:
        bits: the number.
        preset: the preset that chose the number; empty if none did.

    Raises:
        ValueError: the number is not above 0 and below 2**63.
    """

    bits: float
    preset: str = ""

    def __post_init__(self) -> None:
        _check_size("target_bpw", self.bits)

    @classmethod
    def of_preset(cls, name: str) -> BitsPerWeight:
        """The size of one of PRESETS; ValueError for any other name."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {str(name)[:20]!r}")
        return cls(PRESETS[name], name)

    def as_dict(self) -> dict[str, Any]:
        """For a header: the bits too, because a later version may give a preset another number."""
        return ({"preset": self.preset} if self.preset else {}) | {"target_bpw": self.bits}


@dataclass(frozen=True)
class FileSize:
    """A size: bytes of the whole file, at most. Each layer gets its own format, see `allocation`.

    Raises:
        ValueError: the number is not above 0 and below 2**63.
    """

    nbytes: int

    def __post_init__(self) -> None:
        _check_size("target_bytes", self.nbytes)

    def as_dict(self) -> dict[str, Any]:
        """For a header."""
        return {"target_bytes": self.nbytes}


def _check_size(name: str, value: float) -> None:
    if not 0 < value < 1 << 63:
        raise ValueError(f"{name} must be above zero and below 2**63, got {str(value)[:20]}")


_DEFAULT_SIZE = BitsPerWeight.of_preset(DEFAULT_PRESET)


@dataclass(frozen=True)
class Settings:
    """How a model is quantised.

    Args:
        choice: a size, `BitsPerWeight` or `FileSize`, or `Formats`.
        effort: "fast" or "best". With a size: whether layers get scalar codebooks or trellis formats. With formats: how
            long levels are fitted.
        quantize_first_last: quantise a UNet's first and last convolution too. They hold 0.001 % of SDXL's weights, and
            rounding the last one tints the whole picture.
        text_encoders: one of TEXT_ENCODERS; None: decided by the size, see `text_encoder_bits`.

    Raises:
        ValueError: the effort or `text_encoders` is unknown.
    """

    choice: BitsPerWeight | FileSize | Formats = _DEFAULT_SIZE
    effort: str = "fast"
    quantize_first_last: bool = False
    text_encoders: str | None = None

    def __post_init__(self) -> None:
        effort_by_name(self.effort)
        if self.text_encoders not in (None, *TEXT_ENCODERS):
            raise ValueError(
                f"text_encoders must be one of {', '.join(TEXT_ENCODERS)}, got {str(self.text_encoders)[:20]!r}"
            )

    @property
    def text_encoder_bits(self) -> str:
        """How text encoders are stored, one of TEXT_ENCODERS: 5 bits by default for small sizes, else 8."""
        if self.text_encoders is not None:
            return self.text_encoders
        is_small = isinstance(self.choice, BitsPerWeight) and self.choice.bits <= FIVE_BITS_UP_TO
        return "5bit" if is_small else "8bit"

    @classmethod
    def of(
        cls,
        *,
        preset: str | None = None,
        target_bpw: float | None = None,
        target_bytes: int | None = None,
        levels: int | None = None,
        conv_levels: int | None = None,
        format: str | None = None,
        conv_format: str | None = None,
        effort: str = "fast",
        quantize_first_last: bool = False,
        text_encoders: str | None = None,
    ) -> Settings:
        """Settings from what a user gives; without any choice, the default preset.

        Args:
            preset: one of PRESETS.
            target_bpw: most packed bits per weight.
            target_bytes: most bytes of the whole file.
            levels: see `Formats.of`, also for `conv_levels`, `format` and `conv_format`.
            effort: see `Settings`, also for `quantize_first_last` and `text_encoders`.

        Raises:
            ValueError: a value is not allowed, or two of a preset, a size and formats are given.
        """
        sizes = {"preset": preset, "target_bpw": target_bpw, "target_bytes": target_bytes}
        formats = {"levels": levels, "conv_levels": conv_levels, "format": format, "conv_format": conv_format}
        by_size = [name for name, value in sizes.items() if value is not None]
        by_format = {name: value for name, value in formats.items() if value is not None}
        if len(by_size) + bool(by_format) > 1:
            given = " and ".join([*by_size, *by_format])
            raise ValueError(
                f"a preset, target_bpw, target_bytes, and levels or formats exclude each other; got {given}"
            )
        if by_format:
            choice = Formats.of(**by_format)
        elif target_bpw is not None:
            choice = BitsPerWeight(target_bpw)
        elif target_bytes is not None:
            choice = FileSize(target_bytes)
        else:
            choice = BitsPerWeight.of_preset(DEFAULT_PRESET if preset is None else preset)
        return cls(choice, effort, quantize_first_last, text_encoders)

    @classmethod
    def given(cls, settings: Settings | None, preset: str | None) -> Settings:
        """Settings of a function that takes a preset instead; without both, the default preset.

        Raises:
            ValueError: the preset is unknown, or both are given.
        """
        if settings is None:
            return cls.of(preset=preset)
        if preset is not None:
            raise ValueError(f"give settings or a preset; for both, write Settings.of(preset={preset!r}, …)")
        if isinstance(settings, str):
            raise ValueError(f"settings must be a Settings, got {settings[:20]!r}; write preset={settings[:20]!r}")
        return settings

    @classmethod
    def from_form(
        cls,
        preset: str,
        levels: int,
        conv_levels: int,
        effort: str,
        quantize_first_last: bool = False,
        text_encoders: str | None = None,
    ) -> Settings:
        """Settings from a form that always shows every input: levels count only if `preset` is BY_LEVELS."""
        chosen = {"levels": levels, "conv_levels": conv_levels} if preset == BY_LEVELS else {"preset": preset}
        return cls.of(**chosen, effort=effort, quantize_first_last=quantize_first_last, text_encoders=text_encoders)

    def as_dict(self) -> dict[str, Any]:
        """The settings as a file's header records them; `policy.recorded_text_encoders` adds those of text encoders."""
        return self.choice.as_dict() | {"effort": self.effort, "quantize_first_last": self.quantize_first_last}


DEFAULTS = Settings()


def without_repetition(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings as `Settings.of` takes them: with a preset, or with its bits if it has others by now."""
    if not recorded.keys() >= {"preset", "target_bpw"}:
        return dict(recorded)
    is_current = (recorded["preset"], recorded["target_bpw"]) in tuple(PRESETS.items())
    return {name: value for name, value in recorded.items() if name != ("target_bpw" if is_current else "preset")}


def of_unet(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings of a whole file as those of its UNet alone."""
    return {name: value for name, value in recorded.items() if name != TEXT_ENCODERS_SETTING}
