"""What benchmarks share: the recorded command, turns, timed calls, and the tables in the pages."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import shared, tables


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("benchmarks/one.py", "-m benchmarks.one"),
        ("benchmarks/two/__main__.py", "-m benchmarks.two"),
        ("tests/slow/three.py", "tests/slow/three.py"),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        ([], ""),
        (["--only", "tiny", "4.15", "--seed", "1e-3"], " --only tiny 4.15 --seed 1e-3"),
        (["--dir", "/home/somebody/data/", "--out=/tmp/more/out.json"], " --dir data --out=out.json"),
        (["--architecture", "Segmind Vega", "--dir", "."], " --architecture 'Segmind Vega' --dir ."),
    ],
)
def test_the_command_is_the_one_that_was_given(
    tmp_path, monkeypatch, script: str, program: str, arguments: list[str], recorded: str
) -> None:
    monkeypatch.setattr(sys, "argv", [str(shared.ROOT / script), *arguments])
    path = shared.write_results("one", {"rows": [1]}, tmp_path / "new" / "results.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"] == f"python {program}{recorded}"
    assert written["rows"] == [1] and written["machine"] == shared.machine()


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def seconds(call) -> float:
        call()
        return float(len(called))

    contestants = {name: partial(called.append, name) for name in "ab"}
    assert shared.in_turns(contestants, 2, seconds) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(called) == "ababab"


def test_calls_are_timed() -> None:
    layer = nn.Linear(4, 4)
    with shared.call_seconds(layer) as seconds:
        for _ in range(3):
            layer(torch.zeros(1, 4))
    layer(torch.zeros(1, 4))
    assert len(seconds) == 3 and min(seconds) > 0


def test_the_pages_hold_the_tables_of_the_results() -> None:
    """`python -m benchmarks.tables` would change nothing; every table that has results is in some page."""
    texts = [page.read_text(encoding="utf-8") for page in tables.pages()]
    assert [tables.with_tables(text) for text in texts] == texts
    shown = {name for name in tables.TABLES if any(f"<!-- {name} -->" in text for text in texts)}
    assert shown == tables.TABLES.keys()


def test_a_table_is_replaced_where_its_markers_are(tmp_path) -> None:
    (tmp_path / "levels.json").write_text('{"rows": []}', encoding="utf-8")
    text = "before <!-- levels -->\nold\n<!-- /levels --> between <!-- int8 -->\nkept\n<!-- /int8 --> after"
    replaced = tables.with_tables(text, tmp_path)
    assert "old" not in replaced and "| weights | levels |" in replaced
    assert replaced.startswith("before <!-- levels -->\n\n| ")
    assert replaced.endswith("<!-- /levels --> between <!-- int8 -->\nkept\n<!-- /int8 --> after")
