"""Promises about size and error compared with each peer, checked on the rows of the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

PACKED = "packed_bits_per_weight"
WEIGHTS, OUTPUT, PICTURES = ("sqnr_db", "noise_db"), ("output_db",), ("picture_db",)
# Figures in dB that are compared together; the first one counts, the others are stricter.
LABELS = {WEIGHTS: "weights", OUTPUT: "output", PICTURES: "pictures"}
# Peers whose error in weights ours must reach without calibration, with these packed bits per weight at most.
FLOORS = (("Q4_K", 4.15), ("Q3_K", 3.15), ("Q5_K", 5.3), ("NF4", 3.85))
PICTURE_FLOORS = FLOORS[:2]  # The same for pictures, also with calibration
# With calibration, the output must be this many dB better than Q4_K's at this many packed bits per weight, and than
# the article's at the article's size.
CALIBRATED_GAIN, CALIBRATED_LIMIT = 3.0, 4.15


def gain(row: dict, peer: dict, measures: Sequence[str]) -> float:
    """How many dB a row is better than a peer's, by the figure where the difference is least."""
    return min(row[measure] - peer[measure] for measure in measures)


def best_within(rows: Iterable[dict], bits: float, peer: dict, measures: Sequence[str]) -> dict | None:
    """The row of at most `bits` packed bits that gains most over a peer; None if no row is that small."""
    small = [row for row in rows if row[PACKED] <= bits]
    return max(small, key=lambda row: gain(row, peer, measures), default=None)


def measured(rows: Iterable[dict], measures: Sequence[str], source: str) -> list[dict]:
    """The rows of a source that have these figures; pictures that are equal have no PSNR."""
    return [row for row in rows if row["source"] == source and all(row.get(one) is not None for one in measures)]


def of_kind(rows: Iterable[dict], ours: bool, calibrated: bool) -> list[dict]:
    """Our rows or the peers', calibrated ones included or left out."""
    return [row for row in rows if row["ours"] == ours and (calibrated or not row["calibrated"])]


def sources_of(rows: Iterable[dict]) -> list[str]:
    """The sources of the rows, each once."""
    return list(dict.fromkeys(row["source"] for row in rows))


def check(
    rows: Sequence[dict], source: str, name: str, limit: float | None, measures: Sequence[str], calibrated: bool
) -> dict:
    """Compare our best row with the peer's of this name; one entry of the results' `checks`.

    `limit` is the packed bits per weight allowed, None as many as the peer has on disk. `gain_db` and `met` are by the
    first figure, `strict_gain_db` and `strictly_met` by the one with the least gain; None where something is missing.
    """
    rows, needed = measured(rows, measures, source), CALIBRATED_GAIN if measures == OUTPUT else 0.0
    peer = next((row for row in rows if row["name"] == name and not row["ours"]), None)
    size = "bits_per_weight" if limit is None else PACKED
    found = None
    if peer is not None:
        limit = peer[size] if limit is None else limit
        ours = of_kind(rows, True, calibrated)
        found = best_within(ours, limit, peer, measures)
        if found and gain(found, peer, measures) < needed:
            found = best_within(ours, limit, peer, measures[:1])
    gained, strictly = (gain(found, peer, of) if found else None for of in (measures[:1], measures))
    return {
        "source": source if rows else None,
        "measure": LABELS[measures],
        "calibrated": calibrated,
        "peer": name,
        "peer_bits": peer and peer[size],
        "peer_db": peer and peer[measures[0]],
        "limit": limit,
        "needed_db": needed,
        "ours": found and found["name"],
        "ours_bits": found and found[PACKED],
        "ours_db": found and found[measures[0]],
        "gain_db": gained,
        "strict_gain_db": strictly,
        "met": None if peer is None else gained is not None and gained >= needed,
        "strictly_met": None if peer is None else strictly is not None and strictly >= needed,
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
    for source, (measures, label) in product(sources_of(rows), LABELS.items()):
        group = measured(rows, measures, source)
        # A calibration improves the output and makes the weights' own error larger.
        for calibrated in (False,) if measures == WEIGHTS else (False, True):
            ours, theirs = (of_kind(group, kind, calibrated) for kind in (True, False))
            if not ours or (calibrated and not any(row["calibrated"] for row in ours)):
                continue
            missed = []
            for peer in theirs:
                best = best_within(ours, peer[PACKED], peer, measures)
                gained = gain(best, peer, measures) if best else None
                if gained is None or gained < 0:
                    row = {"name": peer["name"], "bits": peer[PACKED], "db": peer[measures[0]], "gain_db": gained}
                    missed.append(row)
            line = {"source": source, "measure": label, "calibrated": calibrated}
            found.append(line | {"peers": len(theirs), "missed": missed})
    return found
