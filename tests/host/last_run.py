"""Keeps the counts of the last full run of these tests on each host version in `last_run.json`, next to this file."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

NAME = "last_run.json"
OUTCOMES = ("failed", "skipped", "passed")
"""Worst first: a test's outcome is the worst of its set-up, call and tear-down."""

TOO_OLD = "this host"
"""What the reason of a skipped test contains if the host's version lacks what the test is about."""

DIRTY = "-dirty"
UNKNOWN = "unknown"


class Recorder:
    """A pytest plugin that writes an entry after a full run, and reports on the terminal whether it did.

    Args:
        config: the run's configuration.
        here: the folder whose tests are recorded.
        host: returns the versions under test, `host` and `front_end`.
    """

    def __init__(self, config: pytest.Config, here: Path, host: Callable[[], dict[str, str]]) -> None:
        self.config, self.here, self.host = config, here, host
        self.commit = commit(here)
        self.collected: dict[str, Path] = {}
        self.deselected = 0
        self.outcomes: dict[str, str] = {}
        self.too_old: set[str] = set()
        self.summary = ""

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += sum(self.here in item.path.parents for item in items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = {item.nodeid: item.path for item in session.items if self.here in item.path.parents}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.collected and (report.when == "call" or report.outcome != "passed"):
            known = self.outcomes.get(report.nodeid, "passed")
            self.outcomes[report.nodeid] = min(known, report.outcome, key=OUTCOMES.index)
            if report.outcome == "skipped" and TOO_OLD in str(report.longrepr):
                self.too_old.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if hasattr(self.config, "workerinput") or not any(self.here in (p, *p.parents) for p in asked_for(self.config)):
            return
        reason = self.not_full(exitstatus)
        if reason is None:
            try:
                entry = self.entry()
                write(self.here / NAME, entry)
                counts = ", ".join(f"{entry[outcome]} {outcome}" for outcome in reversed(OUTCOMES))
                self.summary = f"{NAME} written: ComfyUI {entry['host']}, front end {entry['front_end']}: {counts}"
            except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                reason = str(error)
        if reason is not None:
            self.summary = f"{NAME} not written: {reason}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.summary:
            terminalreporter.write_line(self.summary)

    def not_full(self, exitstatus: int) -> str | None:
        """Why this was not a full run; None if it was one."""
        option = self.config.option
        if self.here not in asked_for(self.config):
            return "only a part of the tests was asked for"
        if option.collectonly or option.setuponly or option.setupplan:
            return "no test was to run"
        if getattr(option, "dist", "no") != "no":
            return "several processes shared the tests"
        if self.deselected:
            return f"{self.deselected} tests were deselected"
        missing = {path for path in self.here.rglob("test_*.py")} - set(self.collected.values())
        if missing:
            return f"{self._names(missing)} not collected"
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return "the run was interrupted"
        never = len(self.collected) - len(self.outcomes)
        if never:
            return f"{never} tests never ran"
        ran = {
            path for test, path in self.collected.items() if self.outcomes[test] != "skipped" or test in self.too_old
        }
        if skipped := set(self.collected.values()) - ran:
            return f"{self._names(skipped)} skipped"
        return None

    def _names(self, paths: set[Path]) -> str:
        names = sorted(path.relative_to(self.here).as_posix() for path in paths)
        return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"

    def entry(self) -> dict[str, str | int]:
        """The entry for this run."""
        before, after = self.commit, commit(self.here)
        outcomes = list(self.outcomes.values())
        return {
            **self.host(),
            # If files changed during the run, the commit does not describe them.
            "commit": before if before == after or before.endswith(DIRTY) else before + DIRTY,
            **{outcome: outcomes.count(outcome) for outcome in reversed(OUTCOMES)},
            "date": datetime.now(timezone.utc).date().isoformat(),
        }


def asked_for(config: pytest.Config) -> list[Path]:
    """The files and folders named on the command line."""
    return [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]


def host_versions(path: Path, python: str) -> dict[str, str]:
    """The versions of the ComfyUI in a folder and of the front end in its Python."""
    (version,) = re.findall(r'__version__ = "([^"]+)"', (path / "comfyui_version.py").read_text("utf-8"))
    ask = "from importlib.metadata import version; print(version('comfyui-frontend-package'))"
    result = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    return {"host": version, "front_end": result.stdout.strip()}


def commit(folder: Path) -> str:
    """The commit of a folder's repository, marked if the working tree differs from it (the record itself excepted)."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", ":/", f":(exclude){NAME}")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return head + DIRTY if changed else head


def write(path: Path, entry: dict) -> None:
    """Write an entry to the file at `path` in place of the same host's; ValueError if the file is not a list."""
    entries = []
    if path.exists():
        try:
            entries = [old for old in json.loads(path.read_text("utf-8")) if old["host"] != entry["host"]]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is not a list of entries; delete it") from None
    entries = sorted([*entries, entry], key=lambda each: [int(part) for part in re.findall(r"\d+", each["host"])])
    partial = path.with_name(f"{NAME}.tmp")
    partial.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    os.replace(partial, path)
