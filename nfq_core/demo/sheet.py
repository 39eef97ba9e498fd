"""The comparison sheet: captions down, models across, each picture enlarged and every column labelled."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

PICTURE = 128
"""Side of an enlarged picture, in pixels."""

GAP = 8
CAPTION_WIDTH = 250
HEADER_HEIGHT = 56
FONT_SIZE = 15


def check_pillow() -> None:
    """ImportError that says what to install when Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('the demo needs Pillow: pip install "comfyui-nfq[demo]"') from error


def comparison_sheet(captions: Sequence[str], columns: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """Lay pictures out as one labelled PNG.

    Args:
        captions: one per row.
        columns: a label, its lines parted by `|`, and uint8 pictures of shape (captions, height, width, 3).

    Returns:
        The PNG file's bytes.

    Raises:
        ImportError: Pillow is missing.
    """
    check_pillow()
    from PIL import Image, ImageDraw, ImageFont

    width = CAPTION_WIDTH + len(columns) * (PICTURE + GAP) + GAP
    height = HEADER_HEIGHT + len(captions) * (PICTURE + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    small = ImageFont.load_default(FONT_SIZE - 2)
    for row, caption in enumerate(captions):
        top = HEADER_HEIGHT + row * (PICTURE + GAP)
        text = _wrapped(caption, draw, font)
        draw.multiline_text((GAP, top + PICTURE // 2), text, "black", font, anchor="lm", spacing=6)
    for column, (label, pictures) in enumerate(columns):
        left = CAPTION_WIDTH + column * (PICTURE + GAP) + GAP
        lines = label.replace("|", "\n")
        draw.multiline_text((left, HEADER_HEIGHT // 2), lines, "black", small, anchor="lm", spacing=4)
        for row, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, HEADER_HEIGHT + row * (PICTURE + GAP)))
    png = BytesIO()
    sheet.save(png, "PNG", optimize=True)
    return png.getvalue()


def _wrapped(text: str, draw: object, font: object) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > CAPTION_WIDTH - 2 * GAP and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
