"""The plots of the documents, from results files: `python -m benchmarks.quality.plot`.

One shows the error of random weights against size, from `quality.json`, pooled over the three kinds of weights. The
other shows the predicted output of SDXL, from `quality.json` and `prediction.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nfq_core.decibels import pooled_sqnr_db
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.report.plots import COLOURS, check_matplotlib, png

from ..shared import IMAGES, argument_parser, read_results
from .checks import PACKED, WEIGHTS, sources_of
from .peers import OURS
from .weights import DEMO, GAUSSIAN, MIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI, FONT_SIZE = 8, 4.5, 200, 9  # Inches, pixels per inch, points of type: readable at 800 pixels
LEAST_BITS, MOST_BITS = 2.0, 8.7  # Packed bits per weight that the axis shows
# Distances of a label from its point, in points of type; from the second on, a line joins the two.
DISTANCES = (6, 12, 20, 30, 42)
# Directions of a label, right and up, best first.
DIRECTIONS = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 1), (-1, 0), (0, 1), (1, 1))
# Cost of the next distance, of the next direction, and of a covered label; any other covered thing costs 1.
FARTHER, LESS_USUAL, COVERED_LABEL = 0.3, 0.06, 5.0
NEARBY = 8  # Pixels around a point that labels keep clear of
INK = "#333333"
BLUE, ORANGE, GREEN, PINK, _, _, BLACK = COLOURS
EFFORT_COLOURS = dict(zip(EFFORTS, (BLUE, ORANGE), strict=True))
EFFORT_NAMES = {"fast": "NFQ, --effort fast: scalar formats", "best": "NFQ, --effort best: trellis formats"}
# Colour and marker of each family of peers.
FAMILIES = {
    "GGUF": (BLACK, "o"),
    "bitsandbytes": (PINK, "s"),
    "HQQ": (GREEN, "D"),
    "SDNQ": ("#7A4FA3", "^"),
    "SDNQ Hadamard": ("#7A4FA3", "<"),
    "SDNQ codebook": ("#7A4FA3", ">"),
    "comfy-kitchen": ("#00707F", "*"),
    "palettisation": ("#B07800", "v"),
    "article": ("#888888", "X"),
    "torch": ("#888888", "P"),
}
# Families whose points are joined by a line, and the line's name.
JOINED = {"article": "the article", "HQQ": "HQQ", "SDNQ": "SDNQ", "palettisation": "palettisation (k-means)"}
# Families that are in the tables only: their points would cover others.
UNDRAWN = ("SDNQ Hadamard", "SDNQ codebook")


class Point(NamedTuple):
    """A format, or a mix of formats, in a plot; `effort` is empty for peers."""

    name: str
    family: str
    effort: str
    mixed: bool
    bits: float
    db: float


def pooled_points(rows: Sequence[dict]) -> list[Point]:
    """The rows of random weights as points; the errors of the sources are pooled, each source counting the same."""
    sources = [source for source in sources_of(rows) if source != DEMO]
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["source"] in sources and not row["calibrated"]:
            found.setdefault(row["name"], []).append(row)
    points = []
    for same in found.values():
        # A mix of the same name may be another mix on another source, or none.
        if len(same) == len(sources):
            bits = sum(row[PACKED] for row in same) / len(same)
            db = pooled_sqnr_db((1, row[WEIGHTS]) for row in same)
            points.append(_point(same[0], bits, db))
    return points


def predicted_points(rows: Sequence[dict], prediction: dict) -> list[Point]:
    """Predicted output of SDXL: formats used for every weight, by their error on Gaussian weights, and our sizes."""
    singles = [row for row in rows if row["source"] == GAUSSIAN and not row["calibrated"]]
    singles = [row for row in singles if not row["name"].startswith(MIX)]
    points = [_point(row, row[PACKED], row[WEIGHTS] + prediction["uniform_gain_db"]) for row in singles]
    sizes = prediction["sizes"]
    return points + [Point("", OURS, size["effort"], True, size["packed"], size["db"]) for size in sizes]


def _point(row: dict, bits: float, db: float) -> Point:
    effort = ("best" if row["name"].endswith("best") else "fast") if row["ours"] else ""
    return Point(row["name"], row["family"], effort, row["name"].startswith(MIX), bits, db)


def curve(points: Sequence[Point]) -> list[Point]:
    """The points that are better than every smaller one, by size."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, -point.db)):
        if not best or point.db > best[-1].db:
            best.append(point)
    return best


def draw(points: Sequence[Point], title: str, label: str, note: str, path: Path) -> Path:
    """Draw points as a PNG of one panel; ImportError if matplotlib is missing."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shown = [point for point in points if LEAST_BITS <= point.bits <= MOST_BITS and point.family not in UNDRAWN]
    peers = sorted((point for point in shown if point.family != OURS), key=lambda point: point.bits)
    _draw(axes, [point for point in shown if point.family == OURS], peers)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 2, fontweight="bold", color=INK)
    axes.set_ylabel(label, fontsize=FONT_SIZE, color=INK)
    axes.set_xlabel("bits per weight in memory, all overheads counted (up and left is better)", fontsize=FONT_SIZE)
    axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=FONT_SIZE - 1, color=INK)
    # Labels need the points' final places.
    figure.draw_without_rendering()
    _name_points(axes, peers, [point for point in shown if point.family == OURS and not point.mixed])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path


def _draw(axes: Axes, ours: Sequence[Point], peers: Sequence[Point]) -> None:
    """Draw curves and points, without the peers' names."""

    def add(points: Sequence[Point], style: str, **more: object) -> None:
        axes.plot([point.bits for point in points], [point.db for point in points], style, **more)

    for effort, colour in EFFORT_COLOURS.items():
        own = [point for point in ours if point.effort == effort]
        add(curve([one for one in own if one.mixed]), "-", color=colour, linewidth=2, label=EFFORT_NAMES[effort])
        add([one for one in own if not one.mixed and one.name], "o", color=colour, markersize=4, zorder=3)
    for family, (colour, mark) in FAMILIES.items():
        line = "-" if family in JOINED else ""
        add([one for one in peers if one.family == family], line + mark, color=colour, markersize=5, linewidth=0.7)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(loc="upper left", frameon=False, fontsize=FONT_SIZE, title="line: a size; dot: one format")
    legend._legend_box.align = "left"


def _name_points(axes: Axes, peers: Sequence[Point], ours: Sequence[Point]) -> None:
    """Put each peer's label where it covers the fewest points, labels and curves; a joined family has one label."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    places = {point.name: axes.transData.transform((point.bits, point.db)) for point in peers}
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines() if line.get_ls() == "-"]
    around = [axes.transData.transform((point.bits, point.db)) - NEARBY for point in (*peers, *ours)]
    marks = [Bbox.from_bounds(x, y, 2 * NEARBY, 2 * NEARBY) for x, y in around]
    labels: list[Bbox] = []
    names = [(point.name, [point]) for point in peers if point.family not in JOINED]
    names += [(name, [point for point in peers if point.family == family]) for family, name in JOINED.items()]
    unit, frame = DPI / 72, axes.get_window_extent()
    for name, points in names:
        width, height = 0.6 * FONT_SIZE * len(name) * unit, 1.25 * FONT_SIZE * unit
        choices = []
        ways = product(points, enumerate(DISTANCES), enumerate(DIRECTIONS))
        for point, (step, distance), (turn, (right, up)) in ways:
            x, y = places[point.name]
            left = x + right * distance * unit - (1 - right) / 2 * width
            bottom = y + up * distance * unit - (1 - up) / 2 * height
            box = Bbox.from_bounds(left, bottom, width, height)
            if frame.contains(*box.min) and frame.contains(*box.max):
                covered = box.count_overlaps(marks) + COVERED_LABEL * box.count_overlaps(labels)
                covered += sum(curve.intersects_bbox(box, filled=False) for curve in curves)
                choices.append((covered + FARTHER * step + LESS_USUAL * turn, distance, right, up, box, point))
        if not choices:
            continue
        _, distance, right, up, box, point = min(choices, key=lambda choice: choice[0])
        labels.append(box)
        colour = FAMILIES[point.family][0]
        axes.annotate(
            name,
            (point.bits, point.db),
            (right * distance, up * distance),
            textcoords="offset points",
            ha=("right", "center", "left")[right + 1],
            va=("top", "center", "bottom")[up + 1],
            fontsize=FONT_SIZE,
            color=colour,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if distance > DISTANCES[0] else None,
        )


def main() -> list[Path]:
    """Draw both plots."""
    rows, prediction = read_results("quality")["rows"], read_results("prediction")
    weights = draw(
        pooled_points(rows),
        "Error of stored weights",
        "signal to noise, dB",
        "random weights: Gaussian, Student-t (ν = 5), channels that differ;\nno SDXL weights were measured",
        IMAGES / "quality.png",
    )
    output = draw(
        predicted_points(rows, prediction),
        "Predicted output of SDXL's UNet",
        "signal to noise, dB",
        "A prediction, not a measurement: formats' errors on Gaussian weights,\n"
        "MixDQ's published sensitivities of SDXL-Turbo's layers, noise adds up",
        IMAGES / "prediction.png",
    )
    return [weights, output]


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    print(*main(), sep="\n")
