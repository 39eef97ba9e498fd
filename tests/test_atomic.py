"""Files appear whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os

import pytest

from nfq_core.atomic import AtomicFile
from nfq_core.errors import NFQError, TargetExistsError


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
    with pytest.raises(TargetExistsError, match=r"a exists already; --force overwrites it"):
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


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        NFQError, match=r"absent/a could not be written: No such file or directory; nothing was changed"
    ):
        AtomicFile(tmp_path / "absent" / "a")
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(NFQError, match=r"f/a could not be written: Not a directory"):
        AtomicFile(tmp_path / "f" / "a")


def test_a_name_too_long_for_the_disk(tmp_path):
    with pytest.raises(NFQError, match="File name too long"):
        AtomicFile(tmp_path / ("a" * 250))
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_last_moment(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with AtomicFile(tmp_path / "a", overwrite=True) as file:
        file.write_at(0, b"new")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(NFQError, match=r"a could not be written: No space left on device; nothing was changed"):
                file.commit()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_two_writers_of_one_target_do_not_mix(tmp_path):
    with AtomicFile(tmp_path / "a", overwrite=True) as first, AtomicFile(tmp_path / "a", overwrite=True) as second:
        first.write_at(0, b"first")
        second.write_at(0, b"2nd")
        second.commit()
        first.commit()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"
