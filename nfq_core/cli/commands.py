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
from ..checkpoints.batch import batch_lines, convert_folders
from ..checkpoints.memory import is_out_of_memory
from ..checkpoints.targets import PLAIN_SUFFIX, container_name, dense_name, model_name, target_path
from ..errors import DEBUG, NFQError, internal_fault, printable, reason_of
from ..files.container import SUFFIX
from ..packed import backends
from ..version import __version__
from .conversion_options import add_conversion_options, conversion
from .report_commands import add_card_command, add_report_command
from .terminal import Run, decibels, progress_bar, show

log = logging.getLogger("nfq")

CONTAINER = "an .nfq.safetensors file"

NEW_CONTAINER = "the .nfq.safetensors file to write, or a folder"

NEW_PLAIN = "the .safetensors file to write, or a folder"

OUTPUT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for bad input (one line on stderr), 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="nfq: warning: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options)
    except (NFQError, ImportError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; no unfinished file is left"
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left must not fail again at exit.
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
    print(f"nfq: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nfq", description="Make SDXL models small in the NF block format.")
    parser.add_argument("--version", action="version", version=f"nfq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Run, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", _demo, "quantise and sample the bundled tiny model at the article's five levels")
    sub.add_argument("--out", default="nfq-demo", metavar="DIR", help="where the pictures go (default: %(default)s)")
    sub.add_argument("--force", action="store_true", help="overwrite what an earlier demo left in DIR")

    sub = command("quantize", _quantize, "convert a safetensors UNet, checkpoint or state dict to .nfq.safetensors")
    sub.add_argument("source", metavar="SRC", help="a .safetensors file")
    sub.add_argument("target", metavar="DST", nargs="?", help=f"{NEW_CONTAINER} (default: SRC's, with the settings)")
    add_conversion_options(sub)
    sub.add_argument("--force", action="store_true", help="overwrite DST")

    sub = command("batch", _batch, "convert every SDXL-type model in some folders, those not converted yet")
    sub.add_argument("folders", nargs="+", metavar="DIR", help="a folder, with all its subfolders, or a file")
    sub.add_argument("--out", required=True, metavar="DIR", help="where the .nfq.safetensors files go")
    sub.add_argument("--any", action="store_true", help="convert LoRAs, VAEs and all other safetensors files too")
    add_conversion_options(sub)
    sub.add_argument("--dry-run", action="store_true", help="tell what would be done, and do nothing")
    sub.add_argument("--rehash", action="store_true", help="tell by SHA-256 alone whether a file is converted already")
    sub.add_argument("--force", action="store_true", help="overwrite files that were made from others, or otherwise")

    sub = command("calibrate-demo", _calibrate_demo, "collect a calibration of the demo model while it is sampled")
    sub.add_argument("target", metavar="DST", help=NEW_PLAIN)
    sub.add_argument("--prompts", type=int, default=32, metavar="N", help="captions to sample (default: 32)")
    sub.add_argument("--no-sensitivities", action="store_true", help="leave out what sizes need, half of the time")
    sub.add_argument("--force", action="store_true", help="overwrite DST")

    sub = command("merge-calibrations", _merge_calibrations, "make one calibration of several of one architecture")
    sub.add_argument("sources", nargs="+", metavar="F", help="calibrations; each layer's count by the inputs they saw")
    sub.add_argument("target", metavar="DST", help=NEW_PLAIN)
    sub.add_argument("--force", action="store_true", help="overwrite DST")

    sub = command("info", _info, "tell what an .nfq.safetensors file is")
    sub.add_argument("file", metavar="F", help=CONTAINER)

    command("backends", _backends, "tell which code decodes on each device of this machine, and why")

    sub = command("verify", _verify, "check every checksum and bound of an .nfq.safetensors file")
    sub.add_argument("file", metavar="F", help=CONTAINER)

    sub = command("compare", _compare, "measure how far an .nfq.safetensors file is from its original")
    sub.add_argument("original", metavar="ORIGINAL", help="the safetensors file that F was made from")
    sub.add_argument("file", metavar="F", help=CONTAINER)

    add_report_command(command)
    add_card_command(command)

    sub = command("dequantize", _dequantize, "turn an .nfq.safetensors file back into plain safetensors")
    sub.add_argument("file", metavar="F", help=CONTAINER)
    sub.add_argument("target", metavar="DST", nargs="?", help=f"{NEW_PLAIN} (default: F's, with the dtype)")
    sub.add_argument("--dtype", choices=tuple(OUTPUT_DTYPES), help="dtype of quantised tensors (default: as recorded)")
    sub.add_argument("--force", action="store_true", help="overwrite DST")

    sub = command("import-article", _import, "make an .nfq.safetensors file of one that the article's code wrote")
    sub.add_argument("file", metavar="F", help="a file that the article's code wrote")
    sub.add_argument("target", metavar="DST", help=NEW_CONTAINER)
    sub.add_argument("--force", action="store_true", help="overwrite DST")
    return parser


def _quantize(options: argparse.Namespace) -> int:
    arguments = conversion(options)
    name = container_name(options.source, arguments["settings"])
    options.target = target_path(options.target, options.source, name)
    with progress_bar("quantising", options) as progress:
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
    show(options, report, "\n".join(batch_lines(report)))
    if report["stopped"]:
        raise NFQError(f"{report['stopped']}; the same command goes on where it stopped")
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
        f"{options.target}: {result['tensors']} tensors, {result['file_bytes']:,} bytes, {result['seconds']:.1f} s",
    )


def _info(options: argparse.Namespace) -> int:
    info = examine.file_info(options.file)
    return show(options, info, "\n".join(f"{name:14}{text}" for name, text in examine.info_lines(options.file, info)))


def _backends(options: argparse.Namespace) -> int:
    found = backends.available()
    facts = {device: {"backend": backend.name, "reason": backend.reason} for device, backend in found.items()}
    lines = [f"{device:<8} {backend.name:<7} {backend.reason}" for device, backend in found.items()]
    return show(options, facts, "\n".join(lines))


def _verify(options: argparse.Namespace) -> int:
    with progress_bar("verifying", options) as progress:
        result = examine.verify_file(options.file, progress=progress)
    show(options, result, f"{options.file}: all {result['tensors']} tensors are sound" if result["ok"] else "")
    if not result["ok"]:
        more = len(result["errors"]) - 1
        raise NFQError(result["errors"][0] + (f" (and {more} more tensors, --json lists them)" if more else ""))
    return 0


def _compare(options: argparse.Namespace) -> int:
    with progress_bar("comparing", options) as progress:
        result = examine.compare_files(options.original, options.file, progress=progress)
    names = [printable(layer["name"], examine.MAX_LINE) for layer in result["layers"]]
    width = max(map(len, names), default=0)
    lines = [
        f"{name:{width}}  {layer['format']:12}  {layer['bits_per_weight']:6.3f} bits  {decibels(layer['sqnr_db'])}"
        for name, layer in zip(names, result["layers"], strict=True)
    ]
    lines.append(f"mean over {len(result['layers'])} layers, by weights: {decibels(result['sqnr_db'])}")
    return show(options, result, "\n".join(lines))


def _demo(options: argparse.Namespace) -> int:
    from ..demo.run import run_demo

    with progress_bar("demo", options, "model") as progress:
        report = run_demo(options.out, overwrite=options.force, progress=progress)
    lines = ["levels  bits/weight  file bytes  SQNR dB  picture PSNR dB"]
    for row in report["levels"]:
        figures = f"{row['levels']:6}  {row['bits_per_weight']:11.3f}  {row['file_bytes']:10,}  {row['sqnr_db']:7.2f}"
        lines.append(f"{figures}  {decibels(row['psnr_db']):>15}")
    lines.append(f"pictures: {report['comparison']}")
    return show(options, report, "\n".join(lines))


def _calibrate_demo(options: argparse.Namespace) -> int:
    from ..demo.calibrate import calibrate_demo
    from ..demo.shapes import SCENE_COUNT

    if not 1 <= options.prompts <= SCENE_COUNT:
        raise NFQError(f"--prompts must be from 1 to {SCENE_COUNT:,}, all captions there are, got {options.prompts}")
    options.target = target_path(options.target, "", f"demo{CALIBRATION_SUFFIX}", PLAIN_SUFFIX)
    with progress_bar("calibrating", options, "caption") as progress:
        result = calibrate_demo(
            options.target,
            options.prompts,
            sensitivities=not options.no_sensitivities,
            overwrite=options.force,
            progress=progress,
        )
    text = "{target}: {weights} weights, {prompts} captions, {file_bytes:,} bytes in {seconds:.1f} s".format(**result)
    return show(options, result, text)


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
    text = f"{options.target}: {result['weights']} weights, {prompts} prompts, {result['file_bytes']:,} bytes"
    return show(options, result, text)


def _show_conversion(options: argparse.Namespace, result: dict) -> int:
    return show(
        options,
        {"target": str(options.target)} | result,
        f"{options.target}: {result['quantized']} tensors quantised, {result['kept']} kept, "
        f"{result['original_bytes']:,} → {result['file_bytes']:,} bytes in {result['seconds']:.1f} s",
    )
