"""What `benchmarks.endurance` calls growth."""

from __future__ import annotations

import sys

import pytest

from benchmarks.endurance import growth, state_of


def test_growth_is_of_the_last_quarter_over_the_second() -> None:
    """Filling caches in the first quarter is none, nor is one state that stands out; a handle more each time is."""
    states = [{"bytes": 100 + 10 * min(n, 4), "handles": n, "threads": 9 if n == 15 else 1} for n in range(16)]
    assert growth(states) == {"bytes": 0, "handles": 8, "threads": 0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which is Linux's")
def test_an_open_file_is_seen(tmp_path) -> None:
    before = state_of()
    with (tmp_path / "file").open("wb"):
        assert state_of()["handles"] == before["handles"] + 1
    assert state_of()["bytes"] > 0 and state_of()["threads"] >= 1
