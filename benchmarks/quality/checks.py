"""Promises about size and error compared with each peer, checked on the rows of the results; the results' tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from ..shared import left_out, markdown_table
from .weights import DEMO, GAUSSIAN, SPREAD, STUDENT_T

PACKED = "packed_bits_per_weight"
WEIGHTS, OUTPUT, PICTURES = "sqnr_db", "output_db", "picture_db"  # Figures in dB
LABELS = {WEIGHTS: "weights", OUTPUT: "output", PICTURES: "pictures"}
# Peers whose error in weights ours must reach without calibration, with these packed bits per weight at most.
FLOORS = (("Q4_K", 4.15), ("Q3_K", 3.13), ("Q5_K", 5.3), ("Q6_K", 6.36), ("NF4", 3.85))
PICTURE_FLOORS = FLOORS[:2]  # The same for pictures, also with calibration
# With calibration, the output must be this many dB better than Q4_K's at this many packed bits per weight, and than
# the article's at the article's size.
CALIBRATED_GAIN, CALIBRATED_LIMIT = 3.0, 4.15
SOURCES = {
    GAUSSIAN: "Gaussian",
    STUDENT_T: "Student-t, ν = 5",
    SPREAD: "convolution, channels differ",
    DEMO: "demo model",
}
UNNAMED = ("GGUF", "bitsandbytes", "torch")  # Families whose name is not part of their contestants' names


def best_within(rows: Iterable[dict], bits: float, measure: str) -> dict | None:
    """The best row of at most `bits` packed bits; None if no row is that small."""
    return max((row for row in rows if row[PACKED] <= bits), key=lambda row: row[measure], default=None)


def measured(rows: Iterable[dict], measure: str, source: str) -> list[dict]:
    """The rows of a source that have this figure; weights and pictures that are equal have none."""
    return [row for row in rows if row["source"] == source and row.get(measure) is not None]


def of_kind(rows: Iterable[dict], ours: bool, calibrated: bool) -> list[dict]:
    """Our rows or the peers', calibrated ones included or left out."""
    return [row for row in rows if row["ours"] == ours and (calibrated or not row["calibrated"])]


def sources_of(rows: Iterable[dict]) -> list[str]:
    """The sources of the rows, each once."""
    return list(dict.fromkeys(row["source"] for row in rows))


def check(rows: Sequence[dict], source: str, name: str, limit: float | None, measure: str, calibrated: bool) -> dict:
    """Compare our best row with the peer's of this name; one entry of the results' `checks`.

    `limit` is the packed bits per weight allowed, None as many as the peer has on disk. A figure is None where
    something is missing.
    """
    rows, needed = measured(rows, measure, source), CALIBRATED_GAIN if measure == OUTPUT else 0.0
    peer = next((row for row in rows if row["name"] == name and not row["ours"]), None)
    size = "bits_per_weight" if limit is None else PACKED
    found = None
    if peer is not None:
        limit = peer[size] if limit is None else limit
        found = best_within(of_kind(rows, True, calibrated), limit, measure)
    gained = found[measure] - peer[measure] if found else None
    return {
        "source": source if rows else None,
        "measure": LABELS[measure],
        "calibrated": calibrated,
        "peer": name,
        "peer_bits": peer and peer[size],
        "peer_db": peer and peer[measure],
        "limit": limit,
        "needed_db": needed,
        "ours": found and found["name"],
        "ours_bits": found and found[PACKED],
        "ours_db": found and found[measure],
        "gain_db": gained,
        "met": None if peer is None else gained is not None and gained >= needed,
    }


def checks(rows: Sequence[dict], articles: Sequence[str]) -> list[dict]:
    """All checks on each source; `articles` are the names of the article's rows."""
    sources = sources_of(rows)
    found = [check(rows, source, *floor, WEIGHTS, False) for source, floor in product(sources, FLOORS)]
    for source in (source for source in sources if measured(rows, OUTPUT, source)):
        limits = (("Q4_K", CALIBRATED_LIMIT), *((article, None) for article in articles))
        found += [check(rows, source, *limit, OUTPUT, True) for limit in limits]
        pictures = product((False, True), PICTURE_FLOORS)
        found += [check(rows, source, *floor, PICTURES, calibrated) for calibrated, floor in pictures]
    return found


def left_of(rows: Sequence[dict]) -> list[dict]:
    """For each row of a peer: is one of ours as small and as good?

    Returns:
        For each source, measure and kind of ours (without calibration, with it): `peers`, the number of rows compared,
        and `missed`, the ones that none of ours reaches: `name`, `bits`, `db` and `gain_db`, of our best row that is as
        small (None: none is). Calibrated peers are compared with calibrated rows only.
    """
    found = []
    for source, (measure, label) in product(sources_of(rows), LABELS.items()):
        group = measured(rows, measure, source)
        # A calibration improves the output and makes the weights' own error larger.
        for calibrated in (False,) if measure == WEIGHTS else (False, True):
            ours, theirs = (of_kind(group, kind, calibrated) for kind in (True, False))
            if not ours or (calibrated and not any(row["calibrated"] for row in ours)):
                continue
            missed = []
            for peer in theirs:
                best = best_within(ours, peer[PACKED], measure)
                gained = best[measure] - peer[measure] if best else None
                if gained is None or gained < 0:
                    row = {"name": peer["name"], "bits": peer[PACKED], "db": peer[measure], "gain_db": gained}
                    missed.append(row)
            line = {"source": source, "measure": label, "calibrated": calibrated}
            found.append(line | {"peers": len(theirs), "missed": missed})
    return found


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
        errors = [_decibels(found.get(source, {}), WEIGHTS) for source in sources]
        lines.append([_name(first), f"{first[PACKED]:.3f}", f"{first['bits_per_weight']:.3f}", *errors])
    header = ["format", "bits packed", "on disk", *(f"{SOURCES.get(source, source)}, dB" for source in sources)]
    return markdown_table(header, lines)


def demo_table(rows: Sequence[dict]) -> str:
    """Packed bits per weight and errors of the demo model in each setting."""
    lines = []
    for row in sorted((row for row in rows if row["source"] == DEMO), key=lambda row: row[PACKED]):
        errors = [_decibels(row, measure) for measure in LABELS]
        similarity = "–" if row.get("ssim") is None else f"{row['ssim']:.4f}"
        lines.append([_name(row), f"{row[PACKED]:.3f}", *errors, similarity])
    return markdown_table(["format", "bits packed", "weights, dB", "output, dB", "pictures, dB", "SSIM"], lines)


def _name(row: dict) -> str:
    if row["ours"]:
        return f"**{row['name']}**"
    return f"{row['name']} ({row['family']})" if row["family"] in UNNAMED else row["name"]


def _decibels(row: dict, measure: str) -> str:
    return "–" if row.get(measure) is None else f"{row[measure]:.2f}"
