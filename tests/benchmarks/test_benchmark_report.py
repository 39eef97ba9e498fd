"""What every benchmark writes: the command as it was given, and no part of a run in place of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest

from benchmarks import shared as report
from benchmarks.quality import sizes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ""),
        (["--only", "tiny", "4.15", "--seed", "1e-3"], " --only tiny 4.15 --seed 1e-3"),
        (["--dir", "/home/somebody/data/", "--out=/tmp/more/out.json"], " --dir data --out=out.json"),
        (["--architecture", "Segmind Vega", "--dir", "."], " --architecture 'Segmind Vega' --dir ."),
    ],
)
def test_the_command_is_the_one_that_was_given(tmp_path, monkeypatch, arguments: list[str], told: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(report.ROOT / "benchmarks" / "one.py"), *arguments])
    path = report.write_results("one", {"rows": [1]}, tmp_path / "new" / "results.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"] == f"python -m benchmarks.one{told}"
    assert written["rows"] == [1] and written["machine"] == report.machine()


def test_the_tables_are_made_where_there_is_no_module_resource() -> None:
    """As on Windows."""
    code = "import sys; sys.modules['resource'] = None; import benchmarks.tables"
    subprocess.run([sys.executable, "-c", code], cwd=report.ROOT, check=True)


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def seconds(call) -> float:
        call()
        return float(len(called))

    contestants = {name: partial(called.append, name) for name in "ab"}
    assert report.in_turns(contestants, 2, seconds) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(called) == "ababab"


def test_some_sizes_do_not_replace_the_results_of_all(capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        sizes.main(["--only", "tiny"])
    assert refused.value.code == 2 and "--only needs --out" in capsys.readouterr().err
