"""Sizes as people write them."""

from __future__ import annotations

import pytest

from nfq_core.sizes import parse_size

SIZES = {
    "1B": 1,
    "1200000000B": 1_200_000_000,
    "1KB": 1000,
    "1KiB": 1024,
    "1MiB": 1 << 20,
    "2G": 2_000_000_000,
    "2GB": 2_000_000_000,
    "2gib": 2 << 30,
    "1.2 GB": 1_200_000_000,
    "1,2GB": 1_200_000_000,
    "1,0MB": 1_000_000,
    "0.5MB": 500_000,
    " 700mb ": 700_000_000,
    "1.125MiB": 1_179_648,
    "1.200GB": 1_200_000_000,
    "0.02TB": 20_000_000_000,
    "0,125GB": 125_000_000,
    ".5GB": 500_000_000,
    "1200,125MB": 1_200_125_000,
    "1TiB": 1 << 40,
    "3k": 3000,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text):
    assert parse_size(text) == SIZES[text]


REFUSED = {
    "3": "'3' has no unit; write 3GB, 3MB or 3B (bytes)",
    "1.2": "'1.2' has no unit",
    "": "'' is not a size; write one such as 1.2GB",
    "GB": "is not a size",
    "soon": "is not a size",
    "-1GB": "is not a size",
    "nanGB": "is not a size",
    "1e9B": "is not a size",
    "1.2.3GB": "is not a size",
    "１GB": "is not a size",
    ".GB": "is not a size",
    "9" * 40 + "GB": "is not a size",
    "1iB": "unknown unit 'iB': KB, MB, GB, TB are powers of 1,000",
    "1XB": "unknown unit 'XB'",
    "1Gi": "unknown unit 'Gi'",
    "1GBit": "unknown unit 'GBit'",
    "1,200MB": "is ambiguous; write 1200MB or 1.200MB",
    "0GB": "is less than a byte",
    "0.1B": "is less than a byte",
    "99999999TB": "is too large",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert REFUSED[text] in str(caught.value)
