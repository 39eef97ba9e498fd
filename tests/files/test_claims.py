"""Claims: one process has a target, a dead one's claim is taken over, on its own machine and on others."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nfq_core.errors import NFQError
from nfq_core.files import claims
from nfq_core.files.claims import Claims


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.nfq.safetensors"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HOLDING_SECONDS", 0.01)
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)


def owner(target: Path, of: Claims | None = None) -> str:
    with (of or Claims()).claim(target) as found:
        return found


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def forged(target: Path, machine: str, number: int = 1) -> Path:
    """The claim of a process that was killed."""
    path = target.with_name(f".{target.name}.{number}.claim")
    path.write_text(json.dumps({"machine": machine, "process": 1}))
    return path


def test_a_target_has_one_owner_until_the_work_is_done(target: Path) -> None:
    with Claims().claim(target) as first:
        assert first == ""
        assert names(target) == [f".{target.name}.1.claim"]
        assert owner(target) == f"process {os.getpid()} on {platform.node()}"
        assert owner(target.with_name("other")) == ""
    assert names(target) == []
    assert owner(target) == ""


def test_of_many_at_once_one_is_the_owner(target: Path) -> None:
    def attempt(_: int) -> str:
        with Claims().claim(target) as found:
            time.sleep(0.5 if found == "" else 0)
            return found

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, range(8))).count("") == 1
    assert names(target) == []


def test_a_failure_ends_the_claim(target: Path) -> None:
    with pytest.raises(KeyError), Claims().claim(target):
        raise KeyError
    assert names(target) == []


def test_a_killed_process_on_this_machine_loses_its_claim_at_once(target: Path) -> None:
    code = "import sys, time; from pathlib import Path; from nfq_core.files.claims import Claims\n"
    code += "with Claims().claim(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert owner(target) == f"process {process.pid} on {platform.node()}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert names(target) == [f".{target.name}.1.claim"]
    with Claims().claim(target) as found:
        assert found == ""
        assert names(target) == [f".{target.name}.{number}.claim" for number in (1, 2)]
        assert owner(target).startswith("process")
    assert names(target) == []


def test_another_machine_keeps_its_claim_while_its_heart_beats(target: Path, quick: None) -> None:
    claim, watching = forged(target, "elsewhere"), Claims()
    for beat in range(5):
        os.utime(claim, (beat, beat))
        assert owner(target, watching) == "process 1 on elsewhere"
        time.sleep(0.06)


def test_another_machine_loses_its_claim_when_its_heart_stops(target: Path, quick: None) -> None:
    forged(target, "elsewhere")
    watching = Claims()
    assert owner(target, watching) == "process 1 on elsewhere"
    time.sleep(0.15)
    assert owner(target) == "process 1 on elsewhere", "who looks for the first time cannot know"
    assert owner(target, watching) == ""
    assert names(target) == []


def test_the_heart_beats(target: Path, quick: None) -> None:
    with Claims().claim(target):
        claim = target.with_name(f".{target.name}.1.claim")
        os.utime(claim, (1, 1))
        deadline = time.monotonic() + 30
        while claim.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_was_taken_for_dead_leaves_the_newer_claim_alone(target: Path) -> None:
    with Claims().claim(target):
        newer = forged(target, "elsewhere", 2)
    assert names(target) == [newer.name]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff" * 5000, b'{"machine": "x\\u001b[1m"}'])
def test_a_claim_that_cannot_be_read(target: Path, quick: None, text: bytes) -> None:
    """Its owner may be about to write it, or was killed before."""
    target.with_name(f".{target.name}.1.claim").write_bytes(text)
    watching = Claims()
    assert owner(target, watching) == "process ? on ?"
    time.sleep(0.15)
    assert owner(target, watching) == ""


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NFQError, match="could not be written"):
        owner(tmp_path / "absent" / "model")
