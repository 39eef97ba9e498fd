"""The size–quality plot of `benchmarks.quality`'s results; by itself: `python -m benchmarks.quality.plot`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

from nfq_core.report.plots import COLOURS, check_matplotlib, png

from ..shared import RESULTS, ROOT
from .checks import PACKED, measured
from .weights import DEMO, GAUSSIAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = ROOT / "docs" / "quality.png"

WIDTH, HEIGHT, DPI = 10.5, 4.9, 110
"""Inches of a panel, and pixels for each."""

MOST_BITS = 6.8
"""What is larger is named at the right edge: ours is not there, and the rest would be crowded."""

FONT_SIZE = 10
DISTANCES = (7, 14, 24, 36)
"""How far a label may be from its point, in points of type; from the second on a line leads there."""

DIRECTIONS = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 1), (-1, 0), (0, 1), (1, 1))
"""Where a label may be, right and up; the usual places are below our curve."""

FARTHER, LESS_USUAL = 60.0, 12.0
"""What the next distance and the next direction cost, in covered pixels."""

NEARBY = 8
"""Pixels around a point that labels keep clear of."""

INK = "#333333"
OURS, CALIBRATED, GREEN, PINK, _, _, BLACK = COLOURS
FAMILIES = {
    "GGUF": (BLACK, "o"),
    "bitsandbytes": (PINK, "s"),
    "HQQ": (GREEN, "D"),
    "SDNQ": ("#7A4FA3", "^"),
    "palettisation": ("#B07800", "v"),
    "article": ("#888888", "X"),
    "torch": ("#888888", "P"),
}
"""A colour and a mark for each, so that they are told apart without the colour too."""


JOINED = {"article": "the article", "HQQ": "HQQ", "SDNQ": "SDNQ", "palettisation": "palettisation (k-means)"}
"""Families whose points are joined by a line, and its name."""


@dataclass(frozen=True)
class Panel:
    """One measure on one source."""

    source: str
    measure: str
    title: str
    axis: str


PANELS = (
    Panel(GAUSSIAN, "sqnr_db", "Gaussian weights: error of what is stored", "signal to noise, dB"),
    Panel(DEMO, "output_db", "Output of the demo UNet, captions not seen before", "signal to noise, dB"),
    Panel(DEMO, "picture_db", "Pictures of the demo model, same captions and seeds", "PSNR to fp16, dB"),
)


def curve(rows: Sequence[dict], measure: str) -> list[dict]:
    """The rows that no smaller one equals, by size."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row[PACKED], -row[measure])):
        if not best or row[measure] > best[-1][measure]:
            best.append(row)
    return best


def panels_of(rows: Sequence[dict]) -> list[tuple[Panel, list[dict]]]:
    """The panels that there are rows for; of a model that is none of PANELS', its weights."""
    sources = dict.fromkeys(row["source"] for row in rows)
    panels = [panel for panel in PANELS if panel.source in sources]
    if not panels:
        panels = [Panel(source, "sqnr_db", f"Weights of {source}", "signal to noise, dB") for source in sources]
    found = [
        (panel, measured([row for row in rows if row["source"] == panel.source], [panel.measure])) for panel in panels
    ]
    return [(panel, of_panel) for panel, of_panel in found if of_panel]


def plot(results: dict, path: Path = PLOT) -> Path:
    """Draw the results, one panel above the other, as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    panels = panels_of(results["rows"])
    figure = Figure(figsize=(WIDTH, HEIGHT * len(panels)), dpi=DPI, layout="constrained")
    drawn = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (panel, rows) in zip(drawn, panels, strict=True):
        _draw(axes, panel, rows)
    drawn[-1].set_xlabel(
        "bits per weight in memory, all overheads counted (up and left is better)", fontsize=FONT_SIZE + 1, color=INK
    )
    # Only now is it known where points lie.
    figure.draw_without_rendering()
    for axes, (panel, rows) in zip(drawn, panels, strict=True):
        _name_points(axes, panel.measure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path


def _curves(rows: Sequence[dict], measure: str) -> Iterator[tuple[str, str, list[dict]]]:
    """Name, colour and points of our curves: without calibration, and with it where there is such."""
    ours = [row for row in rows if row["ours"] and row[PACKED] <= MOST_BITS]
    for name, colour, calibrated in (("NFQ", OURS, False), ("NFQ, calibrated", CALIBRATED, True)):
        points = curve([row for row in ours if row["calibrated"] == calibrated], measure)
        if points:
            yield name, colour, points


def _draw(axes: Axes, panel: Panel, rows: Sequence[dict]) -> None:
    """Curves and points of a panel, without the peers' names."""
    measure = panel.measure
    peers = _peers(rows)
    for name, colour, points in _curves(rows, measure):
        bits, errors = [row[PACKED] for row in points], [row[measure] for row in points]
        axes.plot(bits, errors, "o-", color=colour, linewidth=2.4, markersize=4.5, zorder=3, label=name)
    for family, (colour, mark) in FAMILIES.items():
        for calibrated in (False, True):
            points = [row for row in peers if row["family"] == family and row["calibrated"] == calibrated]
            bits, errors = [row[PACKED] for row in points], [row[measure] for row in points]
            line = "-" if family in JOINED else ""
            inside = "white" if calibrated else colour
            axes.plot(bits, errors, line + mark, color=colour, markerfacecolor=inside, markersize=6.5, linewidth=0.8)
    if any(row["calibrated"] for row in peers):
        axes.plot([], [], "ko", markerfacecolor="white", label="GGUF with an importance matrix, calibrated")
    axes.set_title(panel.title, loc="left", fontsize=FONT_SIZE + 3, fontweight="bold", color=INK)
    axes.set_ylabel(panel.axis, fontsize=FONT_SIZE + 1, color=INK)
    axes.set_xlim(right=max([*(row[PACKED] for row in peers), 5.5]) + 0.25)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        colours = [handle.get_color() for handle in handles]
        axes.legend(loc="upper left", frameon=False, fontsize=FONT_SIZE + 1, labelcolor=colours)
    beyond = [row for row in rows if not row["ours"] and row[PACKED] > MOST_BITS]
    if beyond:
        text = "\n".join(f"{row['name']}: {row[PACKED]:.1f} bits, {row[measure]:.1f} dB →" for row in beyond)
        axes.text(0.995, 0.03, text, transform=axes.transAxes, ha="right", fontsize=FONT_SIZE - 1, color=INK)


def _peers(rows: Sequence[dict]) -> list[dict]:
    """The peers' rows that are drawn, by size."""
    return sorted((row for row in rows if not row["ours"] and row[PACKED] <= MOST_BITS), key=lambda row: row[PACKED])


def _names(peers: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """What is written, and beside which point of several: a joined family has one name, all others have their own.

    Calibrated rows go without: their marks are hollow, and lie above or below their own kind's.
    """
    plain = [row for row in peers if not row["calibrated"]]
    names = [(row["name"], [row]) for row in plain if row["family"] not in JOINED]
    for family, name in JOINED.items():
        points = [row for row in plain if row["family"] == family]
        if points:
            names.append((name, points))
    return names


def _name_points(axes: Axes, measure: str, rows: Sequence[dict]) -> None:
    """Put each peer's name beside its point, where it covers least of other points, names and curves."""
    from matplotlib.patheffects import withStroke

    peers = _peers(rows)

    def place(row: dict) -> tuple[float, float]:
        return tuple(axes.transData.transform((row[PACKED], row[measure])))

    taken = [(x - NEARBY, y - NEARBY, x + NEARBY, y + NEARBY) for x, y in map(place, peers)]
    for _, _, points in _curves(rows, measure):
        taken += _along([place(row) for row in points])
    for family in JOINED:
        taken += _along([place(row) for row in peers if row["family"] == family])
    unit = DPI / 72
    frame = axes.get_window_extent().extents
    for name, points in _names(peers):
        width, height = 0.6 * FONT_SIZE * len(name) * unit, 1.25 * FONT_SIZE * unit
        choices = []
        for row, (step, distance), (turn, (right, up)) in product(points, enumerate(DISTANCES), enumerate(DIRECTIONS)):
            x, y = place(row)
            left = x + right * distance * unit - (1 - right) / 2 * width
            bottom = y + up * distance * unit - (1 - up) / 2 * height
            box = left, bottom, left + width, bottom + height
            if frame[0] < box[0] and frame[1] < box[1] and box[2] < frame[2] and box[3] < frame[3]:
                cost = sum(_common(box, other) for other in taken) + FARTHER * step + LESS_USUAL * turn
                choices.append((cost, distance, right, up, box, row))
        if not choices:
            continue
        _, distance, right, up, box, row = min(choices, key=lambda choice: choice[0])
        taken.append(box)
        colour = FAMILIES[row["family"]][0]
        axes.annotate(
            name,
            (row[PACKED], row[measure]),
            (right * distance, up * distance),
            textcoords="offset points",
            ha=("right", "center", "left")[right + 1],
            va=("top", "center", "bottom")[up + 1],
            fontsize=FONT_SIZE,
            color=colour,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if distance > DISTANCES[0] else None,
        )


Box = tuple[float, float, float, float]


def _along(points: Sequence[tuple[float, float]], steps: int = 24) -> list[Box]:
    """Small boxes along a line of points."""
    boxes = []
    for (x, y), (to_x, to_y) in pairwise(points):
        for step in range(steps):
            at_x, at_y = x + (to_x - x) * step / steps, y + (to_y - y) * step / steps
            boxes.append((at_x - 3, at_y - 3, at_x + 3, at_y + 3))
    return boxes


def _common(box: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


if __name__ == "__main__":
    print(plot(json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))))
