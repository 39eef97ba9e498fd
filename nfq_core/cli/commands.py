"""The command `nfq`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

import torch

from ..calibration.merging import merge_calibrations
from ..calibration.statistics import CALIBRATION_SUFFIX, Calibration
from ..checkpoints import convert, examine
from ..checkpoints.article_import import import_article
from ..checkpoints.batch import convert_folders
from ..checkpoints.dry_run import forecast_file, forecast_lines
from ..checkpoints.memory import is_out_of_memory
from ..checkpoints.targets import OUTPUT_NAMES, PLAIN_SUFFIX, container_name, dense_name, model_name, target_path
from ..decibels import decibels_in_words
from ..errors import DEBUG, NFQError, command, internal_fault, printable, reason_of
from ..files.container import SUFFIX
from ..fitting.backends import search_backend
from ..packed import backends
from ..planning.allocation import MAX_TRIES
from ..planning.settings import FileSize
from ..sizes import duration_in_words, size_in_words
from ..version import __version__
from .calibrate_command import add_calibrate_command, add_calibrate_option, calibrate_first, refuse_unused
from .conversion_options import add_conversion_options, conversion
from .outcomes import batch_lines, calibration_text, comparison_lines, conversion_text, next_step
from .parsing import Parser
from .report_commands import add_card_command, add_report_command
from .terminal import Run, in_options, progress_bar, show

log = logging.getLogger("nfq")

CONTAINER = "an .nfq.safetensors file"

MODEL = "a .safetensors file, or the *.index.json or the folder of a sharded model"

NEW_CONTAINER = "the .nfq.safetensors file to write, or a folder for it"

NEW_PLAIN = "the .safetensors file to write, or a folder for it"

OUTPUT_DTYPES = {name: dtype for dtype, name in OUTPUT_NAMES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 for success, 1 for bad input (one line on stderr), 2 for wrong usage.

    Args:
        arguments: the command's arguments; by default those of the process. Without any, the help is printed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments or ["--help"])
    logging.basicConfig(format="nfq: warning: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options)
    except (NFQError, ImportError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; no unfinished file is left"
    except BrokenPipeError:
        # The reader of the output closed it, as `head` does; buffered output must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = f"{error.filename or 'the file'}: {reason_of(error)}"
    except Exception as error:
        if not is_out_of_memory(error):
            if os.environ.get(DEBUG):
                raise
            message = internal_fault(error)
        else:
            message = "out of memory; no unfinished file is left"
    print(f"nfq: {printable(in_options(' '.join(message.split())))}", file=sys.stderr)
    return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> Parser:
    parser = Parser(
        prog="nfq",
        description="Quantise SDXL models to small NFQ files.",
        epilog=f"To begin: {command('quantize model.safetensors')}. Options of a command: {command('COMMAND --help')}.",
    )
    parser.add_argument("--version", action="version", version=f"nfq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parser.commands = commands.choices

    def add(name: str, run: Run, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print only the result, as JSON, on standard output")
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = add("demo", _demo, "quantise the bundled tiny model to five sizes and draw the same pictures with each")
    sub.add_argument("--out", default="nfq-demo", metavar="DIR", help="folder for the results (default: %(default)s)")
    sub.add_argument("--force", action="store_true", help="replace the results of an earlier demo in DIR")

    sub = add("quantize", _quantize, "convert a safetensors checkpoint, UNet or text encoder to .nfq.safetensors")
    sub.add_argument("source", metavar="SRC", help=f"the model: {MODEL}")
    sub.add_argument(
        "target",
        metavar="DST",
        nargs="?",
        help=f"{NEW_CONTAINER} (default: next to SRC, named after SRC and the settings)",
    )
    add_conversion_options(sub)
    add_calibrate_option(sub)
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print how many layers get which format, the expected size and time, and the error where it can be "
        "predicted; write nothing",
    )
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")

    sub = add("batch", _batch, "convert all SDXL-type models in folders, except those that are converted already")
    sub.add_argument("folders", nargs="+", metavar="DIR", help="a folder to search, with its subfolders, or a file")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for the .nfq.safetensors files")
    sub.add_argument("--any", action="store_true", help="also convert models of other families, and text encoders")
    add_conversion_options(sub)
    sub.add_argument("--dry-run", action="store_true", help="list what would be done, and write nothing")
    sub.add_argument(
        "--rehash",
        action="store_true",
        help="recognise converted files by the SHA-256 of their source, not by its name, size and time",
    )
    sub.add_argument(
        "--force", action="store_true", help="replace results that were made from other files or with other settings"
    )

    add_calibrate_command(add)

    sub = add("calibrate-demo", _calibrate_demo, "sample the bundled demo model and write a calibration of it")
    sub.add_argument("target", metavar="DST", help=NEW_PLAIN)
    sub.add_argument("--prompts", type=int, default=32, metavar="N", help="number of captions to sample (default: 32)")
    sub.add_argument(
        "--no-sensitivities",
        action="store_true",
        help="do not measure sensitivities, which choosing formats by size uses; takes half the time",
    )
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")

    sub = add("merge-calibrations", _merge_calibrations, "merge several calibrations of one architecture into one file")
    sub.add_argument(
        "sources", nargs="+", metavar="F", help="calibration files, weighted by the number of inputs that each saw"
    )
    sub.add_argument("target", metavar="DST", help=NEW_PLAIN)
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")

    sub = add("info", _info, "show what an .nfq.safetensors file contains and how it was made")
    sub.add_argument("file", metavar="F", help=CONTAINER)

    add("backends", _backends, "show which decoder and which trellis search this machine uses, and why")

    sub = add("verify", _verify, "check every checksum and bound of an .nfq.safetensors file")
    sub.add_argument("file", metavar="F", help=CONTAINER)

    sub = add("compare", _compare, "measure the error of an .nfq.safetensors file against its original")
    sub.add_argument("original", metavar="ORIGINAL", help=f"the model that F was made from: {MODEL}")
    sub.add_argument("file", metavar="F", help=CONTAINER)
    sub.add_argument("--all", action="store_true", help="list every layer, not only the ten with the largest errors")

    add_report_command(add)
    add_card_command(add)

    sub = add("dequantize", _dequantize, "convert an .nfq.safetensors file back to plain safetensors")
    sub.add_argument("file", metavar="F", help=CONTAINER)
    sub.add_argument(
        "target", metavar="DST", nargs="?", help=f"{NEW_PLAIN} (default: next to F, named after F and the dtype)"
    )
    sub.add_argument(
        "--dtype",
        choices=tuple(OUTPUT_DTYPES),
        help="dtype of the dequantised tensors (default: their dtype in the original)",
    )
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")

    sub = add("import-article", _import, "convert a file written by the article's code to .nfq.safetensors")
    sub.add_argument("file", metavar="F", help="a file written by the article's code")
    sub.add_argument("target", metavar="DST", help=NEW_CONTAINER)
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")
    return parser


def _quantize(options: argparse.Namespace) -> int:
    arguments = conversion(options)
    name = container_name(options.source, arguments["settings"])
    options.target = target_path(options.target, options.source, name)
    refuse_unused(options)
    if options.calibrate:
        arguments["calibration"] = calibrate_first(options)
    if options.dry_run:
        with progress_bar("sampling", options) as progress:
            result = forecast_file(options.source, options.target, **arguments, progress=progress)
        for warning in result["warnings"]:
            log.warning("%s: %s", options.source, warning)
        return show(options, result, "\n".join(forecast_lines(result)))
    passes = MAX_TRIES + 1 if isinstance(arguments["settings"].choice, FileSize) else 1
    with progress_bar("quantising", options, passes) as progress:
        result = convert.quantize_file(
            options.source, options.target, **arguments, overwrite=options.force, progress=progress
        )
    return _show_conversion(options, result)


def _batch(options: argparse.Namespace) -> int:
    with progress_bar("converting", options) as progress:
        report = convert_folders(
            options.folders,
            options.out,
            **conversion(options),
            any_kind=options.any,
            overwrite=options.force,
            rehash=options.rehash,
            dry_run=options.dry_run,
            progress=progress,
        )
    for row in report["files"]:
        row["reason"] = in_options(row["reason"])
    show(options, report, "\n".join(batch_lines(report)))
    if report["stopped"]:
        raise NFQError(f"{report['stopped']}; run the same command again to continue")
    failed = report["totals"]["failed"]
    if failed:
        raise NFQError(f"{failed} of {len(report['files'])} files failed, see above")
    return 0


def _import(options: argparse.Namespace) -> int:
    options.target = target_path(options.target, options.file, f"{model_name(options.file)[0]}{SUFFIX}")
    with progress_bar("importing", options) as progress:
        result = import_article(options.file, options.target, overwrite=options.force, progress=progress)
    return _show_conversion(options, result)


def _dequantize(options: argparse.Namespace) -> int:
    dtype = OUTPUT_DTYPES[options.dtype] if options.dtype else None
    name = dense_name(options.file, options.dtype)
    options.target = target_path(options.target, options.file, name, PLAIN_SUFFIX)
    with progress_bar("dequantising", options) as progress:
        result = convert.dequantize_file(
            options.file, options.target, dtype, overwrite=options.force, progress=progress
        )
    return show(
        options,
        {"target": str(options.target)} | result,
        f"{options.target}: {result['tensors']} tensors, {size_in_words(result['file_bytes'])}, in "
        f"{duration_in_words(result['seconds'])}"
        + (f"\n{step}" if (step := next_step(options.file, options.target)) else ""),
    )


def _info(options: argparse.Namespace) -> int:
    info = examine.file_info(options.file)
    return show(options, info, "\n".join(f"{name:13} {text}" for name, text in examine.info_lines(options.file, info)))


def _backends(options: argparse.Namespace) -> int:
    available = backends.available()
    facts = {device: {"backend": backend.name, "reason": backend.reason} for device, backend in available.items()}
    lines = [f"{device:<8} {backend.name:<7} {backend.reason}" for device, backend in available.items()]
    name, reason = search_backend(torch.device("cpu"))
    facts["trellis search"] = {"backend": name, "reason": reason}
    lines.append(f"trellis search on cpu: {name}, {reason}")
    return show(options, facts, "\n".join(lines))


def _verify(options: argparse.Namespace) -> int:
    with progress_bar("verifying", options) as progress:
        result = examine.verify_file(options.file, progress=progress)
    show(options, result, f"{options.file}: all {result['tensors']} tensors are intact" if result["ok"] else "")
    if not result["ok"]:
        more = len(result["errors"]) - 1
        raise NFQError(result["errors"][0] + (f" (and {more} more tensors, --json lists them)" if more else ""))
    return 0


def _compare(options: argparse.Namespace) -> int:
    with progress_bar("comparing", options) as progress:
        result = examine.compare_files(options.original, options.file, progress=progress)
    return show(options, result, "\n".join(comparison_lines(options.file, result, options.all)))


def _demo(options: argparse.Namespace) -> int:
    from ..demo.run import run_demo

    with progress_bar("demo", options) as progress:
        report = run_demo(options.out, overwrite=options.force, progress=progress)
    original = size_in_words(report["original_bytes"])
    lines = [f"levels  bits/weight  {f'file, of {original}':>16}  SQNR dB  picture PSNR dB"]
    for row in report["levels"]:
        size = f"{size_in_words(row['file_bytes'])}, {row['file_bytes'] / report['original_bytes']:.0%}"
        figures = f"{row['levels']:6}  {row['bits_per_weight']:11.3f}  {size:>16}  {row['sqnr_db']:7.2f}"
        lines.append(f"{figures}  {decibels_in_words(row['psnr_db']):>15}")
    lines.append(f"next: open {report['comparison']}; {command('quantize model.safetensors')} converts your own model")
    return show(options, report, "\n".join(lines))


def _calibrate_demo(options: argparse.Namespace) -> int:
    from ..demo.calibrate import calibrate_demo
    from ..demo.shapes import SCENE_COUNT

    if not 1 <= options.prompts <= SCENE_COUNT:
        raise NFQError(f"--prompts must be from 1 to {SCENE_COUNT:,} (all captions), got {options.prompts}")
    options.target = target_path(options.target, "", f"demo{CALIBRATION_SUFFIX}", PLAIN_SUFFIX)
    with progress_bar("calibrating", options) as progress:
        result = calibrate_demo(
            options.target,
            options.prompts,
            sensitivities=not options.no_sensitivities,
            overwrite=options.force,
            progress=progress,
        )
    return show(options, result, calibration_text(result, "captions"))


def _merge_calibrations(options: argparse.Namespace) -> int:
    options.target = target_path(options.target, "", f"merged{CALIBRATION_SUFFIX}", PLAIN_SUFFIX)
    calibration, warnings = merge_calibrations([Calibration.load(path) for path in options.sources])
    for warning in warnings:
        log.warning("%s", warning)
    result = {
        "target": str(options.target),
        "weights": len(calibration.inputs),
        "prompts": calibration.prompts,
        "file_bytes": calibration.save(options.target, overwrite=options.force),
        "warnings": warnings,
    }
    prompts = "an unknown number of" if calibration.prompts is None else f"{calibration.prompts:,}"
    text = f"{options.target}: {result['weights']} weights, {prompts} prompts, {size_in_words(result['file_bytes'])}"
    return show(options, result, text)


def _show_conversion(options: argparse.Namespace, result: dict) -> int:
    return show(options, {"target": str(options.target)} | result, conversion_text(options.target, result))
