"""The presets on the small models: what is out of order, and the table."""

from __future__ import annotations

from benchmarks.quality import presets


def rows(calibrated: bool = False, **figures: dict[str, float]) -> list[dict]:
    """Rows of pictures in dB by effort and preset."""
    return [
        {"model": "shapes", "calibrated": calibrated, "effort": effort, "preset": preset}
        | {"packed_bits_per_weight": 4.0, "output_db": 20.0, "picture_db": db, "median_picture_db": db + 1}
        for effort, by_preset in figures.items()
        for preset, db in by_preset.items()
    ]


def test_what_is_out_of_order():
    found = rows(fast={"large": 38.0, "small": 30.0, "tiny": 31.0}, best={"large": 37.0, "small": 33.0, "tiny": 31.0})
    found += rows(True, fast={"tiny": 30.0})
    assert presets.out_of_order(found, "picture_db") == [
        "picture_db: shapes small fast 30.0 < 31.0 shapes tiny fast",
        "picture_db: shapes large best 37.0 < 38.0 shapes large fast",
        "picture_db: shapes tiny fast calibrated 30.0 < 31.0 shapes tiny fast",
    ]
    assert not presets.out_of_order(found, "output_db")
    found = rows(True, fast={"balanced": 38.0, "nf16_b64": 39.0})
    assert presets.out_of_order(found, "picture_db") == [
        "picture_db: shapes balanced fast calibrated 38.0 < 39.0 shapes nf16_b64 fast calibrated"
    ]


def test_the_table():
    text = presets.table({"rows": rows(fast={"large": 38.0}) + rows(True, fast={"large": 45.5})})
    assert (
        text.splitlines()[2]
        == "| shapes | `large` | fast | 4.00 | 20.0 | 20.0 (+0.0) | 38.0 | 45.5 (+7.5) | 39.0 | 46.5 (+7.5) |"
    )
