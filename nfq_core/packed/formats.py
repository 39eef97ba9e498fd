"""The block formats that exist, by id and by number of levels.

A format does not contain the levels: every packed buffer stores its own. `docs/FORMAT.md` is the specification; the
bytes of a released format id never change.
"""

from __future__ import annotations

from ..errors import UnsupportedFileError
from .article import ArticleFormat
from .layout import BLOCK, BlockFormat

LEVELS = (32, 24, 16, 12, 7)
"""Codebook sizes of the article."""

_PACKING = {32: (16, 2, 1), 24: (6, 3, 2), 16: (16, 2, 0), 12: (6, 3, 1), 7: (4, 4, 1), 256: (256, 1, 0), 4: (4, 4, 0)}
"""Coarse radix, coarse digits and fine bits, by number of levels."""

_TRELLISES = {2: (8, 4, 4, 0), 3: (8, 4, 4, 1), 4: (8, 16, 2, 0), 5: (9, 16, 2, 1), 6: (9, 16, 2, 2)}
"""Window in bits, coarse radix, coarse digits and fine bits, by bits per code."""

FORMATS = {
    fmt.id: fmt
    for fmt in (
        *(BlockFormat(f"nf{n}_b{BLOCK}", n, *packing) for n, packing in _PACKING.items()),
        *(
            BlockFormat(f"t{bits}w{window}_b{BLOCK}", 1 << window, *packing, window)
            for bits, (window, *packing) in _TRELLISES.items()
        ),
        *(ArticleFormat(f"article{n}_b{BLOCK}", n, *_PACKING[n]) for n in LEVELS),
    )
}

TRELLIS_IDS = tuple(fmt.id for fmt in FORMATS.values() if fmt.window)

WRITABLE_IDS = tuple(fmt.id for fmt in FORMATS.values() if not isinstance(fmt, ArticleFormat))
"""Formats to quantise to; the others hold weights that the article's code has quantised."""


def nf_format(levels: int) -> BlockFormat:
    """The NF format with `levels` levels: 32, 24, 16, 12 or 7; ValueError for any other number."""
    return _by_levels("nf", levels)


def article_format(levels: int) -> ArticleFormat:
    """The format for an article file's tensor with `levels` levels, bit for bit; ValueError for other numbers."""
    return _by_levels("article", levels)


def _by_levels(prefix: str, levels: int) -> BlockFormat:
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(map(str, LEVELS))}, got {levels}")
    return FORMATS[f"{prefix}{levels}_b{BLOCK}"]


def writable_format(format_id: str) -> BlockFormat:
    """The format with this id, one of WRITABLE_IDS; ValueError for any other id."""
    if format_id not in WRITABLE_IDS:
        raise ValueError(f"format must be one of {', '.join(WRITABLE_IDS)}, got {format_id!r}")
    return FORMATS[format_id]


def format_by_id(format_id: str) -> BlockFormat:
    """The format with this id; UnsupportedFileError if this version does not know it."""
    if format_id not in FORMATS:
        raise UnsupportedFileError(
            f"format id {format_id!r} is unknown to this version, which knows {', '.join(FORMATS)}; update the plugin"
        )
    return FORMATS[format_id]
