"""The errors that bad input raises; each message is one line that names the file or tensor and says what to do."""

from __future__ import annotations

import os
import unicodedata

MAX_MESSAGE = 2000
"""Characters of an error's message: what a file says may be quoted in it, and be megabytes long."""


DEBUG = "NFQ_DEBUG"
"""The environment variable with which commands show where a fault of the program's own arose."""


def internal_fault(error: Exception) -> str:
    """What a user is told of an error that no input should be able to cause."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})" if trace else ""
    return (
        f"this is a fault of the program{where}; set the environment variable {DEBUG} to 1 to see more, and report it"
    )


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """A text out of a file, fit for a terminal: one line, nothing that moves a cursor or turns writing round.

    Args:
        text: any text.
        limit: characters of it that are shown; of a longer one, the middle is left out.
    """
    if len(text) > limit:
        text = f"{text[: limit * 3 // 4]} … {text[len(text) - limit // 4 :]}"
    if text.isprintable():
        return text
    return "".join(letter if _is_harmless(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _is_harmless(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def missing_package(needed: str, *requirements: str) -> ImportError:
    """The error for packages that are not installed, or too old.

    Args:
        needed: says what needs which packages.
        requirements: what pip has to install, as a shell takes them.
    """
    command = f"python -m pip install {' '.join(requirements)}"
    return ImportError(f"{needed}: {command}, with the Python that runs this")


def reason_of(error: OSError) -> str:
    """Why the operating system refused something, in its own words, without Python's error number and name."""
    return error.strerror or str(error) or "the system does not say why"


class NFQError(Exception):
    """Base of every error that a user can cause; its text is fit to be shown as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CorruptFileError(NFQError):
    """A file is damaged, cut short, or its header contradicts its contents."""


class UnsupportedFileError(NFQError):
    """A file is sound, but not one that this version reads (foreign, or written by a newer version)."""


class AlreadyQuantizedError(UnsupportedFileError):
    """A source's weights are quantised already, in a form that cannot be undone here."""


class TargetExistsError(NFQError):
    """The target of a write exists and overwriting it was not asked for."""


class DiskFullError(NFQError):
    """A file could not be written because the disk, or the user's share of it, is full."""


class CannotQuantizeError(NFQError, ValueError):
    """A tensor holds nothing that a block format can represent (NaN, Inf, integers, too few or too large weights)."""
