"""The size–quality plot of `benchmarks.quality`'s results: `python -m benchmarks.quality.plot`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from nfq_core.report.plots import COLOURS, check_matplotlib, png

from ..shared import ROOT, argument_parser, read_results
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
FARTHER, LESS_USUAL = 0.3, 0.06  # Cost of the next distance and of the next direction; a covered thing costs 1
NEARBY = 8  # Pixels around a point that labels keep clear of
INK = "#333333"
OURS, CALIBRATED, GREEN, PINK, _, _, BLACK = COLOURS
# Colour and marker of each family.
FAMILIES = {
    "GGUF": (BLACK, "o"),
    "bitsandbytes": (PINK, "s"),
    "HQQ": (GREEN, "D"),
    "SDNQ": ("#7A4FA3", "^"),
    "palettisation": ("#B07800", "v"),
    "article": ("#888888", "X"),
    "torch": ("#888888", "P"),
}
# Families whose points are joined by a line, and the line's name.
JOINED = {"article": "the article", "HQQ": "HQQ", "SDNQ": "SDNQ", "palettisation": "palettisation (k-means)"}
# Source, figure, title and label of the vertical axis.
PANELS = (
    (GAUSSIAN, "sqnr_db", "Gaussian weights: error of what is stored", "signal to noise, dB"),
    (DEMO, "output_db", "Output of the demo UNet, captions not seen before", "signal to noise, dB"),
    (DEMO, "picture_db", "Pictures of the demo model, same captions and seeds", "PSNR to fp16, dB"),
)


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

    found = [(panel, measured(results["rows"], panel[1], panel[0])) for panel in PANELS]
    panels = [(panel, rows) for panel, rows in found if rows]
    figure = Figure(figsize=(WIDTH, HEIGHT * len(panels)), dpi=DPI, layout="constrained")
    drawn = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, ((_, measure, title, label), rows) in zip(drawn, panels, strict=True):
        _draw(axes, measure, rows)
        axes.set_title(title, loc="left", fontsize=FONT_SIZE + 3, fontweight="bold", color=INK)
        axes.set_ylabel(label, fontsize=FONT_SIZE + 1, color=INK)
    words = "bits per weight in memory, all overheads counted (up and left is better)"
    drawn[-1].set_xlabel(words, fontsize=FONT_SIZE + 1, color=INK)
    # Labels need the points' final places.
    figure.draw_without_rendering()
    for axes, ((_, measure, *_), rows) in zip(drawn, panels, strict=True):
        _name_points(axes, measure, _peers(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path


def _peers(rows: Sequence[dict]) -> list[dict]:
    """The peers' rows that have a point, by size."""
    return sorted((row for row in rows if not row["ours"] and row[PACKED] <= MOST_BITS), key=lambda row: row[PACKED])


def _draw(axes: Axes, measure: str, rows: Sequence[dict]) -> None:
    """Draw a panel's curves and points, without the peers' names."""
    peers, ours = _peers(rows), [row for row in rows if row["ours"] and row[PACKED] <= MOST_BITS]

    def draw(points: Sequence[dict], style: str, **more: object) -> None:
        axes.plot([row[PACKED] for row in points], [row[measure] for row in points], style, **more)

    for name, colour, calibrated in (("NFQ", OURS, False), ("NFQ, calibrated", CALIBRATED, True)):
        points = curve([row for row in ours if row["calibrated"] == calibrated], measure)
        if points:
            draw(points, "o-", color=colour, linewidth=2.4, markersize=4.5, zorder=3, label=name)
    for (family, (colour, mark)), calibrated in product(FAMILIES.items(), (False, True)):
        points = [row for row in peers if row["family"] == family and row["calibrated"] == calibrated]
        fill, line = "white" if calibrated else colour, "-" if family in JOINED else ""
        draw(points, line + mark, color=colour, markerfacecolor=fill, markersize=6.5, linewidth=0.8)
    if any(row["calibrated"] for row in peers):
        draw([], "ko", markerfacecolor="white", label="GGUF with an importance matrix, calibrated")
    axes.set_xlim(right=max([*(row[PACKED] for row in peers), 5.5]) + 0.25)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if handles := axes.get_legend_handles_labels()[0]:
        colours = [handle.get_color() for handle in handles]
        axes.legend(loc="upper left", frameon=False, fontsize=FONT_SIZE + 1, labelcolor=colours)
    beyond = [row for row in rows if not row["ours"] and row[PACKED] > MOST_BITS]
    text = "\n".join(f"{row['name']}: {row[PACKED]:.1f} bits, {row[measure]:.1f} dB →" for row in beyond)
    axes.text(0.995, 0.03, text, transform=axes.transAxes, ha="right", fontsize=FONT_SIZE - 1, color=INK)


def _name_points(axes: Axes, measure: str, peers: Sequence[dict]) -> None:
    """Put each label where it covers the fewest points, labels and curves.

    A joined family has one label. Calibrated rows have none: their markers are hollow.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    places = {row["name"]: axes.transData.transform((row[PACKED], row[measure])) for row in peers}
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines() if line.get_ls() == "-"]
    taken = [Bbox.from_bounds(x - NEARBY, y - NEARBY, 2 * NEARBY, 2 * NEARBY) for x, y in places.values()]
    plain = [row for row in peers if not row["calibrated"]]
    names = [(row["name"], [row]) for row in plain if row["family"] not in JOINED]
    names += [(name, [row for row in plain if row["family"] == family]) for family, name in JOINED.items()]
    unit, frame = DPI / 72, axes.get_window_extent()
    for name, points in names:
        width, height = 0.6 * FONT_SIZE * len(name) * unit, 1.25 * FONT_SIZE * unit
        choices = []
        for row, (step, distance), (turn, (right, up)) in product(points, enumerate(DISTANCES), enumerate(DIRECTIONS)):
            x, y = places[row["name"]]
            left = x + right * distance * unit - (1 - right) / 2 * width
            bottom = y + up * distance * unit - (1 - up) / 2 * height
            box = Bbox.from_bounds(left, bottom, width, height)
            if frame.contains(*box.min) and frame.contains(*box.max):
                covered = box.count_overlaps(taken) + sum(curve.intersects_bbox(box, filled=False) for curve in curves)
                choices.append((covered + FARTHER * step + LESS_USUAL * turn, distance, right, up, box, row))
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


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    print(plot(read_results("quality")))
