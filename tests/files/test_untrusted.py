"""JSON and sizes that no honest file holds."""

from __future__ import annotations

import pytest

from nfq_core.errors import MAX_MESSAGE, NFQError, printable
from nfq_core.files.untrusted import MAX_DEPTH, MAX_DIMENSIONS, element_count, is_count, is_number, parse_json


def test_json_at_its_limits_is_read():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json('{"a":[-9223372036854775808,18446744073709551615,1.5,1e308,"\\ud83d\\ude00"]}') == {
        "a": [-(1 << 63), (1 << 64) - 1, 1.5, 1e308, "😀"]
    }
    assert parse_json("5") == 5


@pytest.mark.parametrize(
    "text",
    [
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1),
        "[" * 100_000,
        "1" * 21,
        "-" + "1" * 20,
        "9" * 100_000,
        "1e999",
        "NaN",
        "-Infinity",
        '{"a":1,"a":1}',
        '"\\ud800"',
        "",
    ],
)
def test_json_beyond_them_is_not(text):
    with pytest.raises((ValueError, RecursionError)):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "count", "number"),
    [(0, True, True), ((1 << 63) - 1, True, True), (1 << 63, False, True), (-1, False, True), (1.0, False, True)]
    + [(value, False, False) for value in (True, None, "1", [1], {})],
)
def test_counts_and_numbers(value, count, number):
    assert (is_count(value), is_number(value)) == (count, number)


def test_elements_of_a_shape():
    assert element_count([]) == 1
    assert element_count([2, 3, 4]) == 24
    assert element_count([0, 7]) == 0
    assert element_count([1] * MAX_DIMENSIONS) == 1
    assert element_count([(1 << 63) - 1]) == (1 << 63) - 1


@pytest.mark.parametrize("shape", [[1] * (MAX_DIMENSIONS + 1), [1 << 62, 2], [0, 1 << 62, 1 << 62], [2] * 63])
def test_shapes_that_no_tensor_has(shape):
    with pytest.raises(ValueError, match=r"a shape of|needs more memory than there can be"):
        element_count(shape)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ä 日本\u3000語 😀", "ä 日本\u3000語 😀"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[2J\x07\x7f\x9b", r"\x1b[2J\x07\x7f\x9b"),
        ("\u202ea\u200b\ufeff", r"\u202ea\u200b\ufeff"),
        ("a\u2028\udc80", r"a\u2028\udc80"),
    ],
)
def test_what_a_terminal_is_shown(text, wanted):
    assert printable(text) == wanted == str(NFQError(text))


def test_long_texts_lose_their_middle():
    text = printable("a" * 5000 + "the end")
    assert len(text) == MAX_MESSAGE + 3 and text.startswith("aaa") and text.endswith("the end")
    assert printable("abcdefghij", 8) == "abcdef … ij"
    assert printable("abcdefgh", 8) == "abcdefgh"
