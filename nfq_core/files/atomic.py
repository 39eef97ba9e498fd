"""Files that appear whole or not at all, also when their writer is killed.

A temporary file is held by its writer: under POSIX by a lock, which ends with the process however that ends; under
Windows by being open, for there an open file cannot be removed. One that nobody holds was left behind by a writer that
was killed, and the next write to its target removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from ..errors import DiskFullError, NFQError, TargetExistsError, reason_of

try:
    import fcntl
except ImportError:
    fcntl = None

SETTLED_SECONDS = 60
"""Under Windows a temporary file younger than this is left: its writer has to close it before it can rename it."""

RETRY_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Pauses between tries to rename or remove a file: a virus scanner or indexer may hold a new file for a moment."""

BUSY = (errno.EACCES, errno.EPERM, errno.EBUSY)
"""What a file that another program holds is refused with; Windows' sharing and lock violations are EACCES."""

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems that cannot flush a file on request answer, such as some in user space and on networks."""

MAX_PLAIN_BYTES = 100
"""Of a target's name. A longer one is replaced by its hash in the temporary file's name, which has a limit, too."""

TEMPORARY_ENDING = r"\.[0-9a-f]{8}\.tmp"
"""A pattern of what follows a dot and the target's name, or its hash, in a temporary file's."""


def write_whole(path: str | os.PathLike, data: bytes, overwrite: bool = False) -> None:
    """Write a file that appears whole or not at all; see `AtomicFile`."""
    with AtomicFile(path, overwrite) as file:
        file.write_at(0, data)
        file.commit()


def prepare_folder(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Make a folder, if it is missing, that files of these names are about to be written to.

    Raises:
        TargetExistsError: one of them is there already and `overwrite` is false.
        NFQError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NFQError(f"{folder} cannot be made a folder: {reason_of(error)}") from None
    if not os.access(folder, os.W_OK):
        raise NFQError(f"{folder} cannot be written; name another folder")
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is not None and not overwrite:
        raise TargetExistsError(f"{found} exists already; --force overwrites it")


class AtomicFile:
    """A file that appears under its name only when it is complete.

    Everything goes to a temporary file beside the target; `commit` flushes it to disk and renames it. Leaving the
    `with` block without a commit removes it, and whatever stood under the name stays. A complete file that cannot be
    renamed, after some seconds of trying, is kept; the error names it.

    Raises:
        TargetExistsError: the target exists and `overwrite` is false.
        DiskFullError: the disk is full.
        NFQError: the folder is missing or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        # A link stays a link: what it points to is replaced.
        self._target = Path(os.path.realpath(self.path))
        with named_errors(self.path):
            self._refuse_existing()
            remove_leftovers(self._target)
            self._file, temporary = _held_file(self._target)
        self._temporary: Path | None = temporary
        """None: it is kept."""

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self._file.close()
        if self._temporary is None:
            return
        # One that another program holds for longer is left; the next write to the same target removes it.
        with suppress(OSError):
            _patiently(lambda: self._temporary.unlink(missing_ok=True))

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset; gaps are filled with zeros."""
        with named_errors(self.path):
            self._file.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self) -> None:
        """Make the file durable and visible under its name."""
        with named_errors(self.path):
            _flush(self._file)
            if fcntl is None:
                # Windows renames no open file; elsewhere it is held until it has its name.
                self._file.close()
            self._refuse_existing()
        try:
            _patiently(lambda: os.replace(self._temporary, self._target))
        except OSError as error:
            kept = self._keep()
            raise _kind(error)(
                f"{self.path} could not be given its name: {reason_of(error)}; the finished file is {kept}, "
                "close what uses the old one and rename it before you write to this name again"
            ) from None
        self._file.close()
        # The file is there now; not every system can make a folder's change durable on request.
        with suppress(OSError, AttributeError):
            folder = os.open(self._target.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _keep(self) -> Path:
        """Give the finished temporary file a name that no later write removes, if that can be; returns where it is."""
        finished = self._temporary.with_name(self._temporary.name.removeprefix(".").removesuffix(".tmp") + ".finished")
        with suppress(OSError):
            _patiently(lambda: os.replace(self._temporary, finished))
            self._temporary = finished
        kept, self._temporary = self._temporary, None
        self._file.close()
        return kept

    def _refuse_existing(self) -> None:
        if self._target.is_dir():
            raise TargetExistsError(f"{self.path} is a directory; name a file in it")
        if self._target.exists() and not self._target.is_file():
            raise TargetExistsError(f"{self.path} is not a regular file; name another")
        if not self._overwrite and self._target.exists():
            raise TargetExistsError(f"{self.path} exists already; --force overwrites it")


def file_identity(path: str | os.PathLike) -> object:
    """What two names of one file or folder have in common; OSError where there is none.

    It is what the system numbers it by or, on disks that number nothing, such as some on networks, where links lead.
    """
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.normcase(os.path.realpath(path))


def is_same_file(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two names lead to one file or folder; OSError where one of them leads nowhere."""
    return file_identity(path) == file_identity(other)


@contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Has an OSError that is raised inside say which file could not be written, as NFQError or DiskFullError."""
    try:
        yield
    except OSError as error:
        raise _kind(error)(f"{path} could not be written: {reason_of(error)}; nothing was changed") from None


def _kind(error: OSError) -> type[NFQError]:
    return DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else NFQError


def _patiently(call: Callable[[], object]) -> None:
    """Call something that another program's hold on a file may make fail, again after each of RETRY_SECONDS."""
    for seconds in RETRY_SECONDS:
        try:
            call()
            return
        except OSError as error:
            if error.errno not in BUSY:
                raise
            time.sleep(seconds)
    call()


def _flush(file: FileIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def remove_leftovers(path: str | os.PathLike) -> bool:
    """Remove the temporary files of `path` whose writers were killed.

    Returns:
        Whether another writer is at work on `path` now.
    """
    target = Path(os.path.realpath(path))
    ours = re.compile(re.escape(f".{_stem(target.name)}") + TEMPORARY_ENDING)
    at_work = False
    # Who may not list the folder, or not touch such a file, leaves them to somebody who may.
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if ours.fullmatch(name):
                with suppress(OSError):
                    at_work |= not _removed(target.with_name(name))
    return at_work


def _stem(name: str) -> str:
    """What stands for a target's name in the names of its temporary files."""
    raw = os.fsencode(name)
    return name if len(raw) <= MAX_PLAIN_BYTES else hashlib.sha256(raw).hexdigest()[:32]


def _removed(temporary: Path) -> bool:
    """Remove a temporary file unless it is held; returns False when it is. OSError when neither can be told."""
    status = os.lstat(temporary)
    if not stat.S_ISREG(status.st_mode):
        return True
    if fcntl is None:
        try:
            # Windows renames no open file, not even to its own name.
            os.rename(temporary, temporary)
        except PermissionError:
            return False
        if time.time() - status.st_mtime > SETTLED_SECONDS:
            temporary.unlink()
        return True
    # Network file systems lock only what is open for writing.
    with open(temporary, "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        temporary.unlink()
    return True


def _held_file(target: Path) -> tuple[FileIO, Path]:
    """A new temporary file for `target`, open for writing and held."""
    while True:
        temporary = target.with_name(f".{_stem(target.name)}.{secrets.token_hex(4)}.tmp")
        file = open(temporary, "xb", buffering=0)  # noqa: SIM115
        if fcntl is None:
            return file, temporary
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another writer has taken the new file for a leftover and is about to remove it.
            file.close()
            continue
        except OSError:
            # A file system without locks: nobody else can lock the file there either, and so it is never removed.
            return file, temporary
        # Another writer may have taken the new file for a leftover before it was locked.
        if temporary.exists():
            return file, temporary
        file.close()
