"""Markdown tables and what stands in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

EQUAL = "equal"
"""Stands where a ratio in dB is infinite."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are Markdown already, see `as_text`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(words: str) -> str:
    """A name or sentence of any letters so that Markdown shows them as they are, on one line, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|~$#&])", r"\\\1", " ".join(words.split()))


def as_code(words: str) -> str:
    """The same between backquotes."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    space = " " if "`" in words else ""
    return f"{fence}{space}{' '.join(words.split())}{space}{fence}".replace("|", r"\|")


def ratio_in_words(decibels: float | None, digits: int = 2) -> str:
    """A ratio in dB, without the unit; None is infinity."""
    return EQUAL if decibels is None else f"{decibels:.{digits}f}"
