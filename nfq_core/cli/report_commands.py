"""The commands `nfq report` and `nfq card`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from ..decibels import decibels_in_words
from ..demo.model import bundled_weights_path
from ..demo.painter import DemoPainter
from ..errors import NFQError
from ..files.atomic import AtomicFile, prepare_folder
from ..report.card import RECOMMENDED_BITS, card, card_facts
from ..report.drift import DRIFT, drift_in_words
from ..report.measure import by_size, measure
from ..report.pictures import Drawing, Painter, add_pictures, work
from ..report.pipeline_painter import PipelinePainter
from ..report.plots import check_matplotlib
from ..report.sheet import check_pillow
from ..report.write import MARKDOWN_NAME, WRITTEN, write_report
from ..sizes import size_in_words
from .terminal import AddCommand, progress_bar, show

DEMO = "demo"
"""Argument that means the bundled model and its pipeline."""


def add_report_command(add: AddCommand) -> None:
    """Declare `nfq report`."""
    sub = add("report", _report, "write a report, with plots, of the error of files against their original")
    sub.add_argument(
        "original",
        metavar="ORIGINAL",
        help="the model that the files were made from: a .safetensors file, the *.index.json or the folder of a "
        "sharded model, or `demo` for the bundled model",
    )
    sub.add_argument("files", metavar="FILE", nargs="+", help=".nfq.safetensors files to measure")
    sub.add_argument("--out", default="nfq-report", metavar="DIR", help="folder for the report (default: %(default)s)")
    sub.add_argument("--force", action="store_true", help="replace an earlier report in DIR")
    group = sub.add_argument_group("pictures")
    group.add_argument(
        "--pipeline",
        metavar="DIR",
        help="draw pictures with the SDXL pipeline in this diffusers folder, or `demo` for the bundled model "
        "(default: no pictures)",
    )
    group.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line (default: eight prompts)")
    group.add_argument("--steps", type=int, metavar="N", help=f"number of denoising steps (default: {Drawing.steps})")
    group.add_argument("--guidance", type=float, metavar="X", help="CFG scale (default: the pipeline's)")
    group.add_argument("--seed", type=int, metavar="N", help=f"seed of the first picture (default: {Drawing.seed})")
    group.add_argument(
        "--side", type=int, metavar="N", help="width and height of pictures, in pixels (default: the model's)"
    )
    group.add_argument("--device", metavar="D", help=f"device to draw on, such as cuda (default: {Drawing.device})")
    group.add_argument(
        "--drift",
        action="store_true",
        help=f"also measure how far pictures drift over {len(DRIFT.seeds)} seeds, as published for other quantised "
        "SDXL models: cosine of the final latents, SSIM and PSNR. It has its own prompt and settings "
        f"({DRIFT.steps} steps, CFG {DRIFT.guidance:g}, {DRIFT.sampler}, {DRIFT.side} x {DRIFT.side}), and draws "
        f"{len(DRIFT.seeds)} pictures more with the original and with each FILE",
    )
    sub.set_defaults(wrong_usage=sub.error)


def _report(options: argparse.Namespace) -> int:
    drawing = _drawing(options)
    # matplotlib itself does not start without Pillow.
    check_pillow()
    check_matplotlib()
    folder = Path(options.out)
    prepare_folder(folder, WRITTEN, options.force)
    original = bundled_weights_path() if options.original == DEMO else options.original
    files = by_size(options.files)
    painter = make_painter(options.pipeline, drawing) if drawing else None
    drift = DRIFT if options.drift else None
    if drift and not painter.has_latents:
        raise NFQError("the demo model has no latents, which --drift compares; give an SDXL pipeline's folder")
    if painter and not options.json:
        pictures, steps = work(painter, drift)
        total = f"{1 + len(files)} models, {(1 + len(files)) * steps:,} steps in all"
        print(f"nfq: drawing {pictures} pictures in {steps:,} denoising steps with each of {total}", file=sys.stderr)
    with progress_bar("comparing", options) as progress:
        report = measure(original, files, progress=progress)
    drawn = []
    if painter:
        with progress_bar("drawing", options) as progress:
            drawn = add_pictures(report, original, files, painter, drift=drift, progress=progress)
    write_report(folder, report, drawn, overwrite=options.force)
    lines = []
    for file in report["files"]:
        line = f"{file['name']}: {size_in_words(file['file_bytes'])}, {file['bits_per_weight']:.3f} bits per weight, "
        line += f"SQNR {decibels_in_words(file['sqnr_db'])}"
        if "pictures" in file:
            line += f", PSNR {decibels_in_words(file['pictures']['psnr_db'])}, SSIM {file['pictures']['ssim']:.4f}"
        if "latents" in file:
            line += f", mean over prompts of latent PSNR {decibels_in_words(file['latents']['mean_psnr_db'], 1)}"
        if "drift" in file:
            words = drift_in_words(file["drift"])
            line += f", over {len(report['drift']['seeds'])} seeds: cosine {words['cosine']}, "
            line += f"SSIM {words['ssim']}, PSNR {words['psnr_db']} dB"
        lines.append(line + (f" ({file['note']})" if file["note"] else ""))
    return show(options, report, "\n".join([*lines, f"report: {folder / MARKDOWN_NAME}"]))


def add_card_command(add: AddCommand) -> None:
    """Declare `nfq card`."""
    sub = add("card", _card, "write a model card for .nfq.safetensors files, in Markdown")
    sub.add_argument("files", metavar="FILE", nargs="+", help=".nfq.safetensors files that the card describes")
    either = sub.add_mutually_exclusive_group()
    either.add_argument("--original", metavar="F", help="the model that the files were made from: adds their errors")
    either.add_argument(
        "--report", metavar="DIR", help="folder of an `nfq report` about the files: adds their errors and plots"
    )
    sub.add_argument("--base-model", default="", metavar="ID", help="name of the base model on the Hugging Face Hub")
    sub.add_argument("--license", default="", metavar="ID", help="licence of the base model, which the files inherit")
    sub.add_argument(
        "--recommend",
        metavar="FILE",
        help=f"which of the files to recommend (default: nearest to {RECOMMENDED_BITS} packed bits per weight)",
    )
    sub.add_argument("--out", metavar="DST", help="file for the card, in UTF-8 (default: standard output)")
    sub.add_argument("--force", action="store_true", help="overwrite DST if it exists")


def _card(options: argparse.Namespace) -> int:
    # Open the target first, so that an error comes before the long measurement.
    target = nullcontext() if options.out is None else AtomicFile(options.out, options.force)
    with target as file, progress_bar("comparing", options) as progress:
        facts = card_facts(
            by_size(options.files),
            original=options.original,
            report_folder=options.report,
            recommended=options.recommend,
            base_model=options.base_model,
            license=options.license,
            progress=progress,
        )
        text = card(facts)
        if file is not None:
            file.write_at(0, text.encode("utf-8", "backslashreplace"))
            file.commit()
    if options.out is not None:
        return show(options, facts, f"card: {options.out}")
    return show(options, facts, text.rstrip("\n"), document=True)


def make_painter(pipeline: str | os.PathLike, drawing: Drawing) -> Painter:
    """Create the painter for a diffusers folder, or for the bundled demo model if `pipeline` is DEMO.

    Raises:
        NFQError: the folder has no SDXL pipeline, or the painter cannot draw this on this device.
        ImportError: diffusers or transformers is missing.
    """
    return DemoPainter(drawing) if str(pipeline) == DEMO else PipelinePainter(pipeline, drawing)


def _drawing(options: argparse.Namespace) -> Drawing | None:
    """What to draw, from the options; None without --pipeline."""
    choices = {field.name: getattr(options, field.name) for field in fields(Drawing)}
    given = {name: choice for name, choice in choices.items() if choice is not None}
    if options.pipeline is None:
        unused = [*given, *(["drift"] if options.drift else [])]
        if unused:
            options.wrong_usage(f"--{unused[0]} is for pictures, which need --pipeline")
        return None
    for name in ("steps", "side"):
        if name in given and given[name] < 1:
            raise NFQError(f"--{name} must be at least 1, got {given[name]}")
    if "guidance" in given and not math.isfinite(given["guidance"]):
        raise NFQError(f"--guidance must be a finite number, got {given['guidance']}")
    if "seed" in given and not 0 <= given["seed"] < 1 << 32:
        raise NFQError(f"--seed must be from 0 to {(1 << 32) - 1:,}, got {given['seed']}")
    if "prompts" in given:
        given["prompts"] = _prompts(given["prompts"])
    return Drawing(**given)


def _prompts(path: str | os.PathLike) -> tuple[str, ...]:
    try:
        # Windows editors may write a byte order mark, which must not become part of the first prompt.
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise NFQError(f"{path} is not a text in UTF-8") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise NFQError(f"{path} has no prompts; write one per line")
    return prompts
