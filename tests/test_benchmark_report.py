"""What every benchmark writes: the command as it was given, and no part of a run in place of the whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import report, sizes


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
    monkeypatch.setattr(sys, "argv", ["/home/somebody/benchmarks/one.py", *arguments])
    path = report.write_results("one", {"rows": [1]}, tmp_path / "new" / "results.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"] == f"python -m benchmarks.one{told}"
    assert written["rows"] == [1] and written["machine"] == report.machine()


def test_the_tables_are_made_where_there_is_no_module_resource() -> None:
    """As on Windows."""
    code = "import sys; sys.modules['resource'] = None; import benchmarks.tables"
    subprocess.run([sys.executable, "-c", code], cwd=report.ROOT, check=True)


def test_some_sizes_do_not_replace_the_results_of_all(capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        sizes.main(["--only", "tiny"])
    assert refused.value.code == 2 and "--only needs --out" in capsys.readouterr().err
