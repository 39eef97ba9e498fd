"""The commands `nfq report` and `nfq card`."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from ..demo.model import bundled_weights_path
from ..demo.painter import DemoPainter
from ..errors import NFQError
from ..files.atomic import AtomicFile, prepare_folder
from ..report.card import RECOMMENDED_BITS, card, card_facts
from ..report.markdown import ratio_in_words
from ..report.measure import by_size, measure
from ..report.pictures import Drawing, Painter, add_pictures
from ..report.pipeline_painter import PipelinePainter
from ..report.plots import check_matplotlib
from ..report.sheet import check_pillow
from ..report.write import MARKDOWN_NAME, WRITTEN, write_report
from ..sizes import size_in_words
from .terminal import AddCommand, progress_bar, show

DEMO = "demo"
"""Stands for the bundled model and its pipeline."""


def add_report_command(command: AddCommand) -> None:
    """Declare `nfq report`."""
    sub = command("report", _report, "report in words and plots how far files are from their original")
    sub.add_argument(
        "original", metavar="ORIGINAL", help="the safetensors file that they were made from, or demo: the bundled one"
    )
    sub.add_argument("files", metavar="FILE", nargs="+", help=".nfq.safetensors files")
    sub.add_argument("--out", default="nfq-report", metavar="DIR", help="where the report goes (default: %(default)s)")
    sub.add_argument("--force", action="store_true", help="replace what an earlier report left in DIR")
    group = sub.add_argument_group("pictures")
    group.add_argument(
        "--pipeline", metavar="DIR", help="draw with this SDXL folder of diffusers, or demo: with the demo model"
    )
    group.add_argument("--prompts", metavar="FILE", help="a text file, a prompt per line (default: eight)")
    group.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {Drawing.steps})")
    group.add_argument("--guidance", type=float, metavar="X", help="scale of CFG (default: the pipeline's)")
    group.add_argument("--seed", type=int, metavar="N", help=f"of the first picture (default: {Drawing.seed})")
    group.add_argument("--side", type=int, metavar="N", help="width and height in pixels (default: the model's)")
    group.add_argument("--device", metavar="D", help=f"where to draw, such as cuda (default: {Drawing.device})")
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
    artist = painter(options.pipeline, drawing) if drawing else None
    with progress_bar("comparing", options) as progress:
        report = measure(original, files, progress=progress)
    drawn = []
    if artist:
        with progress_bar("drawing", options, "model") as progress:
            drawn = add_pictures(report, original, files, artist, progress=progress)
    write_report(folder, report, drawn, overwrite=options.force)
    lines = []
    for file in report["files"]:
        line = f"{file['name']}: {size_in_words(file['file_bytes'])}, {file['bits_per_weight']:.3f} bits per weight, "
        line += f"SQNR {ratio_in_words(file['sqnr_db'])} dB"
        if "pictures" in file:
            line += f", PSNR {ratio_in_words(file['pictures']['psnr_db'])} dB, SSIM {file['pictures']['ssim']:.4f}"
        if "latents" in file:
            line += f", latent PSNR {ratio_in_words(file['latents']['psnr_db'], 1)} dB"
        lines.append(line + (f" ({file['note']})" if file["note"] else ""))
    return show(options, report, "\n".join([*lines, f"report: {folder / MARKDOWN_NAME}"]))


def add_card_command(command: AddCommand) -> None:
    """Declare `nfq card`."""
    sub = command("card", _card, "write a model card in Markdown")
    sub.add_argument("files", metavar="FILE", nargs="+", help=".nfq.safetensors files")
    either = sub.add_mutually_exclusive_group()
    either.add_argument("--original", metavar="F", help="the safetensors file that they were made from: adds errors")
    either.add_argument("--report", metavar="DIR", help="what `nfq report` wrote of them: adds errors and plots")
    sub.add_argument("--base-model", default="", metavar="ID", help="name of the base model on the hub")
    sub.add_argument("--license", default="", metavar="ID", help="licence of the base model, which is inherited")
    sub.add_argument(
        "--recommend", metavar="FILE", help=f"one of the files (default: nearest to {RECOMMENDED_BITS} packed bits)"
    )
    sub.add_argument("--out", metavar="DST", help="a file for the card, in UTF-8 (default: stdout)")
    sub.add_argument("--force", action="store_true", help="overwrite DST")


def _card(options: argparse.Namespace) -> int:
    # A target that cannot be written is refused before anything is measured.
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


def painter(pipeline: str | os.PathLike, drawing: Drawing) -> Painter:
    """What draws with a diffusers folder, or with the bundled demo model where `pipeline` is DEMO.

    Raises:
        NFQError: the folder holds no SDXL pipeline, or the device or a prompt is of no use to it.
        ImportError: diffusers or transformers is missing.
    """
    return DemoPainter(drawing) if str(pipeline) == DEMO else PipelinePainter(pipeline, drawing)


def _drawing(options: argparse.Namespace) -> Drawing | None:
    """What the options ask for, with --pipeline; without it they ask for no pictures."""
    choices = {field.name: getattr(options, field.name) for field in fields(Drawing)}
    given = {name: choice for name, choice in choices.items() if choice is not None}
    if options.pipeline is None:
        if given:
            options.wrong_usage(f"--{next(iter(given))} is of pictures, which need --pipeline")
        return None
    for name in ("steps", "side"):
        if name in given and given[name] < 1:
            raise NFQError(f"--{name} must be at least 1, got {given[name]}")
    if "guidance" in given and not math.isfinite(given["guidance"]):
        raise NFQError(f"--guidance must be a number, got {given['guidance']}")
    if "seed" in given and not 0 <= given["seed"] < 1 << 32:
        raise NFQError(f"--seed must be from 0 to {(1 << 32) - 1:,}, got {given['seed']}")
    if "prompts" in given:
        given["prompts"] = _prompts(given["prompts"])
    return Drawing(**given)


def _prompts(path: str | os.PathLike) -> tuple[str, ...]:
    try:
        # Windows' editors may begin a file with a byte order mark, which is no part of the first prompt.
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise NFQError(f"{path} is no text in UTF-8") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise NFQError(f"{path} holds no prompt; write one on each line")
    return prompts
