"""Atomic writes: a file appears complete or not at all, even if its writer is killed.

A writer holds its temporary file: on POSIX by a lock, which ends with the process; on Windows by keeping it open,
because an open file cannot be removed there. A temporary file that nobody holds is the leftover of a killed writer; the
next write to the same target removes it.
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

from ..errors import OVERWRITE, DiskFullError, NFQError, TargetExistsError, reason_of

try:
    import fcntl
except ImportError:
    fcntl = None

SETTLED_SECONDS = 60
"""On Windows, younger temporary files are not removed: a writer must close its file before it can rename it."""

RETRY_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Pauses before retrying to rename or remove a file that a virus scanner or indexer may hold."""

BUSY = (errno.EACCES, errno.EPERM, errno.EBUSY)
"""Errors for a file that another program holds; Windows' sharing and lock violations are EACCES."""

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that do not support flushing a file, such as some network and user-space ones."""

MAX_PLAIN_BYTES = 100
"""Longest target name that appears in the temporary file's name; a longer one is replaced by its hash."""

TEMPORARY_ENDING = r"\.[0-9a-f]{8}\.tmp"
"""Pattern of a temporary file's name after a dot and the target's name or hash."""


def write_whole(path: str | os.PathLike, data: bytes, overwrite: bool = False) -> None:
    """Write a file atomically, see `AtomicFile`."""
    with AtomicFile(path, overwrite) as file:
        file.write_at(0, data)
        file.commit()


def refuse_unwritable(path: str | os.PathLike, overwrite: bool) -> None:
    """Raise NFQError if `AtomicFile` could not write a file here, before long work whose result it will hold."""
    AtomicFile(path, overwrite).discard()


def prepare_folder(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Create a folder if it is missing, and check that files of these names can be written to it.

    Raises:
        TargetExistsError: one of them exists and `overwrite` is false.
        NFQError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NFQError(f"the folder {folder} cannot be created: {reason_of(error)}") from None
    if not os.access(folder, os.W_OK):
        raise NFQError(f"{folder} cannot be written; name another folder")
    existing = next((folder / name for name in names if (folder / name).exists()), None)
    if existing is not None and not overwrite:
        raise TargetExistsError(f"{existing} exists already; {OVERWRITE} overwrites it")


class AtomicFile:
    """A file that appears under its name only when it is complete.

    Data go to a temporary file in the same folder; `commit` flushes it to disk and renames it. Leaving the `with` block
    without a commit removes it and leaves an existing file unchanged. If the complete file cannot be renamed within
    some seconds, it is kept, and the error names it.

    Raises:
        TargetExistsError: the target exists and `overwrite` is false.
        DiskFullError: the disk is full.
        NFQError: the folder is missing or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        # Replace what a link points to, not the link.
        self._target = Path(os.path.realpath(self.path))
        with named_errors(self.path):
            self._refuse_existing()
            remove_leftovers(self._target)
            self._file, temporary = _open_held_file(self._target)
        self._temporary: Path | None = temporary
        """None once the finished file is kept."""

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self._file.close()
        if self._temporary is None:
            return
        # If another program holds it for longer, the next write to the same target removes it.
        with suppress(OSError):
            _retry_while_busy(lambda: self._temporary.unlink(missing_ok=True))

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset; gaps are filled with zeros."""
        with named_errors(self.path):
            self._file.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self) -> None:
        """Flush the file to disk and rename it to its target."""
        with named_errors(self.path):
            _flush(self._file)
            if fcntl is None:
                # Windows cannot rename an open file; elsewhere the file stays held until it is renamed.
                self._file.close()
            self._refuse_existing()
        try:
            _retry_while_busy(lambda: os.replace(self._temporary, self._target))
        except OSError as error:
            kept = self._keep()
            raise _error_type(error)(
                f"{self.path}: the finished file could not be renamed: {reason_of(error)}; it is kept as {kept}, "
                "close what uses the old file and rename it before you write to this name again"
            ) from None
        self._file.close()
        # The file is in place; not every system can flush a folder.
        with suppress(OSError, AttributeError):
            folder = os.open(self._target.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _keep(self) -> Path:
        """Try to rename the finished temporary file so that no later write removes it; returns its path."""
        finished = self._temporary.with_name(self._temporary.name.removeprefix(".").removesuffix(".tmp") + ".finished")
        with suppress(OSError):
            _retry_while_busy(lambda: os.replace(self._temporary, finished))
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
            raise TargetExistsError(f"{self.path} exists already; {OVERWRITE} overwrites it")


def file_identity(path: str | os.PathLike) -> object:
    """A value that is equal for all paths to one file or folder: its inode, or its real path where there are no inodes.

    Raises:
        OSError: it does not exist.
    """
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.normcase(os.path.realpath(path))


def is_same_file(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths lead to the same file or folder; OSError if one does not exist."""
    return file_identity(path) == file_identity(other)


@contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Context that turns an OSError into an NFQError or DiskFullError that names the file."""
    try:
        yield
    except OSError as error:
        raise _error_type(error)(f"{path} could not be written: {reason_of(error)}; nothing was changed") from None


def _error_type(error: OSError) -> type[NFQError]:
    return DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else NFQError


def _retry_while_busy(call: Callable[[], object]) -> None:
    """Call a file operation, and retry after each of RETRY_SECONDS while another program holds the file."""
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
        Whether another writer is working on `path` now.
    """
    target = Path(os.path.realpath(path))
    ours = re.compile(re.escape(f".{stem(target.name)}") + TEMPORARY_ENDING)
    has_writer = False
    # Without permission to list the folder or remove a file, leave it.
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if ours.fullmatch(name):
                with suppress(OSError):
                    has_writer |= not _remove_unless_held(target.with_name(name))
    return has_writer


def stem(name: str) -> str:
    """The part of temporary files' names that identifies the target."""
    raw = os.fsencode(name)
    return name if len(raw) <= MAX_PLAIN_BYTES else hashlib.sha256(raw).hexdigest()[:32]


def _remove_unless_held(temporary: Path) -> bool:
    """Remove a temporary file; returns False if its writer holds it. OSError if this cannot be determined."""
    status = os.lstat(temporary)
    if not stat.S_ISREG(status.st_mode):
        return True
    if fcntl is None:
        if is_held(temporary):
            return False
        if time.time() - status.st_mtime > SETTLED_SECONDS:
            temporary.unlink()
        return True
    # Network file systems can lock only a file that is open for writing.
    with open(temporary, "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        temporary.unlink()
    return True


def hold(file: FileIO) -> None:
    """Hold an open file until it is closed or the process ends, where the file system can."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def is_held(path: Path) -> bool:
    """Whether a process holds a file; True if this cannot be determined."""
    try:
        if fcntl is None:
            # Windows cannot rename an open file, not even to its own name.
            os.rename(path, path)
        else:
            # Network file systems can lock only a file that is open for writing.
            with open(path, "rb+", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _open_held_file(target: Path) -> tuple[FileIO, Path]:
    """Create a temporary file for `target`, open for writing and held."""
    while True:
        temporary = target.with_name(f".{stem(target.name)}.{secrets.token_hex(4)}.tmp")
        file = open(temporary, "xb", buffering=0)  # noqa: SIM115
        if fcntl is None:
            return file, temporary
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another writer regards the new file as a leftover and is about to remove it.
            file.close()
            continue
        except OSError:
            # On a file system without locks, no other writer can lock the file either, so none removes it.
            return file, temporary
        # Another writer may have removed the new file before it was locked.
        if temporary.exists():
            return file, temporary
        file.close()
