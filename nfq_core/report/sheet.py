"""The comparison sheet: one row per caption, one labelled column per model, all pictures at one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import missing_package

if TYPE_CHECKING:
    from PIL import Image

GAP = 8
CAPTION_WIDTH = 250
FONT_SIZE = 15
LINE = 24
"""Height of a line of text, in pixels."""

FONTS = (
    "NotoSansCJK-Regular.ttc",
    "YuGothM.ttc",
    "msyh.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "arial.ttf",
)
"""Fonts of common systems, those with the most scripts first: Pillow's own font has ASCII only."""


def check_pillow() -> None:
    """Raise ImportError, with the command to install it, if Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise missing_package("pictures need Pillow", "Pillow") from error


def comparison_sheet(
    captions: Sequence[str], columns: Sequence[tuple[str, np.ndarray]], *, side: int = 128, note: str = ""
) -> Image.Image:
    """Arrange pictures as one labelled picture.

    Args:
        captions: one per row, or an empty list; `|` separates lines.
        columns: label (`|` separates lines) and pictures of each column: uint8, one shape (rows, height, width, 3).
        side: longer side of each picture on the sheet, in pixels.
        note: text above the captions.

    Returns:
        An RGB picture.

    Raises:
        ImportError: Pillow is missing.
    """
    check_pillow()
    from PIL import Image, ImageDraw

    rows, height, width = columns[0][1].shape[:3]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    words = "".join([note, *captions, *(label for label, _ in columns)])
    font, small = _font(words, FONT_SIZE), _font(words, FONT_SIZE - 2)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [_wrapped(label, draw, small, size[0]) for label, _ in columns]
    margin = CAPTION_WIDTH if captions else 0
    note = _wrapped(note, draw, small, CAPTION_WIDTH - 2 * GAP) if captions else ""
    header = GAP + LINE * max(label.count("\n") + 1 for label in (note, *labels))
    sheet = Image.new("RGB", (margin + len(columns) * (size[0] + GAP) + GAP, header + rows * (size[1] + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, header // 2), note, "black", small, anchor="lm", spacing=4)
    for row, caption in enumerate(captions):
        top = header + row * (size[1] + GAP)
        text = _wrapped(caption, draw, font, CAPTION_WIDTH - 2 * GAP)
        draw.multiline_text((GAP, top + size[1] // 2), text, "black", font, anchor="lm", spacing=6)
    for column, (label, (_, pictures)) in enumerate(zip(labels, columns, strict=True)):
        left = margin + column * (size[0] + GAP) + GAP
        draw.multiline_text((left, header // 2), label, "black", small, anchor="lm", spacing=4)
        for row, picture in enumerate(pictures):
            fitted = Image.fromarray(picture).resize(size, resampling)
            sheet.paste(fitted, (left, header + row * (size[1] + GAP)))
    return sheet


def _font(words: str, size: int) -> object:
    """Pillow's own font if it has all letters, else the first of FONTS that this system has."""
    from PIL import ImageFont

    for name in () if words.isascii() else FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrapped(text: str, draw: object, font: object, width: int) -> str:
    """Break lines at `|`, and lines wider than `width` pixels at spaces or within a word."""
    lines: list[str] = []
    for part in text.split("|"):
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font) <= width:
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if lines[-1] and draw.textlength(lines[-1] + letter, font) > width:
                    lines.append("")
                lines[-1] += letter
    return "\n".join(lines)
