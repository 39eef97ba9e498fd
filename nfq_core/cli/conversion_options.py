"""The options of the commands that quantise, and what they mean."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..calibration.statistics import Calibration
from ..checkpoints.memory import check_device
from ..errors import NFQError
from ..fitting.codebook import EFFORTS
from ..fitting.quantizer import FIT_DTYPE
from ..packed.formats import LEVELS, WRITABLE_IDS
from ..planning.allocation import PRESETS
from ..planning.settings import (
    DEFAULT_CONV_LEVELS,
    DEFAULT_LEVELS,
    BitsPerWeight,
    FileSize,
    Formats,
    Settings,
)
from ..sizes import UNITS, parse_size


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that set formats, effort, calibration and device."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--preset", choices=tuple(PRESETS), help=f"a size, with a format for each layer: {_presets_in_words()}"
    )
    either.add_argument(
        "--target-size",
        type=_size,
        metavar="SIZE",
        help=f"size of the whole file, such as 1.2GB, with a format for each layer; {UNITS}",
    )
    either.add_argument(
        "--target-bpw", type=_positive, metavar="X", help="packed bits per weight, with a format for each layer"
    )
    # No defaults: argparse would ignore a conflict with an option that repeats its default.
    either.add_argument("--levels", type=int, choices=LEVELS, help="levels of Linear weights (default: 16)")
    either.add_argument(
        "--format", choices=WRITABLE_IDS, metavar="ID", help=f"format of Linear weights: {', '.join(WRITABLE_IDS)}"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--conv-levels", type=int, choices=LEVELS, help="levels of convolutions (default: 32)")
    either.add_argument(
        "--conv-format", choices=WRITABLE_IDS, metavar="ID", help="format of convolutions, one of the same"
    )
    parser.add_argument("--effort", choices=tuple(EFFORTS), default="fast", help="how long to fit (default: fast)")
    parser.add_argument(
        "--quantize-first-last", action="store_true", help="quantise a UNet's outermost convolutions too"
    )
    parser.add_argument(
        "--drop-extras", action="store_true", help="omit tensors that no loader uses: EMA weights, optimizer states, …"
    )
    parser.add_argument("--calibration", metavar="F", help="statistics of layer inputs, see docs/CALIBRATION.md")
    parser.add_argument("--device", metavar="D", help="device to quantise on, such as cuda (default: cpu)")


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `convert.quantize_file` that the options set, by name.

    Raises:
        NFQError: the device is missing, the calibration cannot be read, or formats are combined with a size.
    """
    by_size = options.preset or options.target_size or options.target_bpw
    if by_size and (options.conv_levels or options.conv_format):
        raise NFQError(
            "--preset, --target-size and --target-bpw choose the formats of convolutions too; leave out "
            f"--conv-{'levels' if options.conv_levels else 'format'}"
        )
    settings = Settings(_choice(options), options.effort, options.quantize_first_last)
    if options.device is not None:
        check_device(options.device, FIT_DTYPE)
    calibration = Calibration.load(options.calibration) if options.calibration else None
    return {
        "settings": settings,
        "device": options.device,
        "calibration": calibration,
        "drop_extras": options.drop_extras,
    }


def _choice(options: argparse.Namespace) -> Formats | BitsPerWeight | FileSize:
    if options.target_size:
        return FileSize(options.target_size)
    if options.preset or options.target_bpw:
        return BitsPerWeight(PRESETS[options.preset] if options.preset else options.target_bpw)
    return Formats.of(
        options.levels or DEFAULT_LEVELS,
        options.conv_levels or DEFAULT_CONV_LEVELS,
        options.format,
        options.conv_format,
    )


def _presets_in_words() -> str:
    return ", ".join(f"{name} ({bits} packed bits per weight)" for name, bits in PRESETS.items())


def _positive(text: str) -> float:
    """A number above zero, below 2**63; a comma is a decimal point."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = math.nan
    if not 0 < number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above zero and below 2**63")
    return number


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
