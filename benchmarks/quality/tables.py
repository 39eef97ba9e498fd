"""The results of `benchmarks.quality` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ..shared import left_out, markdown_table
from .checks import PACKED, sources_of
from .weights import DEMO, GAUSSIAN, SPREAD, STUDENT_T

SOURCES = {
    GAUSSIAN: "Gaussian",
    STUDENT_T: "Student-t, ν = 5",
    SPREAD: "convolution, channels differ",
    DEMO: "demo model",
}
UNNAMED = ("GGUF", "bitsandbytes", "torch")  # Families whose name is not part of their contestants' names
NOTICEABLE_DB = 0.05  # The stricter figure of an error is shown where it is lower by more than this


def table(results: dict) -> str:
    """The checks, the peers that ours reach, and all rows, folded up."""
    rows = results["rows"]
    parts = [check_table(results["checks"]), left_of_table(results["left_of"])]
    others = [source for source in sources_of(rows) if source != DEMO]
    folded = [("the demo model", demo_table(rows))] if len(others) < len(sources_of(rows)) else []
    folded += [("weights", weight_table(rows, others))] if others else []
    parts += [f"<details><summary>Every row: {name}</summary>\n\n{text}\n\n</details>" for name, text in folded]
    return "\n\n".join([*parts, left_out(results["skipped"])]).strip()


def check_table(checks: Sequence[dict]) -> str:
    """Each promise, the figures that it is checked on, and the outcome."""
    lines = []
    for check in checks:
        calibration = ", calibrated" if check["calibrated"] else ""
        more = f"{check['needed_db']:g} dB above" if check["needed_db"] else "as good as"
        limit = "" if check["limit"] is None else f" at ≤ {check['limit']:.2f} bits"
        theirs, ours = (
            "–" if check[f"{who}_db"] is None else f"{check[f'{who}_db']:.2f} dB at {check[f'{who}_bits']:.2f}"
            for who in ("peer", "ours")
        )
        gain = "–" if check["gain_db"] is None else f"{check['gain_db']:+.2f}"
        met = {True: "yes", False: "**no**", None: "–"}[check["met"]]
        if check["met"] and not check["strictly_met"]:
            met = f"by the mean of dB; by mean noise {check['strict_gain_db']:+.2f}"
        lines.append(
            [
                SOURCES.get(check["source"], check["source"] or "–"),
                f"{check['measure']}{calibration}: {more} {check['peer']}{limit}",
                "not measured" if check["met"] is None else theirs,
                ours if check["ours"] is None else f"{check['ours']}: {ours}",
                gain,
                met,
            ]
        )
    return markdown_table(["on", "promise", "peer", "ours", "gain, dB", "kept"], lines)


def left_of_table(found: Sequence[dict]) -> str:
    """How many of the peers' rows one of ours reaches with no more bits, and the others."""
    lines = []
    for line in found:
        missed = []
        for miss in line["missed"]:
            gain = "nothing of ours is as small" if miss["gain_db"] is None else f"{miss['gain_db']:+.2f} dB"
            missed.append(f"{miss['name']} at {miss['bits']:.2f} ({gain})")
        ours = "with calibration" if line["calibrated"] else "without"
        reached = f"{line['peers'] - len(missed)} of {line['peers']}"
        source = SOURCES.get(line["source"], line["source"])
        lines.append([source, line["measure"], ours, reached, "; ".join(missed) or "–"])
    return markdown_table(["on", "measure", "ours", "peers reached", "not reached"], lines)


def weight_table(rows: Sequence[dict], sources: Sequence[str]) -> str:
    """Each contestant's bits per weight on the first of the sources, and its errors on all."""
    by_name: dict[str, dict[str, dict]] = {}
    for row in (row for row in rows if row["source"] in sources):
        by_name.setdefault(row["name"], {})[row["source"]] = row
    lines = []
    for first, found in sorted(((next(iter(f.values())), f) for f in by_name.values()), key=lambda one: one[0][PACKED]):
        errors = [_error(found.get(source, {})) for source in sources]
        lines.append([_name(first), f"{first[PACKED]:.3f}", f"{first['bits_per_weight']:.3f}", *errors])
    header = ["format", "bits packed", "on disk", *(f"{SOURCES.get(source, source)}, dB" for source in sources)]
    return markdown_table(header, lines)


def demo_table(rows: Sequence[dict]) -> str:
    """Packed bits per weight and errors of the demo model in each setting."""
    lines = []
    for row in sorted((row for row in rows if row["source"] == DEMO), key=lambda row: row[PACKED]):
        forms = {"output_db": ".2f", "picture_db": ".2f", "ssim": ".4f"}
        cells = ["–" if row.get(figure) is None else format(row[figure], form) for figure, form in forms.items()]
        lines.append([_name(row), f"{row[PACKED]:.3f}", _error(row), *cells])
    return markdown_table(["format", "bits packed", "weights, dB", "output, dB", "pictures, dB", "SSIM"], lines)


def _name(row: dict) -> str:
    if row["ours"]:
        return f"**{row['name']}**"
    return f"{row['name']} ({row['family']})" if row["family"] in UNNAMED else row["name"]


def _error(row: dict) -> str:
    """The mean of dB; in brackets the dB of the mean noise if that is noticeably lower."""
    if row.get("sqnr_db") is None:
        return "–"
    strict = f" ({row['noise_db']:.2f})" if row["sqnr_db"] - row["noise_db"] > NOTICEABLE_DB else ""
    return f"{row['sqnr_db']:.2f}{strict}"
