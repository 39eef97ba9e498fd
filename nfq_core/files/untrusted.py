"""Values out of files that strangers wrote: JSON and sizes, refused where they could not be honest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from math import prod
from typing import Any

MAX_DIMENSIONS = 64
"""Of a tensor; torch's operations and numpy's arrays have no more."""

MAX_DEPTH = 64
"""Objects and lists that may stand in one another in JSON: what walks through them later recurses."""

MAX_DIGITS = 20
"""Of an integer in JSON, its sign included: those of 64 bits have no more."""


def parse_json(text: str) -> Any:
    """JSON that holds only what can be written again, and nothing that takes long to look at.

    Raises:
        ValueError or RecursionError: anything else.
    """
    value = json.loads(
        text,
        object_pairs_hook=_no_duplicates,
        parse_constant=_no_constant,
        parse_float=_finite,
        parse_int=_short_integer,
    )
    _check_depth(value)
    if "\\u" in text:
        # Half of a surrogate pair is a legal escape, but no text.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_error_message(error: Exception) -> str:
    """What is wrong with facts from a file, in words: Python's own errors would speak of its types and keys.

    Args:
        error: what reading them raised; the text of a ValueError is taken for words, unless it is a decoder's.
    """
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON from character {error.pos:,} on"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return str(error) if isinstance(error, ValueError) else "a value is of another kind than it must be"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is beyond all floats")
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits is beyond all sizes")
    return int(digits)


def _check_depth(value: object) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def is_count(value: object) -> bool:
    """Whether a value from JSON is a size: an integer (no bool) from 0 up, below 2**63."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: object) -> bool:
    """Whether a value from JSON is a number (no bool); it is finite as a float."""
    return type(value) in (int, float)


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a shape from a file; ValueError for one that no tensor can have."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(shape):,} dimensions is none that a tensor can have")
    # Zeros do not excuse the rest: strides are products of all the others.
    if prod(max(1, size) for size in shape) >= 1 << 63:
        raise ValueError(f"a tensor of shape {list(shape)} needs more memory than there can be")
    return prod(shape)
