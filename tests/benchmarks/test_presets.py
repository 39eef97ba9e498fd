"""The presets on the demo model: what is out of order, and the table."""

from __future__ import annotations

from benchmarks.quality import presets


def rows(**figures: dict[str, float]) -> list[dict]:
    """Rows of pictures in dB by effort and preset."""
    return [
        {"effort": effort, "preset": preset, "packed_bits_per_weight": 4.0, "output_db": 20.0}
        | {"picture_db": db, "picture_db_by_seed": [db - 1, db + 1]}
        for effort, by_preset in figures.items()
        for preset, db in by_preset.items()
    ]


def test_what_is_out_of_order():
    found = rows(fast={"large": 38.0, "small": 30.0, "tiny": 31.0}, best={"large": 37.0, "small": 33.0, "tiny": 31.0})
    assert presets.out_of_order(found) == ["fast: small is worse than tiny", "large: best is worse than fast"]


def test_the_table():
    text = presets.table({"rows": rows(fast={"large": 38.0})})
    assert text.splitlines()[2] == "| large | fast | 4.00 | 20.0 | 38.0 (37.0 – 39.0) |"
