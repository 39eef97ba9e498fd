"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import NFQError, TargetExistsError


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
        raise NFQError(f"{folder} cannot be made a folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise NFQError(f"{folder} cannot be written; name another folder")
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is not None and not overwrite:
        raise TargetExistsError(f"{found} exists already; --force overwrites it")


class AtomicFile:
    """A file that appears under its name only when it is complete.

    Everything goes to a temporary file beside the target; `commit` flushes it to disk and renames it. Leaving the
    `with` block without a commit removes it, and whatever stood under the name stays.

    Raises:
        TargetExistsError: the target exists and `overwrite` is false.
        NFQError: the folder is missing or cannot be written, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        # A link stays a link: what it points to is replaced.
        self._target = Path(os.path.realpath(self.path))
        self._refuse_existing()
        self._temporary = self._target.with_name(f".{self._target.name}.{secrets.token_hex(4)}.tmp")
        with self._named_errors():
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset; gaps are filled with zeros."""
        with self._named_errors():
            self._file.seek(offset)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self) -> None:
        """Make the file durable and visible under its name."""
        with self._named_errors():
            os.fsync(self._file.fileno())
            self._file.close()
            self._refuse_existing()
            os.replace(self._temporary, self._target)
        # The file is there now; not every system can make a folder's change durable on request.
        with suppress(OSError, AttributeError):
            folder = os.open(self._target.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)

    def _refuse_existing(self) -> None:
        if self._target.is_dir():
            raise TargetExistsError(f"{self.path} is a directory; name a file in it")
        if self._target.exists() and not self._target.is_file():
            raise TargetExistsError(f"{self.path} is not a regular file; name another")
        if not self._overwrite and self._target.exists():
            raise TargetExistsError(f"{self.path} exists already; --force overwrites it")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NFQError(f"{self.path} could not be written: {error.strerror}; nothing was changed") from None
