"""The options of the commands that quantise, and what they mean."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..calibration.statistics import Calibration
from ..checkpoints.memory import check_device
from ..fitting.codebook import EFFORTS
from ..fitting.quantizer import FIT_DTYPE
from ..packed.formats import LEVELS, WRITABLE_IDS
from ..planning.settings import (
    DEFAULT_CONV_LEVELS,
    DEFAULT_LEVELS,
    DEFAULT_PRESET,
    DEFAULTS,
    FIVE_BITS_UP_TO,
    PRESETS,
    TEXT_ENCODERS,
    Settings,
)
from ..sizes import UNITS, parse_size
from .terminal import in_options


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that set size or formats, effort, calibration and device."""
    dial = parser.add_argument_group("how large", "Give one size, or levels and formats.")
    # No defaults: a preset that repeats the default must not be combined with levels either.
    dial.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="size in packed bits per weight of the diffusion model: "
        f"{_presets_in_words()} (default: {DEFAULT_PRESET})",
    )
    dial.add_argument(
        "--target-size", type=_size, metavar="SIZE", help=f"most bytes of the whole file, such as 1.2GB; {UNITS}"
    )
    dial.add_argument(
        "--target-bpw",
        type=_positive,
        metavar="X",
        help="most packed bits per weight of the diffusion model",
    )
    either = dial.add_mutually_exclusive_group()
    either.add_argument(
        "--levels",
        type=int,
        choices=LEVELS,
        help=f"number of levels of every Linear weight, instead of a size (default: {DEFAULT_LEVELS} if only "
        "convolutions have levels or a format)",
    )
    either.add_argument(
        "--format",
        choices=WRITABLE_IDS,
        metavar="ID",
        help=f"format of Linear weights, instead of a size: {', '.join(WRITABLE_IDS)}; "
        "nf4_b64 has four levels, unlike bitsandbytes' NF4",
    )
    either = dial.add_mutually_exclusive_group()
    either.add_argument(
        "--conv-levels",
        type=int,
        choices=LEVELS,
        help=f"number of levels of every convolution, instead of a size (default: {DEFAULT_CONV_LEVELS} if only Linear "
        "weights have levels or a format)",
    )
    either.add_argument(
        "--conv-format",
        choices=WRITABLE_IDS,
        metavar="ID",
        help=f"format of convolutions, instead of a size: {', '.join(WRITABLE_IDS)}",
    )
    parser.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default=DEFAULTS.effort,
        help="how long to search: with a size, fast chooses among scalar codebooks (seconds) and best among trellis "
        "codes (minutes, closer to the original); with levels or formats, best fits levels longer (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--text-encoders",
        choices=TEXT_ENCODERS,
        help="bits per weight of text encoders, or keep them unchanged (default: 5bit for presets and --target-bpw up "
        f"to {FIVE_BITS_UP_TO} bits per weight, else 8bit)",
    )
    parser.add_argument(
        "--quantize-first-last", action="store_true", help="quantise a UNet's outermost convolutions too"
    )
    parser.add_argument(
        "--drop-extras", action="store_true", help="omit tensors that no loader uses: EMA weights, optimizer states, …"
    )
    parser.add_argument(
        "--calibration",
        metavar="F",
        help="calibration file of the model, from `nfq calibrate` or the node NFQ Calibrate: brings pictures nearer to "
        "the original's at the same size",
    )
    parser.add_argument("--device", metavar="D", help="device to quantise on, such as cuda (default: cpu)")
    parser.set_defaults(wrong_usage=parser.error)


_OPTIONS = {
    "target_bytes": "--target-size",
    "target_bpw": "--target-bpw",
    "conv_levels": "--conv-levels",
    "conv_format": "--conv-format",
}
"""Options by the names of arguments in messages of `Settings.of`."""


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `convert.quantize_file` that the options set, by name.

    Raises:
        NFQError: the device is missing, or the calibration cannot be read.
        SystemExit: options exclude each other.
    """
    try:
        settings = Settings.of(
            preset=options.preset,
            target_bpw=options.target_bpw,
            target_bytes=options.target_size,
            levels=options.levels,
            conv_levels=options.conv_levels,
            format=options.format,
            conv_format=options.conv_format,
            effort=options.effort,
            quantize_first_last=options.quantize_first_last,
            text_encoders=options.text_encoders,
        )
    except ValueError as error:
        options.wrong_usage(in_options(str(error), _OPTIONS))
    if options.device is not None:
        check_device(options.device, FIT_DTYPE)
    calibration = Calibration.load(options.calibration) if options.calibration else None
    return {
        "settings": settings,
        "device": options.device,
        "calibration": calibration,
        "drop_extras": options.drop_extras,
    }


def _presets_in_words() -> str:
    return ", ".join(f"{name} {bits}" for name, bits in PRESETS.items())


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
