"""The results of `benchmarks.quality` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ..shared import markdown_table
from .checks import PACKED
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
    rows, parts = results["rows"], [summary(results)]
    if any(row["source"] == DEMO for row in rows):
        parts.append(_folded("Every row: the demo model", demo_table(rows)))
    others = [source for source in dict.fromkeys(row["source"] for row in rows) if source != DEMO]
    if others:
        parts.append(_folded("Every row: weights", weight_table(rows, others)))
    if results["skipped"]:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in results["skipped"].items()) + ".")
    return "\n\n".join(parts)


def summary(results: dict) -> str:
    """The checks, and the peers that ours reach."""
    return "\n\n".join([check_table(results["checks"]), left_of_table(results["left_of"])])


def check_table(checks: Sequence[dict]) -> str:
    """Each promise, the figures that it is checked on, and the outcome."""
    lines = []
    for check in checks:
        calibration = ", calibrated" if check["calibrated"] else ""
        more = f"{check['needed_db']:g} dB above " if check["needed_db"] else "as good as "
        promise = f"{check['measure']}{calibration}: {more}{check['peer']}"
        if check["limit"] is not None:
            promise += f" at ≤ {check['limit']:.2f} bits"
        theirs, ours = (
            "–" if check[f"{who}_db"] is None else f"{check[f'{who}_db']:.2f} dB at {check[f'{who}_bits']:.2f}"
            for who in ("peer", "ours")
        )
        if check["ours"] is not None:
            ours = f"{check['ours']}: {ours}"
        if check["met"] is None:
            theirs = "not measured"
        met = {True: "yes", False: "**no**", None: "–"}[check["met"]]
        gain = "–" if check["gain_db"] is None else f"{check['gain_db']:+.2f}"
        if check["met"] and not check["strictly_met"]:
            met = f"by the mean of dB; by mean noise {check['strict_gain_db']:+.2f}"
        lines.append([SOURCES.get(check["source"], check["source"] or "–"), promise, theirs, ours, gain, met])
    return markdown_table(["on", "promise", "peer", "ours", "gain, dB", "kept"], lines)


def left_of_table(found: Sequence[dict]) -> str:
    """How many of the peers' rows one of ours reaches with no more bits, and the others."""
    lines = []
    for line in found:
        missed = "; ".join(_missed(miss) for miss in line["missed"]) or "–"
        ours = "with calibration" if line["calibrated"] else "without"
        reached = f"{line['peers'] - len(line['missed'])} of {line['peers']}"
        lines.append([SOURCES.get(line["source"], line["source"]), line["measure"], ours, reached, missed])
    return markdown_table(["on", "measure", "ours", "peers reached", "not reached"], lines)


def _missed(miss: dict) -> str:
    short = "nothing of ours is as small" if miss["gain_db"] is None else f"{miss['gain_db']:+.2f} dB"
    return f"{miss['name']} at {miss['bits']:.2f} ({short})"


def weight_table(rows: Sequence[dict], sources: Sequence[str]) -> str:
    """Each contestant's bits per weight on the first of the sources, and its errors on all."""
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["source"] in sources:
            by_name.setdefault(row["name"], {})[row["source"]] = row
    lines = []
    for found in sorted(by_name.values(), key=lambda found: next(iter(found.values()))[PACKED]):
        first = next(iter(found.values()))
        errors = [_error(found[source]) if source in found else "–" for source in sources]
        lines.append([_name(first), f"{first[PACKED]:.3f}", f"{first['bits_per_weight']:.3f}", *errors])
    header = ["format", "bits packed", "on disk", *(f"{SOURCES.get(source, source)}, dB" for source in sources)]
    return markdown_table(header, lines)


def demo_table(rows: Sequence[dict]) -> str:
    """Packed bits per weight and errors of the demo model in each setting."""
    lines = []
    for row in sorted((row for row in rows if row["source"] == DEMO), key=lambda row: row[PACKED]):
        cells = [_name(row), f"{row[PACKED]:.3f}", "–" if row.get("sqnr_db") is None else _error(row)]
        for measure, form in (("output_db", ".2f"), ("picture_db", ".2f"), ("ssim", ".4f")):
            cells.append("–" if row.get(measure) is None else format(row[measure], form))
        lines.append(cells)
    return markdown_table(["format", "bits packed", "weights, dB", "output, dB", "pictures, dB", "SSIM"], lines)


def _name(row: dict) -> str:
    if row["ours"]:
        return f"**{row['name']}**"
    return f"{row['name']} ({row['family']})" if row["family"] in UNNAMED else row["name"]


def _error(row: dict) -> str:
    """The mean of dB; in brackets the dB of the mean noise if that is noticeably lower."""
    strict = f" ({row['noise_db']:.2f})" if row["sqnr_db"] - row["noise_db"] > NOTICEABLE_DB else ""
    return f"{row['sqnr_db']:.2f}{strict}"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
