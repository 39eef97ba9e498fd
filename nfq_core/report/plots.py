"""The plots of a report, all of one width, in a palette for colour-blind readers (Okabe and Ito 2008)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import missing_package
from ..models.roles import GROUPS, OTHER
from .drift import PUBLISHED
from .measure import label
from .protocol import APPLE_SDXL
from .sheet import FONTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0
"""Width of every plot, in inches."""

DPI = 150

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito without yellow, which is too pale on white."""

MARKERS = "osD^vP*"

LEGEND_LETTERS = 110
"""Letters that fit into a line of a legend."""

GREY = "#666666"

SQNR_LABEL = "weight SQNR in dB (higher is better)"

Style = tuple[str, str]
"""Colour and marker."""


def check_matplotlib() -> None:
    """Raise ImportError, with the command to install it, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_package("plots need matplotlib", "matplotlib") from error


def plots(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Plot the result of `measure.measure`, with or without that of `pictures.add_pictures`.

    Returns:
        Figures by file name without suffix: `size`, `layers`, `roles` if there is more than one role, and `drift` if
        it was measured.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib import style

    files = report["files"]
    styles = [(COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for i in range(len(files))]
    # A host or user may have changed matplotlib's style.
    with style.context(["default", {"font.family": _fonts()}]):
        drawn = {"size": _size_plot(report, styles), "layers": _layers_plot(report)}
        if len({row["role"] for file in files for row in file["roles"]}) > 1:
            drawn["roles"] = _roles_plot(report, styles)
        if "drift" in report:
            drawn["drift"] = _drift_plot(report, styles)
    return drawn


def png(figure: Figure) -> bytes:
    """A figure as a PNG file, the same bytes for the same figure."""
    buffer = BytesIO()
    with _missing_letters_ignored():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 pixels, shape (height, width, 3)."""
    with _missing_letters_ignored():
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def _missing_letters_ignored() -> Iterator[None]:
    """Suppress warnings about letters that no font has; they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")
        yield


def _fonts() -> list[str]:
    """matplotlib's own font, and this system's fonts with more scripts."""
    from matplotlib.font_manager import fontManager

    others = {font.name for font in fontManager.ttflist if os.path.basename(font.fname) in FONTS}
    return list(dict.fromkeys(["DejaVu Sans", *sorted(others)]))


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str, length: int = 48) -> str:
    """A file's name for matplotlib: not parsed as a formula, and without its beginning if it is too long."""
    text = " ".join(text.split())
    return (text if len(text) <= length else "…" + text[1 - length :]).replace("$", r"\$")


def _style_axes(axes: Axes) -> None:
    axes.grid(True, axis="both", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, entries: Sequence[tuple[str, Style]], title: str) -> None:
    """Draw a legend below the plots."""
    from matplotlib.lines import Line2D

    # The space in front keeps matplotlib from hiding names that begin with an underscore.
    names = [f" {_plain(name)}" for name, _ in entries]
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="none") for _, (colour, marker) in entries]
    columns = max(1, min(4, len(names), LEGEND_LETTERS // max(map(len, names))))
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, title=title, frameon=False)
    legend.get_title().set_fontweight("bold")


def _size_plot(report: Mapping[str, Any], styles: Sequence[Style]) -> Figure:
    """Errors against size: of the weights, and of pictures and latents if they were drawn."""
    files = report["files"]
    unit, name = (1e9, "GB") if max(file["file_bytes"] for file in files) >= 1e9 else (1e6, "MB")
    sizes = [file["file_bytes"] / unit for file in files]
    panels = [("Weights", SQNR_LABEL, f"file size in {name}", sizes, [file["sqnr_db"] for file in files])]
    if "pictures" in report:
        psnr = [file["pictures"]["psnr_db"] for file in files]
        panels.append(("Pictures", "PSNR to the original's in dB", f"file size in {name}", sizes, psnr))
    if "protocol" in report:
        bits = [file["unet_bits_per_weight"] for file in files]
        latents = [file["latents"]["mean_psnr_db"] for file in files]
        y_label, x_label = "mean over prompts of PSNR in dB", "bits per weight of the whole UNet"
        panels.append(("Latents after one step", y_label, x_label, bits, latents))
    figure = _figure(4.6 + 0.2 * (len(files) // 4))
    figure.suptitle(f"Error against size: {_plain(label(report['original']['name']))}", fontweight="bold")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, y_label, x_label, xs, ys) in zip(columns, panels, strict=True):
        _style_axes(axes)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.margins(0.12)
        for x, y, (colour, marker) in zip(xs, ys, styles, strict=True):
            if y is not None:
                axes.plot(x, y, marker, color=colour, markersize=8)
        if all(y is None for y in ys):
            axes.text(0.5, 0.5, "all equal", ha="center", va="center", transform=axes.transAxes)
    entries = [(label(file["name"]), style) for file, style in zip(files, styles, strict=True)]
    if "protocol" in report and report["protocol"]["comparable"]:
        columns[-1].plot(*zip(*APPLE_SDXL, strict=True), "x-", color=GREY, linewidth=1, markersize=6)
        entries.append(("Apple's palettisation of SDXL base (published)", (GREY, "x")))
    _legend(figure, entries, "file")
    return figure


def _layers_plot(report: Mapping[str, Any]) -> Figure:
    """The error of every layer in forward order, one panel per file."""
    files = report["files"]
    order = _layer_order(files)
    names = {name: number for number, (name, _) in enumerate(order)}
    groups = [group for group in GROUPS if any(layer["group"] == group for file in files for layer in file["layers"])]
    figure = _figure(1.4 + 2.2 * len(files))
    figure.suptitle(
        f"Error of each layer's weights (higher is better): {_plain(label(report['original']['name']))}",
        fontweight="bold",
    )
    rows = figure.subplots(len(files), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    size = 7 if len(order) > 200 else 16 if len(order) > 50 else 30
    for axes, file in zip(rows, files, strict=True):
        _style_axes(axes)
        for group in groups:
            colour, marker = _group_style(group)
            members = [layer for layer in file["layers"] if layer["group"] == group and layer["sqnr_db"] is not None]
            xs = [names[layer["common_name"]] for layer in members]
            axes.scatter(xs, [layer["sqnr_db"] for layer in members], s=size, c=colour, marker=marker, linewidths=0)
        if file["sqnr_db"] is not None:
            axes.axhline(file["sqnr_db"], color=GREY, linewidth=1, linestyle="--")
            error = f"{file['sqnr_db']:.2f} dB over all layers (dashed)"
        else:
            error = "equal to the original"
        title = f"{_plain(label(file['name']))}: {file['bits_per_weight']:.2f} bits per weight, {error}"
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(False, axis="x")
        axes.set_ylabel("SQNR in dB")
    _stage_axis(rows, [place for _, place in order])
    _legend(figure, [(group, _group_style(group)) for group in groups], "layers")
    return figure


def _group_style(group: str) -> Style:
    if group == OTHER:
        return GREY, "X"
    return COLOURS[GROUPS.index(group)], MARKERS[GROUPS.index(group)]


def _layer_order(files: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Common name and stage of every layer of any file; layers that the first file lacks come last."""
    order: dict[str, str] = {}
    for file in files:
        order |= {layer["common_name"]: layer["stage"] for layer in file["layers"]}
    return list(order.items())


def _stage_axis(rows: Sequence[Axes], stages: Sequence[str]) -> None:
    """Label the x axis by stages, if they are known; every second stage is shaded, its label one line lower."""
    bottom = rows[-1]
    bottom.set_xlim(-0.5 - 0.005 * len(stages), len(stages) - 0.5 + 0.005 * len(stages))
    bottom.set_xlabel(f"{len(stages)} quantised layers, in the order of the forward pass")
    if not any(stages):
        bottom.set_xlabel(f"{len(stages)} quantised layers, in the order of the file")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        return
    middles, texts, start = [], [], 0
    for number, (name, members) in enumerate(groupby(stages)):
        end = start + len(list(members))
        if number % 2:
            for axes in rows:
                axes.axvspan(start - 0.5, end - 0.5, color="#F2F2F2", linewidth=0, zorder=0)
        middles.append((start + end - 1) / 2)
        texts.append("\n" * (number % 2) + (name or "other"))
        start = end
    bottom.set_xticks(middles, texts)


def _roles_plot(report: Mapping[str, Any], styles: Sequence[Style]) -> Figure:
    """The error of the layers of each role together, one mark per file."""
    files = report["files"]
    roles = list(dict.fromkeys(row["role"] for file in files for row in file["roles"]))
    figure = _figure(1.6 + 0.3 * len(roles) + 0.2 * (len(files) // 4))
    figure.suptitle(f"Error of each kind of layer: {_plain(label(report['original']['name']))}", fontweight="bold")
    axes = figure.subplots()
    _style_axes(axes)
    for file, (colour, marker) in zip(files, styles, strict=True):
        known = [row for row in file["roles"] if row["sqnr_db"] is not None]
        ys = [roles.index(row["role"]) for row in known]
        axes.plot([row["sqnr_db"] for row in known], ys, marker, color=colour, markersize=7, alpha=0.9)
    counts = {row["role"]: row["layers"] for file in reversed(files) for row in file["roles"]}
    axes.set_yticks(range(len(roles)), [f"{role} ({counts[role]})" for role in roles])
    axes.set_ylim(len(roles) - 0.4, -0.6)
    axes.set(xlabel=f"{SQNR_LABEL}, all layers of a kind together", ylabel="kind of layer (how many)")
    _legend(figure, [(label(file["name"]), style) for file, style in zip(files, styles, strict=True)], "file")
    return figure


def _drift_plot(report: Mapping[str, Any], styles: Sequence[Style]) -> Figure:
    """Every seed, mean and range of each file; below them, in grey, the published figures of other formats."""
    files, facts = report["files"], report["drift"]
    published = PUBLISHED if facts["comparable"] else ()
    names = [_plain(label(file["name"]), 32) for file in files] + [f"{one.name} (published)" for one in published]
    figure = _figure(1.6 + 0.35 * len(names))
    seeds = "1 seed" if len(facts["seeds"]) == 1 else f"{len(facts['seeds'])} seeds"
    figure.suptitle(
        f"Drift over {seeds} (higher is better): {_plain(label(report['original']['name']))}", fontweight="bold"
    )
    panels = {"cosine": "cosine of final latents", "ssim": "SSIM, 3 × 3 windows", "psnr_db": "PSNR in dB"}
    columns = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, title) in zip(columns, panels.items(), strict=True):
        _style_axes(axes)
        axes.set_xlabel(title)
        axes.locator_params(axis="x", nbins=5)
        for row, (file, (colour, marker)) in enumerate(zip(files, styles, strict=True)):
            values = [one[name] for one in file["drift"]["each"] if one[name] is not None]
            if not values:
                axes.text(0.5, row, "all equal", ha="center", va="center", transform=axes.get_yaxis_transform())
                continue
            axes.plot(values, [row] * len(values), "|", color=colour, markersize=11, alpha=0.6)
            axes.plot([min(values), max(values)], [row, row], color=colour, linewidth=1)
            axes.plot(file["drift"][name]["mean"], row, marker, color=colour, markersize=8)
        for row, one in enumerate(published, len(files)):
            if spread := getattr(one, name):
                axes.plot(spread[1:], [row] * len(spread[1:]), color=GREY, linewidth=1)
                axes.plot(spread[0], row, "x", color=GREY, markersize=7)
    columns[0].set_yticks(range(len(names)), names)
    columns[0].set_ylim(len(names) - 0.5, -0.5)
    if published:
        figure.supxlabel(
            "Grey: published for SDXL fine-tunes, activations rounded too; ranges over fine-tunes, not seeds.",
            fontsize=9,
        )
    return figure
