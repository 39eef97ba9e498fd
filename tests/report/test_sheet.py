"""The comparison sheet: where pictures and labels land."""

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the sheet needs Pillow")

from nfq_core.report.sheet import CAPTION_WIDTH, GAP, comparison_sheet


def plain(value: int, rows: int, height: int, width: int) -> np.ndarray:
    return np.full((rows, height, width, 3), value, np.uint8)


def columns_of(sheet, value: int) -> tuple[int, int, int, int]:
    """First and last column and row that hold a grey value."""
    rows, columns = np.nonzero((np.asarray(sheet) == value).all(-1))
    return columns.min(), columns.max(), rows.min(), rows.max()


def test_pictures_stand_in_columns_without_a_margin_where_there_are_no_captions():
    sheet = comparison_sheet((), [("a", plain(90, 2, 4, 8)), ("b", plain(130, 2, 4, 8))], side=64)
    assert sheet.width == GAP + 2 * (64 + GAP)
    left, right, top, bottom = columns_of(sheet, 90)
    assert (left, right) == (GAP, GAP + 63)
    assert bottom - top + 1 == 2 * 32 + GAP
    assert columns_of(sheet, 130)[:2] == (64 + 2 * GAP, 2 * 64 + 2 * GAP - 1)


def test_captions_stand_in_a_margin_and_large_pictures_shrink():
    sheet = comparison_sheet(["one", "two"], [("a", plain(90, 2, 300, 200))], side=150)
    assert columns_of(sheet, 90)[:2] == (CAPTION_WIDTH + GAP, CAPTION_WIDTH + GAP + 99)


def test_a_note_stands_above_the_captions():
    def dark(sheet, columns: slice) -> bool:
        top = columns_of(sheet, 90)[2]
        return bool((np.asarray(sheet)[:top, columns] < 128).any())

    columns = [("a", plain(90, 1, 64, 64))]
    assert not dark(comparison_sheet(["one"], columns), slice(0, CAPTION_WIDTH))
    with_note = comparison_sheet(
        ["one"], columns, note="Some words that take more than one line of this narrow margin."
    )
    assert dark(with_note, slice(0, CAPTION_WIDTH))
    assert columns_of(with_note, 90)[2] > columns_of(comparison_sheet(["one"], columns), 90)[2]


@pytest.mark.parametrize(
    ("label", "lines"),
    [("a", 1), ("a|b", 2), ("a few words that do not fit in the column", 5), ("m" * 20, 4), ("日本語", 1)],
)
def test_long_labels_wrap_and_make_room(label, lines):
    sheet = comparison_sheet((), [(label, plain(90, 1, 64, 64))], side=64)
    top = columns_of(sheet, 90)[2]
    one_line = columns_of(comparison_sheet((), [("a", plain(90, 1, 64, 64))], side=64), 90)[2]
    assert (top - one_line) % 24 == 0 and 1 + (top - one_line) // 24 >= lines
