"""File sizes and times as people read and write them."""

from __future__ import annotations

import re

UNITS = "KB, MB, GB, TB are powers of 1,000, also written K, M, G, T; KiB, MiB, GiB, TiB are powers of 1,024"
"""The units that `parse_size` accepts, in words."""

_SIZE = re.compile(r"(?P<whole>[0-9]*)(?P<fraction>[.,][0-9]+)?\s*(?P<unit>[A-Za-z]*)")

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

_UNIT = re.compile(r"([kmgt]?)(i?)b|([kmgt])")


def parse_size(text: str) -> int:
    """Parse a size with a unit into bytes: `1.2GB`, `1,2 GB`, `1200 MB`, `1100MiB`, `2G`, `1200000000B`.

    Raises:
        ValueError: not a size, no unit, or ambiguous; the text says what to write instead.
    """
    match = _SIZE.fullmatch(text.strip())
    number = match and match["whole"] + (match["fraction"] or "").replace(",", ".")
    if not number or number == "." or len(number) > 30:
        raise ValueError(f"{text!r} is not a size; write one such as 1.2GB or 1200MiB")
    if not match["unit"]:
        raise ValueError(f"{text!r} has no unit; write {text.strip()}GB, {text.strip()}MB or {text.strip()}B (bytes)")
    unit = _UNIT.fullmatch(match["unit"].lower())
    if unit is None or (unit[2] and not unit[1]):
        raise ValueError(f"{text!r} has the unknown unit {match['unit']!r}: {UNITS}")
    if re.fullmatch("[1-9][0-9]{0,2},[0-9]{3}", match["whole"] + (match["fraction"] or "")):
        # A comma separates thousands in some languages, and decimals in others.
        whole, rest = match["whole"], match["fraction"][1:]
        shown = match["unit"]
        raise ValueError(f"{text!r} is ambiguous; write {whole}{rest}{shown} or {whole}.{rest}{shown}")
    nbytes = float(number) * (1024 if unit[2] else 1000) ** _POWERS[unit[1] or unit[3] or ""]
    if not 1 <= nbytes < 1 << 63:
        raise ValueError(f"{text!r} is {'too large' if nbytes > 1 else 'less than a byte'}; write a size such as 1.2GB")
    return round(nbytes)


def size_in_words(nbytes: int) -> str:
    """A size in decimal GB, MB, KB or bytes, to about three digits; `size` in web/lib/text.js is the same."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    if nbytes < 1e6:
        kilobytes = f"{nbytes / 1e3:.{0 if nbytes >= 1e5 else 1}f} KB"
        return kilobytes if nbytes >= 1e3 else f"{nbytes} byte{'' if nbytes == 1 else 's'}"
    return f"{nbytes / 1e6:.{0 if nbytes >= 1e8 else 1 if nbytes >= 1e7 else 2}f} MB"


def share_in_words(nbytes: int, original_bytes: int) -> str:
    """A file's size next to that of its original: "1.27 GB, 25% of 5.14 GB"; the size alone if the other is 0."""
    if not original_bytes:
        return size_in_words(nbytes)
    return f"{size_in_words(nbytes)}, {nbytes / original_bytes:.0%} of {size_in_words(original_bytes)}"


def duration_in_words(seconds: float) -> str:
    """A time as "41.2 s", "3 min 05 s" or "2 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes} min {whole:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
