"""Errors raised for bad input. Each message is one line that names the file or tensor and says what to do."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import unicodedata

MAX_MESSAGE = 2000
"""Longest message in characters: a message may quote a file, whose text may be megabytes long."""

OVERWRITE, ANY = "overwrite=True", "any_kind=True"
"""Arguments that messages advise; commands show their own options for them, see `cli.terminal`."""

DEBUG = "NFQ_DEBUG"
"""Environment variable that makes commands print the traceback of an internal error."""


def internal_fault(error: Exception) -> str:
    """Message for an error that no input should be able to cause: a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})" if trace else ""
    return f"this is a bug in the program{where}; set the environment variable {DEBUG} to 1 to see more, and report it"


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """Make text from a file safe to print: one line, control and bidirectional characters escaped.

    Args:
        text: any text.
        limit: maximum length in characters; the middle of a longer text is left out.
    """
    if len(text) > limit:
        text = f"{text[: limit * 3 // 4]} … {text[len(text) - limit // 4 :]}"
    if text.isprintable():
        return text
    return "".join(letter if _is_harmless(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _is_harmless(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def missing_package(needed: str, *requirements: str) -> ImportError:
    """The error for packages that are missing or too old.

    Args:
        needed: start of the message: which feature needs which packages.
        requirements: pip requirements, quoted for a shell.
    """
    return ImportError(f"{needed}: {pip_command(*requirements)}")


def pip_command(*requirements: str) -> str:
    """The command that installs packages for this process's Python; requirements as for a shell."""
    return f"{_python()} -m pip install {' '.join(requirements)}"


def command(arguments: str) -> str:
    """The command `nfq` with arguments, in backquotes, as the user of this process can type it: see `program`."""
    return f"`{program()} {arguments}`"


def program() -> str:
    """The command `nfq` as the user of this process can type it.

    Without the command on the path it is this process's Python, with `-m nfq_core` where the package is installed, or
    with the plugin's folder, which has a `__main__.py`.
    """
    if shutil.which("nfq"):
        return "nfq"
    try:
        importlib.metadata.distribution("comfyui-nfq")
        what = "-m nfq_core"
    except importlib.metadata.PackageNotFoundError:
        what = _quoted(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return f"{_python()} {what}"


def _python() -> str:
    """This process's Python, quoted for a shell."""
    return _quoted(sys.executable or "python")


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path


def reason_of(error: OSError) -> str:
    """The operating system's own error text, without Python's error number and file name."""
    return error.strerror or str(error) or "the system does not say why"


class NFQError(Exception):
    """Base of every error that a user can cause; its text can be shown unchanged."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CorruptFileError(NFQError):
    """A file is damaged or truncated, or its header contradicts its contents."""


class UnsupportedFileError(NFQError):
    """A file is intact, but this version cannot read it: another format, or written by a newer version."""


class AlreadyQuantizedError(UnsupportedFileError):
    """The source's weights are already quantised, in a form that this package cannot dequantise."""


class TargetExistsError(NFQError):
    """The target of a write exists, and overwriting it was not requested."""


class DiskFullError(NFQError):
    """A file could not be written because the disk or the user's quota is full."""


class CannotQuantizeError(NFQError, ValueError):
    """A block format cannot represent a tensor: it is empty, has integers, NaN or Inf, or is out of range."""
