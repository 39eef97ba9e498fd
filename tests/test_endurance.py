"""What `tests/slow/endurance.py` calls growth, and what it writes and returns."""

from __future__ import annotations

import json
import sys

import endurance
import pytest
from endurance import growth, state_of


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


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"failed": 0, "left_behind": []}, 0),
        ({"failed": 1, "left_behind": []}, 1),
        ({"failed": 0, "left_behind": [".crowd.0a.tmp"]}, 1),
    ],
)
def test_each_part_tells_of_its_own_run_and_a_failure_is_the_exit_status(tmp_path, monkeypatch, found, status) -> None:
    path = tmp_path / "endurance.json"
    demo = {"command": "an older command", "machine": {"processor": "another"}, "cycles": 3}
    path.write_text(json.dumps({"demo": demo, "crowd": {"command": "an older command", "failed": 5}}))
    monkeypatch.setattr(endurance, "RESULTS", tmp_path)
    monkeypatch.setattr(endurance, "crowd", lambda folder: found)
    monkeypatch.setattr(sys, "argv", [endurance.__file__, "--parts", "crowd"])
    assert endurance.main() == status
    told = json.loads(path.read_text())
    assert told.keys() == {"demo", "crowd"} and told["demo"] == demo
    crowd = told["crowd"]
    assert crowd.pop("command") == "python tests/slow/endurance.py --parts crowd"
    assert crowd.pop("machine")["torch"] and crowd == found
