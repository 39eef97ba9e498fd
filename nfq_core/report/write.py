"""Write a report: Markdown, JSON, plots and pictures in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..decibels import decibels_in_words, ratio_in_words
from ..files.atomic import prepare_folder, write_whole
from ..sizes import size_in_words
from .drift import drift_section
from .markdown import as_code, as_text, markdown_table
from .measure import label
from .plots import plots, png
from .sheet import comparison_sheet

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"

PLOT_TITLES = {
    "size": "Error against size",
    "layers": "Error of each layer",
    "roles": "Error of each kind of layer",
    "drift": "Drift over seeds",
    "pictures": "The same prompts and seeds, drawn with each file's weights",
}
"""Titles of the plots and pictures by file name without suffix, in the order of the report."""

WRITTEN = (JSON_NAME, MARKDOWN_NAME, *(f"{name}.png" for name in PLOT_TITLES))

SHEET_SIDE = 256
"""Longest side of a picture on the sheet, in pixels; smaller pictures get less."""

MEANINGS = (
    "*Bits per weight*: bytes of the quantised tensors in the file × 8 ÷ their weights; *packed*: the same in memory. "
    "*SQNR*: signal-to-quantisation-noise ratio of the weights, 10 · log10(variance ÷ mean squared error); for several "
    "layers, mean squared error ÷ variance is averaged over their weights first. 6 dB are about one bit. *PSNR* and "
    "*SSIM* compare pictures with the original's. Higher is better."
)
"""Explains the columns of the table of files."""

LATENT_PSNR = "mean over prompts of latent PSNR, dB"
"""Header of the column with the figure of `protocol`."""

WORST = 5
"""Number of layers with the largest error that are listed for each file."""


def write_report(
    folder: Path, report: Mapping[str, Any], drawn: Sequence[np.ndarray] = (), *, overwrite: bool = False
) -> None:
    """Write `report.md`, `report.json` and the plots.

    Args:
        folder: created if missing.
        report: the result of `measure.measure`, with or without that of `pictures.add_pictures`.
        drawn: pictures of the original and of each file.
        overwrite: whether to replace an earlier report, and remove plots that the new one lacks.

    Raises:
        TargetExistsError: the folder has a report and `overwrite` is false.
        NFQError: the folder cannot be written.
        ImportError: matplotlib or Pillow is missing.
    """
    prepare_folder(folder, WRITTEN, overwrite)
    images = {name: png(figure) for name, figure in plots(report).items()}
    if drawn:
        images["pictures"] = _sheet(report, drawn)
    for name in PLOT_TITLES:
        path = folder / f"{name}.png"
        if name in images:
            write_whole(path, images[name], overwrite)
        else:
            path.unlink(missing_ok=True)
    write_whole(folder / MARKDOWN_NAME, markdown(report, list(images)).encode("utf-8"), overwrite)
    write_whole(folder / JSON_NAME, as_json(report).encode("utf-8"), overwrite)


def as_json(report: Mapping[str, Any]) -> str:
    """The report as JSON."""
    return json.dumps(report, indent=2) + "\n"


def _sheet(report: Mapping[str, Any], drawn: Sequence[np.ndarray]) -> bytes:
    columns = [(f"original|{size_in_words(report['original']['bytes'])}", drawn[0])]
    for file, pictures in zip(report["files"], drawn[1:], strict=True):
        figures = file["pictures"]
        psnr = decibels_in_words(figures["psnr_db"], 1)
        name = label(file["name"]).replace("|", " ")
        columns.append((f"{name}|{size_in_words(file['file_bytes'])}|{psnr}, SSIM {figures['ssim']:.3f}", pictures))
    side = min(SHEET_SIDE, max(128, *drawn[0].shape[1:3]))
    png_bytes = BytesIO()
    comparison_sheet(report["pictures"]["prompts"], columns, side=side).save(png_bytes, "PNG", optimize=True)
    return png_bytes.getvalue()


def markdown(report: Mapping[str, Any], images: Sequence[str]) -> str:
    """The report as Markdown, ready for a model card.

    Args:
        report: see `write_report`.
        images: names from PLOT_TITLES that are PNG files in the report's folder.
    """
    original, files = report["original"], report["files"]
    parts = [
        f"## Error against the original: {as_text(label(original['name']))}",
        f"Measured with `nfq report` of ComfyUI-NFQ {report['version']} against {as_code(original['name'])} "
        f"({size_in_words(original['bytes'])}, SHA-256 `{original['sha256'][:16]}…`).",
        _files_table(report),
        MEANINGS,
        *(f"{as_code(file['name'])} was {as_text(file['note'])}." for file in files if file["note"]),
        *_image("size", images),
        "### By kind of layer",
        _roles_table(files),
        *_image("roles", images),
        "### By layer",
        *_image("layers", images),
        f"The {WORST} layers with the largest error of each file:",
        _worst_table(files),
    ]
    if "pictures" in report:
        parts += ["### Pictures", *_image("pictures", images), _how_drawn(report), _pictures_table(report)]
    if "protocol" in report:
        parts += ["### Latents after one step", _about_protocol(report)]
    if "drift" in report:
        parts += ["### Drift over seeds", *_image("drift", images), drift_section(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _files_table(report: Mapping[str, Any]) -> str:
    """A table of every file's size and errors."""
    header = ["file", "size", "of the original", "bits per weight", "packed bits", "SQNR, dB"]
    header += ["PSNR, dB", "SSIM"] if "pictures" in report else []
    header += [LATENT_PSNR] if "protocol" in report else []
    rows = []
    for file in report["files"]:
        row = [as_code(file["name"]), size_in_words(file["file_bytes"])]
        row.append(f"{file['file_bytes'] / report['original']['bytes']:.0%}")
        row += [f"{file['bits_per_weight']:.2f}", f"{file['packed_bits_per_weight']:.2f}"]
        row.append(ratio_in_words(file["sqnr_db"]))
        if "pictures" in report:
            row += [ratio_in_words(file["pictures"]["psnr_db"]), f"{file['pictures']['ssim']:.4f}"]
        if "protocol" in report:
            row.append(ratio_in_words(file["latents"]["mean_psnr_db"], 1))
        rows.append(row)
    return markdown_table(header, rows)


def _image(name: str, images: Sequence[str]) -> list[str]:
    return [f"![{PLOT_TITLES[name]}]({name}.png)"] if name in images else []


def _roles_table(files: Sequence[Mapping[str, Any]]) -> str:
    roles = {row["role"]: row["layers"] for file in reversed(files) for row in file["roles"]}
    order = list(dict.fromkeys(row["role"] for file in files for row in file["roles"]))
    by_role = [{row["role"]: row for row in file["roles"]} for file in files]
    rows = []
    for role in order:
        cells = [
            f"{ratio_in_words(rows_of[role]['sqnr_db'])} ({rows_of[role]['bits_per_weight']:.2f})"
            if role in rows_of
            else "–"
            for rows_of in by_role
        ]
        rows.append([role, str(roles[role]), *cells])
    return markdown_table(["dB (bits per weight)", "layers", *(as_text(label(file["name"])) for file in files)], rows)


def _worst_table(files: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for file in files:
        known = [layer for layer in file["layers"] if layer["sqnr_db"] is not None]
        for layer in sorted(known, key=lambda layer: layer["sqnr_db"])[:WORST]:
            row = [as_text(label(file["name"])), as_code(layer["name"]), layer["role"], f"`{layer['format']}`"]
            rows.append([*row, ratio_in_words(layer["sqnr_db"])])
    return markdown_table(["file", "layer", "kind", "format", "SQNR, dB"], rows)


def _how_drawn(report: Mapping[str, Any]) -> str:
    facts = report["pictures"]
    return (
        f"{facts['width']} × {facts['height']} pixels, {facts['steps']} steps, guidance {facts['guidance']:g}, seeds "
        f"from {facts['seed']} on, on {facts['device']}."
    )


def _pictures_table(report: Mapping[str, Any]) -> str:
    files = report["files"]
    rows = []
    for number, prompt in enumerate(report["pictures"]["prompts"]):
        each = [file["pictures"]["each"][number] for file in files]
        cells = [f"{ratio_in_words(one['psnr_db'], 1)}, {one['ssim']:.3f}" for one in each]
        rows.append([as_text(prompt), *cells])
    return markdown_table(["PSNR in dB, SSIM", *(as_text(label(file["name"])) for file in files)], rows)


def _about_protocol(report: Mapping[str, Any]) -> str:
    facts, bits = report["protocol"], []
    for file in report["files"]:
        bits.append(
            [
                as_code(file["name"]),
                f"{file['unet_bits_per_weight']:.2f}",
                ratio_in_words(file["latents"]["mean_psnr_db"], 1),
            ]
        )
    return (
        f"Measured as Apple did for palettised SDXL models: {len(facts['prompts'])} prompts, {facts['steps']} step, "
        f"{facts['width']} × {facts['height']}, 20 · log10(largest magnitude ÷ root of the mean squared error) of the "
        "latents, then their mean in dB over the prompts. The prompts differ from Apple's. Apple's bits count codes "
        "only; here they count all bytes of the UNet's tensors, kept ones included.\n\n"
        + markdown_table(["file", "bits per weight of the whole UNet", LATENT_PSNR], bits)
    )
