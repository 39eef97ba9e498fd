"""How a model is quantised: formats or a size, and how long to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..fitting.codebook import effort_by_name
from ..packed.formats import LEVELS, nf_format, writable_format
from ..packed.layout import BlockFormat

DEFAULT_LEVELS = 16
DEFAULT_CONV_LEVELS = 32

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

    Raises:
        ValueError: the number is not above 0 and below 2**63.
    """

    bits: float

    def __post_init__(self) -> None:
        _check_size("target_bpw", self.bits)

    def as_dict(self) -> dict[str, Any]:
        """For a header."""
        return {"target_bpw": self.bits}


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


@dataclass(frozen=True)
class Settings:
    """How a model is quantised.

    Args:
        choice: `Formats`, or a size: `BitsPerWeight` or `FileSize`.
        effort: how long to fit: "fast" or "best".
        quantize_first_last: quantise a UNet's first and last convolution too. They hold 0.001 % of SDXL's weights, and
            rounding the last one tints the whole picture.

    Raises:
        ValueError: the effort is unknown.
    """

    choice: Formats | BitsPerWeight | FileSize = Formats()
    effort: str = "fast"
    quantize_first_last: bool = False

    def __post_init__(self) -> None:
        effort_by_name(self.effort)

    def as_dict(self) -> dict[str, Any]:
        """The settings as a file's header records them."""
        return self.choice.as_dict() | {"effort": self.effort, "quantize_first_last": self.quantize_first_last}


DEFAULTS = Settings()
