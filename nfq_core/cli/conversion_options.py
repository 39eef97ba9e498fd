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
    """Add the options that say how weights are quantised, and where."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--preset", choices=tuple(PRESETS), help=f"instead of all formats: {_presets_in_words()}")
    either.add_argument(
        "--target-size", type=_size, metavar="SIZE", help=f"likewise: size of the file, such as 1.2GB; {UNITS}"
    )
    either.add_argument("--target-bpw", type=_positive, metavar="X", help="likewise: packed bits per weight")
    # No defaults here: argparse does not take a default that is given for given.
    either.add_argument("--levels", type=int, choices=LEVELS, help="levels of Linear weights (default: 16)")
    either.add_argument("--format", choices=WRITABLE_IDS, metavar="ID", help=f"instead: {', '.join(WRITABLE_IDS)}")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--conv-levels", type=int, choices=LEVELS, help="levels of convolutions (default: 32)")
    either.add_argument("--conv-format", choices=WRITABLE_IDS, metavar="ID", help="instead: one of the same")
    parser.add_argument("--effort", choices=tuple(EFFORTS), default="fast", help="how long to fit (default: fast)")
    parser.add_argument(
        "--quantize-first-last", action="store_true", help="quantise a UNet's outermost convolutions too"
    )
    parser.add_argument(
        "--drop-extras", action="store_true", help="leave out what no loader uses: EMA weights, optimizer states, …"
    )
    parser.add_argument("--calibration", metavar="F", help="statistics of layer inputs, see docs/CALIBRATION.md")
    parser.add_argument("--device", metavar="D", help="where to quantise, such as cuda (default: cpu)")


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Those arguments of `convert.quantize_file` that the options stand for, by name.

    Raises:
        NFQError: the device is not there, the calibration cannot be read, or formats are named beside a size.
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
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero, or too large")
    return number


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
