"""What was promised, and whether the rows of the results keep it; pure functions of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WEIGHTS = ("sqnr_db", "noise_db")
OUTPUT, PICTURES = ("output_db",), ("picture_db",)
LABELS = {WEIGHTS: "weights", OUTPUT: "output", PICTURES: "pictures"}
"""Measures compared together, in dB: the first is what was promised, the others are stricter."""

FLOORS = (("Q4_K", 4.15), ("Q3_K", 3.15), ("Q5_K", 5.3), ("NF4", 3.85))
"""Peers whose weights' error is to be reached without calibration, and the packed bits that are allowed for it."""

PICTURE_FLOORS = (("Q4_K", 4.15), ("Q3_K", 3.15))

CALIBRATED_GAIN = 3.0
"""How many dB better the output has to be with calibration than Q4_K's, and than the article's at its own sizes."""

CALIBRATED_LIMIT = 4.15

PACKED = "packed_bits_per_weight"


def gain(row: dict, peer: dict, measures: Sequence[str]) -> float:
    """How many dB a row is better than a peer's, by the measure where it is least."""
    return min(row[measure] - peer[measure] for measure in measures)


def best_within(rows: Iterable[dict], bits: float, peer: dict, measures: Sequence[str]) -> dict | None:
    """The row of at most so many packed bits that gains most over a peer; None where there is none so small."""
    small = [row for row in rows if row[PACKED] <= bits]
    return max(small, key=lambda row: gain(row, peer, measures), default=None)


def measured(rows: Iterable[dict], measures: Sequence[str]) -> list[dict]:
    """The rows that have these measures; equal pictures have no PSNR."""
    return [row for row in rows if all(row.get(measure) is not None for measure in measures)]


def check(
    rows: Sequence[dict], name: str, limit: float | None, measures: Sequence[str], needed: float, calibrated: bool
) -> dict:
    """Whether ours are good enough beside a peer.

    Args:
        rows: those of one source.
        name: the peer's.
        limit: the packed bits allowed; None: as many as the peer has on disk.
        measures: what is compared.
        needed: how many dB ours has to be better.
        calibrated: whether ours may be calibrated.

    Returns:
        `source`, `measure`, `calibrated`, `peer`, `peer_bits`, `peer_db`, `limit`, `needed_db`, `ours`, `ours_bits`,
        `ours_db`, `gain_db` and `met`, by the first measure, `strict_gain_db` and `strictly_met`, by the one where the
        gain is least; what is not there is None.
    """
    rows = measured(rows, measures)
    ours = [row for row in rows if row["ours"] and (calibrated or not row["calibrated"])]
    peer = next((row for row in rows if row["name"] == name and not row["ours"]), None)
    size = "bits_per_weight" if limit is None else PACKED
    found = None
    if peer is not None:
        limit = peer[size] if limit is None else limit
        found = best_within(ours, limit, peer, measures)
        if found and gain(found, peer, measures) < needed:
            found = best_within(ours, limit, peer, measures[:1])
    gained, strictly = (gain(found, peer, of) if found else None for of in (measures[:1], measures))
    return {
        "source": rows[0]["source"] if rows else None,
        "measure": LABELS[tuple(measures)],
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
    """Every promise, on each source that it is made for.

    Args:
        rows: all rows.
        articles: the names of the article's rows.
    """
    by_source: dict[str, list[dict]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    found = []
    for group in by_source.values():
        found += [check(group, name, limit, WEIGHTS, 0.0, False) for name, limit in FLOORS]
    for group in by_source.values():
        if not measured(group, OUTPUT):
            continue
        found.append(check(group, "Q4_K", CALIBRATED_LIMIT, OUTPUT, CALIBRATED_GAIN, True))
        found += [check(group, name, None, OUTPUT, CALIBRATED_GAIN, True) for name in articles]
        for calibrated in (False, True):
            found += [check(group, name, limit, PICTURES, 0.0, calibrated) for name, limit in PICTURE_FLOORS]
    return found


def left_of(rows: Sequence[dict]) -> list[dict]:
    """Whether our curve is left of every peer's: for each row of theirs, is one of ours as small and as good?

    Returns:
        For each source, measure and kind of ours (without calibration, with it): `peers`, the number of rows compared,
        and `missed`, those that none of ours reaches, each with `name`, `bits`, `db` and `gain_db`, of the best of ours
        that is as small (None: none is). Calibrated peers are compared with calibrated rows only.
    """
    found = []
    sources = dict.fromkeys(row["source"] for row in rows)
    for source in sources:
        for measures in LABELS:
            group = measured([row for row in rows if row["source"] == source], measures)
            # A calibration is for the output: it makes the weights' own error larger.
            for calibrated in (False,) if measures == WEIGHTS else (False, True):
                ours = [row for row in group if row["ours"] and (calibrated or not row["calibrated"])]
                if not ours or (calibrated and not any(row["calibrated"] for row in ours)):
                    continue
                theirs = [row for row in group if not row["ours"] and (calibrated or not row["calibrated"])]
                found.append(
                    {
                        "source": source,
                        "measure": LABELS[measures],
                        "calibrated": calibrated,
                        "peers": len(theirs),
                        "missed": [miss for peer in theirs if (miss := _miss(peer, ours, measures))],
                    }
                )
    return found


def _miss(peer: dict, ours: Sequence[dict], measures: Sequence[str]) -> dict | None:
    """A peer that none of ours reaches; None where one does."""
    best = best_within(ours, peer[PACKED], peer, measures)
    gained = gain(best, peer, measures) if best else None
    if gained is not None and gained >= 0:
        return None
    return {"name": peer["name"], "bits": peer[PACKED], "db": peer[measures[0]], "gain_db": gained}
