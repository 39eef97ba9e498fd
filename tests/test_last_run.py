"""What a full run of `tests/host` leaves in `last_run.json`, and which runs leave nothing; no host is needed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

MODULE = Path(__file__).parent / "host" / "last_run.py"
_spec = importlib.util.spec_from_file_location("last_run_under_test", MODULE)
last_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(last_run)

CONFTEST = """
from pathlib import Path
from last_run import Recorder

def pytest_configure(config):
    host = lambda: {"host": "0.33.0", "front_end": "1.49.6"}
    config.pluginmanager.register(Recorder(config, Path(__file__).resolve().parent, host))
"""
NODES = """
import pytest

def test_passes(): pass

def test_fails(): assert False

def test_skips(): pytest.skip("not here")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("in its tear-down")

def test_fails_late(broken): pass
"""
BROWSER = """
import os, pytest

def test_recorded_page():
    if reason := os.environ.get("NO_BROWSER"): pytest.skip(reason)
    if os.environ.get("STOPPED"): raise KeyboardInterrupt
"""
OTHER = {
    "host": "0.8.0",
    "front_end": "1.35.9",
    "commit": "c0ffee",
    "passed": 1,
    "failed": 0,
    "skipped": 0,
    "date": "-",
}


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project whose `tests/host` has four tests and one of the page, and a record of another host's run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    host = pytester.path / "tests" / "host"
    (host / "browser").mkdir(parents=True)
    shutil.copy(MODULE, host)
    (host / "conftest.py").write_text(CONFTEST)
    (host / "test_recorded_nodes.py").write_text(NODES)
    (host / "browser" / "test_recorded_page.py").write_text(BROWSER)
    (pytester.path / "tests" / "test_unit.py").write_text("def test_unit(): pass\n")
    last_run.write(host / "last_run.json", OTHER)
    return pytester


def run(project: pytest.Pytester, *arguments: str, apart: bool = False) -> tuple[list[dict], str]:
    """The record after a run, in a process of its own or in this one, and what the run said of it."""
    start = project.runpytest_subprocess if apart else project.runpytest_inprocess
    output = start("-p", "no:cacheprovider", *arguments).outlines
    told = [line for line in output if line.startswith("last_run.json")]
    return json.loads((project.path / "tests" / "host" / "last_run.json").read_text()), "\n".join(told)


def test_a_full_run_is_recorded_whatever_it_gave(project: pytest.Pytester) -> None:
    before = datetime.now(timezone.utc).date().isoformat()
    (other, entry), told = run(project, "tests/host")
    assert other == OTHER
    assert before <= entry.pop("date") <= datetime.now(timezone.utc).date().isoformat()
    assert entry == {
        "host": "0.33.0",
        "front_end": "1.49.6",
        "commit": last_run.commit(project.path),
        "passed": 2,
        "failed": 2,
        "skipped": 1,
    }
    assert told == "last_run.json written: ComfyUI 0.33.0, front end 1.49.6: 2 passed, 1 skipped, 2 failed"


def test_only_its_own_tests_are_counted(project: pytest.Pytester) -> None:
    (_, entry), _ = run(project, "tests/test_unit.py", "tests/host")
    assert (entry["passed"], entry["failed"], entry["skipped"]) == (2, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tests/host/test_recorded_nodes.py"], "only a part of the tests was asked for"),
        (["tests/host/browser"], "only a part of the tests was asked for"),
        (["tests/host/test_recorded_nodes.py", "tests/host/browser"], "only a part of the tests was asked for"),
        (["tests/host/test_recorded_nodes.py::test_passes"], "only a part of the tests was asked for"),
        (["tests/host", "-k", "not skips"], "1 tests were deselected"),
        (["tests/host", "-m", "smoke"], "5 tests were deselected"),
        (["tests/host", "--deselect", "tests/host/test_recorded_nodes.py::test_passes"], "1 tests were deselected"),
        (["tests/host", "--ignore", "tests/host/browser"], "browser/test_recorded_page.py was not collected"),
        (
            ["tests/host", "--ignore-glob", "*test_*"],
            "browser/test_recorded_page.py, test_recorded_nodes.py were not collected",
        ),
        (["tests/host", "-x"], "2 tests never ran"),
        (["tests/host", "--collect-only"], "no test was to run"),
        (["tests/host", "--setup-plan"], "no test was to run"),
    ],
)
def test_a_partial_run_is_not(project: pytest.Pytester, arguments: list[str], reason: str) -> None:
    entries, told = run(project, *arguments)
    assert entries == [OTHER]
    assert told == f"last_run.json not written: {reason}"


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("NO_BROWSER", "browser/test_recorded_page.py was skipped"), ("STOPPED", "the run was interrupted")],
)
def test_nor_is_one_without_a_browser_or_stopped(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, variable: str, reason: str
) -> None:
    monkeypatch.setenv(variable, "no Chromium")
    assert run(project, "tests/host", apart=True) == ([OTHER], f"last_run.json not written: {reason}")


def test_a_file_that_the_host_is_too_old_for_may_be_skipped(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_BROWSER", "this host has no such page")
    (_, entry), _ = run(project, "tests/host", apart=True)
    assert entry["skipped"] == 2


def test_nor_is_one_with_a_broken_file(project: pytest.Pytester) -> None:
    (project.path / "tests" / "host" / "test_recorded_fault.py").write_text("import nothing_of_that_name\n")
    entries, told = run(project, "tests/host", "--continue-on-collection-errors")
    assert entries == [OTHER] and told == "last_run.json not written: test_recorded_fault.py was not collected"


def test_nor_is_one_that_several_processes_share(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    entries, told = run(project, "tests/host", "-p", "xdist", "-n", "2", apart=True)
    assert entries == [OTHER] and told == "last_run.json not written: several processes shared the tests"


def test_other_tests_say_nothing(project: pytest.Pytester) -> None:
    assert run(project, "tests/test_unit.py") == ([OTHER], "")
    assert run(project, "tests") == ([OTHER], "")


def test_a_record_that_holds_no_entries_is_left(project: pytest.Pytester) -> None:
    path = project.path / "tests" / "host" / "last_run.json"
    path.write_text('{"0.8.0": 1}')
    entries, told = run(project, "tests/host")
    assert entries == {"0.8.0": 1} and told.endswith("last_run.json is not a list of entries; delete it")


def test_an_entry_replaces_that_of_its_host(tmp_path: Path) -> None:
    path = tmp_path / "last_run.json"
    for host, passed in (("0.33.0", 1), ("0.8.0", 2), ("0.22.0", 3), ("0.33.0", 4)):
        last_run.write(path, {"host": host, "passed": passed})
    assert [(each["host"], each["passed"]) for each in json.loads(path.read_text())] == [
        ("0.8.0", 2),
        ("0.22.0", 3),
        ("0.33.0", 4),
    ]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_marked_where_the_tree_differs(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        person = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        command = ["git", "-C", str(tmp_path), *person, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    here = tmp_path / "tests" / "host"
    here.mkdir(parents=True)
    for path in (tmp_path / "code.py", here / "last_run.json"):
        path.write_text("[]")
    git("add", "-A")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    (here / "last_run.json").write_text("[1]")
    assert last_run.commit(here) == head
    (tmp_path / "new.py").write_text("")
    assert last_run.commit(here) == f"{head}-dirty"
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("changed")
    assert last_run.commit(here) == f"{head}-dirty"


def test_versions_of_a_host(tmp_path: Path) -> None:
    (tmp_path / "comfyui_version.py").write_text('# Made by a build.\n__version__ = "0.33.0"\n')
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 1.49.6\n")
    python.chmod(0o755)
    assert last_run.host_versions(tmp_path, str(python)) == {"host": "0.33.0", "front_end": "1.49.6"}
