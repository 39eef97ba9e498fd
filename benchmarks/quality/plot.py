"""The size–quality plot of `benchmarks.quality`'s results: `python -m benchmarks.quality.plot`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

from nfq_core.report.plots import COLOURS, check_matplotlib, png

from ..shared import RESULTS, ROOT, argument_parser
from .checks import PACKED, measured
from .weights import DEMO, GAUSSIAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = ROOT / "docs" / "quality.png"
WIDTH, HEIGHT, DPI, FONT_SIZE = 10.5, 4.9, 110, 10  # Inches of a panel, pixels per inch, points of type
MOST_BITS = 6.8  # Larger peers are listed at the right edge: the axis would be too long
# Distances of a label from its point, in points of type; from the second on, a line joins the two.
DISTANCES = (7, 14, 24, 36)
# Directions of a label, right and up, best first.
DIRECTIONS = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 1), (-1, 0), (0, 1), (1, 1))
FARTHER, LESS_USUAL = 60.0, 12.0  # Cost of the next distance and of the next direction, in covered pixels
NEARBY = 8  # Pixels around a point that labels keep clear of
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
"""Colour and marker of each family."""

# Families whose points are joined by a line, and the line's name.
JOINED = {"article": "the article", "HQQ": "HQQ", "SDNQ": "SDNQ", "palettisation": "palettisation (k-means)"}

PANELS = (
    (GAUSSIAN, "sqnr_db", "Gaussian weights: error of what is stored", "signal to noise, dB"),
    (DEMO, "output_db", "Output of the demo UNet, captions not seen before", "signal to noise, dB"),
    (DEMO, "picture_db", "Pictures of the demo model, same captions and seeds", "PSNR to fp16, dB"),
)
"""Source, figure, title and label of the vertical axis."""

Box = tuple[float, float, float, float]


def curve(rows: Sequence[dict], measure: str) -> list[dict]:
    """The rows that are better than every smaller one, by size."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row[PACKED], -row[measure])):
        if not best or row[measure] > best[-1][measure]:
            best.append(row)
    return best


def plot(results: dict, path: Path = PLOT) -> Path:
    """Draw the results as a PNG, one panel above the other; ImportError if matplotlib is missing."""
    check_matplotlib()
    from matplotlib.figure import Figure

    panels = []
    for source, measure, *words in PANELS:
        rows = measured([row for row in results["rows"] if row["source"] == source], [measure])
        peers = sorted(
            (row for row in rows if not row["ours"] and row[PACKED] <= MOST_BITS), key=lambda row: row[PACKED]
        )
        panels += [(measure, words, rows, peers)] if rows else []
    figure = Figure(figsize=(WIDTH, HEIGHT * len(panels)), dpi=DPI, layout="constrained")
    drawn = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, panel in zip(drawn, panels, strict=True):
        _draw(axes, *panel)
    words = "bits per weight in memory, all overheads counted (up and left is better)"
    drawn[-1].set_xlabel(words, fontsize=FONT_SIZE + 1, color=INK)
    # Labels need the points' final places.
    figure.draw_without_rendering()
    for axes, (measure, _, rows, peers) in zip(drawn, panels, strict=True):
        _name_points(axes, measure, rows, peers)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path


def _curves(rows: Sequence[dict], measure: str) -> Iterator[tuple[str, str, list[dict]]]:
    """Name, colour and points of our curves, without calibration and with it."""
    ours = [row for row in rows if row["ours"] and row[PACKED] <= MOST_BITS]
    for name, colour, calibrated in (("NFQ", OURS, False), ("NFQ, calibrated", CALIBRATED, True)):
        points = curve([row for row in ours if row["calibrated"] == calibrated], measure)
        if points:
            yield name, colour, points


def _draw(axes: Axes, measure: str, words: Sequence[str], rows: Sequence[dict], peers: Sequence[dict]) -> None:
    """Draw a panel's curves and points, without the peers' names."""

    def coordinates(points: Sequence[dict]) -> tuple[list[float], list[float]]:
        return [row[PACKED] for row in points], [row[measure] for row in points]

    for name, colour, points in _curves(rows, measure):
        axes.plot(*coordinates(points), "o-", color=colour, linewidth=2.4, markersize=4.5, zorder=3, label=name)
    for (family, (colour, mark)), calibrated in product(FAMILIES.items(), (False, True)):
        points = [row for row in peers if row["family"] == family and row["calibrated"] == calibrated]
        style = {"color": colour, "markerfacecolor": "white" if calibrated else colour}
        line = "-" if family in JOINED else ""
        axes.plot(*coordinates(points), line + mark, **style, markersize=6.5, linewidth=0.8)
    if any(row["calibrated"] for row in peers):
        axes.plot([], [], "ko", markerfacecolor="white", label="GGUF with an importance matrix, calibrated")
    axes.set_title(words[0], loc="left", fontsize=FONT_SIZE + 3, fontweight="bold", color=INK)
    axes.set_ylabel(words[1], fontsize=FONT_SIZE + 1, color=INK)
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


def _names(peers: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """Each label and the points that it may be next to: a joined family has one label.

    Calibrated rows have none: their markers are hollow.
    """
    plain = [row for row in peers if not row["calibrated"]]
    names = [(row["name"], [row]) for row in plain if row["family"] not in JOINED]
    families = [(name, [row for row in plain if row["family"] == family]) for family, name in JOINED.items()]
    return names + [(name, points) for name, points in families if points]


def _name_points(axes: Axes, measure: str, rows: Sequence[dict], peers: Sequence[dict]) -> None:
    """Put each label where it covers the fewest points, labels and curves."""
    from matplotlib.patheffects import withStroke

    def place(row: dict) -> tuple[float, float]:
        return tuple(axes.transData.transform((row[PACKED], row[measure])))

    taken = [(x - NEARBY, y - NEARBY, x + NEARBY, y + NEARBY) for x, y in map(place, peers)]
    lines = [points for _, _, points in _curves(rows, measure)]
    lines += [[row for row in peers if row["family"] == family] for family in JOINED]
    for points in lines:
        taken += _along([place(row) for row in points])
    unit, frame = DPI / 72, axes.get_window_extent().extents
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
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6} if distance > DISTANCES[0] else None
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
            arrowprops=line,
        )


def _along(points: Sequence[tuple[float, float]], steps: int = 24) -> list[Box]:
    """Small boxes along a line of points."""
    boxes = []
    for (x, y), (to_x, to_y) in pairwise(points):
        for share in (step / steps for step in range(steps)):
            at_x, at_y = x + (to_x - x) * share, y + (to_y - y) * share
            boxes.append((at_x - 3, at_y - 3, at_x + 3, at_y + 3))
    return boxes


def _common(box: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    print(plot(json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))))
