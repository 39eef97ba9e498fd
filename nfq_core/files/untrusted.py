"""Parsing of untrusted values: JSON and tensor sizes from files, with strict limits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from math import prod
from typing import Any

MAX_DIMENSIONS = 64
"""Most dimensions of a tensor in torch's operations and in numpy."""

MAX_DEPTH = 64
"""Nesting limit of JSON objects and lists, because later code recurses through them."""

MAX_DIGITS = 20
"""Longest JSON integer, with sign: enough for 64 bits."""


def parse_json(text: str) -> Any:
    """Parse JSON that can be written again unchanged: no duplicate names, NaN, Inf, huge integers or deep nesting.

    Raises:
        ValueError, RecursionError: it is not such JSON.
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
        # Half a surrogate pair is a legal escape, but cannot be encoded.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_error_message(error: Exception) -> str:
    """Message for an error in parsing values from a file, without Python's own terms.

    Args:
        error: raised by the parsing; the text of a ValueError is used as it is, unless it comes from a decoder.
    """
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON from character {error.pos:,} on"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return str(error) if isinstance(error, ValueError) else "a value has the wrong type"


LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What other packages raise when they load a model from unsuitable files."""


def loading_error_message(error: Exception) -> str:
    """Message for one of LOADING_ERRORS: what is wrong with a value, or the first line of the package's own text."""
    if isinstance(error, KeyError | TypeError | AttributeError):
        return parse_error_message(error)
    return next(iter(str(error).strip().splitlines()), "no reason is given")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is out of the range of fp64")
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits):,} digits, at most {MAX_DIGITS} are allowed")
    return int(digits)


def _check_depth(value: object) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def is_count(value: object) -> bool:
    """Whether a value from JSON is a size: an integer, not a bool, from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: object) -> bool:
    """Whether a value from JSON is a number, not a bool; `parse_json` ensures that it is finite."""
    return type(value) in (int, float)


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a shape from a file; ValueError for one that no tensor can have."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(shape):,} dimensions exceeds the {MAX_DIMENSIONS} that a tensor can have")
    # Zeros count as 1, because strides are products of the other sizes.
    if prod(max(1, size) for size in shape) >= 1 << 63:
        raise ValueError(f"a tensor of shape {list(shape)} needs more memory than there can be")
    return prod(shape)
