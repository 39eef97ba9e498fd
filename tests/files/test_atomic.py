"""Files appear whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path

import pytest
from systems import WINDOWS, link, names_are_bytes, words

from nfq_core.errors import DiskFullError, NFQError, TargetExistsError
from nfq_core.files import atomic
from nfq_core.files.atomic import RETRY_SECONDS, SETTLED_SECONDS, AtomicFile, remove_leftovers

fcntl = atomic.fcntl
with_locks = pytest.mark.skipif(fcntl is None, reason="this system has no such locks")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_visible_before_the_commit(tmp_path):
    with AtomicFile(tmp_path / "a") as file:
        file.write_at(0, b"hello")
        assert not (tmp_path / "a").exists()
        file.commit()
        assert (tmp_path / "a").read_bytes() == b"hello"
    assert names(tmp_path) == ["a"]


def test_writes_may_come_in_any_order_and_gaps_are_zeros(tmp_path):
    with AtomicFile(tmp_path / "a") as file:
        file.write_at(4, memoryview(b"end"))
        file.write_at(0, b"go")
        file.write_at(2, b"")
        file.commit()
    assert (tmp_path / "a").read_bytes() == b"go\0\0end"


def test_without_a_commit_nothing_is_left(tmp_path):
    with AtomicFile(tmp_path / "a") as file:
        file.write_at(0, b"hello")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_error_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def fail() -> None:
        with AtomicFile(tmp_path / "a", overwrite=True) as file:
            file.write_at(0, b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_overwriting_when_asked(tmp_path):
    (tmp_path / "a").write_bytes(b"the old file, a longer one")
    with AtomicFile(tmp_path / "a", overwrite=True) as file:
        file.write_at(0, b"new")
        file.commit()
    assert (tmp_path / "a").read_bytes() == b"new"


def test_an_existing_target_is_refused_at_once(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(TargetExistsError, match=r"a exists already; overwrite=True overwrites it"):
        AtomicFile(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_target_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    with AtomicFile(tmp_path / "a") as file:
        file.write_at(0, b"mine")
        (tmp_path / "a").write_bytes(b"theirs")
        with pytest.raises(TargetExistsError):
            file.commit()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"theirs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_is_refused(tmp_path, overwrite):
    with pytest.raises(TargetExistsError, match="is a directory"):
        AtomicFile(tmp_path, overwrite)


def not_written(path) -> str:
    """The error of a file that cannot even be begun."""
    with pytest.raises(NFQError) as caught:
        AtomicFile(path)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "absent" / "a"
    assert not_written(path) == f"{path} could not be written: {os.strerror(errno.ENOENT)}; nothing was changed"
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    path = tmp_path / "f" / "a"
    reason = words(lambda: path.write_bytes(b""))
    assert not_written(path) == f"{path} could not be written: {reason}; nothing was changed"


def test_a_name_too_long_for_the_disk(tmp_path):
    reason = words(lambda: (tmp_path / ("a" * 260)).write_bytes(b""))
    assert reason in not_written(tmp_path / ("a" * 260))
    assert names(tmp_path) == []


ODD_NAMES = [
    "-rf",
    "--force",
    ".hidden",
    " a b ",
    "ä\N{SNOWMAN}",
    "モデル" * 20,
    "a" * 101,
    "a" * 242,
    "a" * 255,
    "é" * 127,
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_every_name_that_the_disk_takes(tmp_path, name):
    try:
        (tmp_path / name).write_bytes(b"old")
    except OSError:
        pytest.skip("this file system does not take the name")
    found = names(tmp_path)
    with AtomicFile(tmp_path / name, overwrite=True) as file:
        # A killed writer's file is found by its long name, too.
        assert remove_leftovers(tmp_path / name) or fcntl is None
        file.write_at(0, b"whole")
        file.commit()
    assert names(tmp_path) == found
    assert (tmp_path / name).read_bytes() == b"whole"


@names_are_bytes
@pytest.mark.parametrize("name", [b"\xff", b"\xe3" * 255], ids=["short", "long"])
def test_a_name_that_is_no_text(tmp_path, name):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    with AtomicFile(path) as file:
        file.commit()
    assert os.listdir(os.fsencode(tmp_path)) == [name]


def test_names_that_begin_alike_do_not_share_leftovers(tmp_path):
    with AtomicFile(tmp_path / ("a" * 240 + "b")):
        assert not remove_leftovers(tmp_path / ("a" * 240 + "c"))


def failing(monkeypatch, number: int, times: int, call: str = "replace") -> list[float]:
    """Have a call of `os` fail so often; returns what is slept, which takes no time."""
    slept: list[float] = []
    real, left = getattr(os, call), [number] * times

    def fail(*arguments: object, **named: object) -> object:
        if left:
            raise OSError(left.pop(), os.strerror(number))
        return real(*arguments, **named)

    monkeypatch.setattr(os, call, fail)
    monkeypatch.setattr(atomic.time, "sleep", slept.append)
    return slept


def test_a_disk_that_fails_before_the_file_is_whole(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    with AtomicFile(tmp_path / "a", overwrite=True) as file:
        file.write_at(0, b"new")
        with monkeypatch.context() as patch:
            failing(patch, errno.ENOSPC, 1, "fsync")
            told = f"a could not be written: {re.escape(os.strerror(errno.ENOSPC))}; nothing was changed"
            with pytest.raises(DiskFullError, match=told):
                file.commit()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY])
def test_another_program_that_holds_a_file_for_a_moment_is_waited_for(tmp_path, monkeypatch, number):
    (tmp_path / "a").write_bytes(b"old")
    slept = failing(monkeypatch, number, len(RETRY_SECONDS))
    with AtomicFile(tmp_path / "a", overwrite=True) as file:
        file.write_at(0, b"new")
        file.commit()
    assert slept == list(RETRY_SECONDS)
    assert 3 < sum(slept) < 15
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("number", "error", "sleeps"),
    [
        (errno.EACCES, NFQError, len(RETRY_SECONDS)),
        (errno.EBUSY, NFQError, len(RETRY_SECONDS)),
        (errno.ENOSPC, DiskFullError, 0),
        (errno.EIO, NFQError, 0),
    ],
)
@pytest.mark.parametrize("held", ["target", "both"])
def test_a_finished_file_is_never_thrown_away(tmp_path, monkeypatch, number, error, sleeps, held):
    """Whether only its name cannot be had, or it cannot be renamed at all."""
    (tmp_path / "a").write_bytes(b"old")
    renames = 1 + (held == "both")
    slept = failing(monkeypatch, number, renames * (sleeps + 1))
    with AtomicFile(tmp_path / "a", overwrite=True) as file, pytest.raises(error) as caught:
        file.write_at(0, b"new")
        file.commit()
    assert len(slept) == renames * sleeps
    kept = next(path for path in tmp_path.iterdir() if path.name != "a")
    assert kept.read_bytes() == b"new"
    assert (tmp_path / "a").read_bytes() == b"old"
    reason = f"the finished file could not be renamed: {os.strerror(number)}; it is kept as {kept}"
    assert f"{tmp_path / 'a'}: {reason}" in str(caught.value)
    if held == "target":
        # The next write removes what killed writers left, but not this.
        leave(kept.with_name(LEFTOVER))
        assert not remove_leftovers(tmp_path / "a")
        assert names(tmp_path) == sorted(["a", kept.name])


def test_an_unfinished_file_that_another_program_holds(tmp_path, monkeypatch):
    """It is waited for, and never hides what went wrong."""
    slept: list[float] = []

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "held")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="what went wrong"), AtomicFile(tmp_path / "a"):
        patch.setattr(Path, "unlink", refuse)
        patch.setattr(atomic.time, "sleep", slept.append)
        raise ValueError("what went wrong")
    assert slept == list(RETRY_SECONDS)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_flush(tmp_path, monkeypatch, number):
    failing(monkeypatch, number, 1, "fsync")
    with AtomicFile(tmp_path / "a") as file:
        file.write_at(0, b"whole")
        file.commit()
    assert (tmp_path / "a").read_bytes() == b"whole"


LEFTOVER = ".a.0123abcd.tmp"


def leave(path):
    """What a writer left that was killed a while ago."""
    path.write_bytes(b"half a fi")
    before = time.time() - 2 * SETTLED_SECONDS
    os.utime(path, (before, before))


def test_the_next_write_removes_what_a_killed_writer_left(tmp_path):
    leave(tmp_path / LEFTOVER)
    with AtomicFile(tmp_path / "a") as file:
        file.commit()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "name", [".ab.0123abcd.tmp", "a.0123abcd.tmp", ".a.0123abcd.tmp2", ".a.0123ABCD.tmp", ".a.tmp", ".a.0123abcde.tmp"]
)
def test_files_of_other_names_stay(tmp_path, name):
    leave(tmp_path / name)
    assert not remove_leftovers(tmp_path / "a")
    assert names(tmp_path) == [name]


def test_a_folder_or_link_with_such_a_name_stays(tmp_path):
    (tmp_path / "precious").write_bytes(b"!")
    (tmp_path / ".a.00000000.tmp").mkdir()
    link(tmp_path / ".a.00000001.tmp", tmp_path / "precious")
    assert not remove_leftovers(tmp_path / "a")
    assert names(tmp_path) == [".a.00000000.tmp", ".a.00000001.tmp", "precious"]


def test_names_with_the_signs_of_patterns(tmp_path):
    leave(tmp_path / ".[a].0123abcd.tmp")
    leave(tmp_path / LEFTOVER)
    assert not remove_leftovers(tmp_path / "[a]")
    assert names(tmp_path) == [LEFTOVER]


def test_a_writer_at_work_is_told_and_left_alone(tmp_path):
    with AtomicFile(tmp_path / "a") as file:
        assert remove_leftovers(tmp_path / "a")
        assert not remove_leftovers(tmp_path / "b")
        file.write_at(0, b"whole")
        file.commit()
        assert not remove_leftovers(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"whole"


@with_locks
def test_a_file_is_held_until_it_has_its_name(tmp_path, monkeypatch):
    rename, held = os.replace, []

    def replace(source, target):
        held.append(remove_leftovers(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with AtomicFile(tmp_path / "a") as file:
        file.commit()
    assert held == [True]
    assert names(tmp_path) == ["a"]


def test_leftovers_of_what_a_link_points_to(tmp_path):
    (tmp_path / "far").mkdir()
    link(tmp_path / "a", tmp_path / "far" / "b")
    leave(tmp_path / "far" / ".b.0123abcd.tmp")
    assert not remove_leftovers(tmp_path / "a")
    assert names(tmp_path / "far") == []


@with_locks
def test_a_new_file_that_another_writer_takes_for_a_leftover(tmp_path, monkeypatch):
    """The other one comes between the file's making and its lock: it has removed the file, or holds it and will."""
    faults = ["held", "held and removed", "removed"]
    held: list[str] = []
    lock = fcntl.flock

    def disturbed(file, operation):
        fault = faults.pop() if faults else ""
        if "removed" in fault:
            os.unlink(file.name)
        if fault == "held":
            held.append(file.name)
        if "held" in fault:
            raise BlockingIOError
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", disturbed)
    with AtomicFile(tmp_path / "a") as file:
        os.unlink(held.pop())
        file.write_at(0, b"whole")
        file.commit()
    assert not faults
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


@with_locks
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Nobody can tell there whether a writer lives, so nothing is removed."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    leave(tmp_path / LEFTOVER)
    with AtomicFile(tmp_path / "a") as file:
        assert not remove_leftovers(tmp_path / "a")
        file.commit()
    assert names(tmp_path) == [LEFTOVER, "a"]


def test_a_system_without_locks(tmp_path, monkeypatch):
    """As on Windows: who has a file open keeps others from renaming it; one that was just closed is about to be."""
    monkeypatch.setattr(atomic, "fcntl", None)
    with AtomicFile(tmp_path / "a") as file:
        # Elsewhere an open file can be renamed.
        assert remove_leftovers(tmp_path / "a") == WINDOWS
        file.commit()
    assert names(tmp_path) == ["a"]
    leave(tmp_path / LEFTOVER)

    def refuse(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert remove_leftovers(tmp_path / "a")
    assert names(tmp_path) == [LEFTOVER, "a"]
    assert not remove_leftovers(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_spent_quota_is_a_full_disk(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fail)
    with AtomicFile(tmp_path / "a") as file, pytest.raises(DiskFullError, match=re.escape(os.strerror(errno.EDQUOT))):
        file.commit()
    assert names(tmp_path) == []


def test_two_writers_of_one_target_do_not_mix(tmp_path):
    with AtomicFile(tmp_path / "a", overwrite=True) as first, AtomicFile(tmp_path / "a", overwrite=True) as second:
        first.write_at(0, b"first")
        second.write_at(0, b"2nd")
        second.commit()
        first.commit()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"
