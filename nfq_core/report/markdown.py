"""Markdown tables, and text that is safe in them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells must be Markdown already, see `as_text`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(words: str) -> str:
    """Escape a text so that Markdown shows it unchanged, on one line, even in a table."""
    return re.sub(r"([\\`*_\[\]<>|~$#&])", r"\\\1", " ".join(words.split()))


def as_code(words: str) -> str:
    """Format a text as inline code, on one line, even in a table."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    space = " " if "`" in words else ""
    return f"{fence}{space}{' '.join(words.split())}{space}{fence}".replace("|", r"\|")
