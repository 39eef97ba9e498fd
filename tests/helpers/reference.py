"""The format in plain numpy, written from its specification alone: nothing here imports nfq_core."""

from __future__ import annotations

import numpy as np

GEOMETRY = {32: (16, 2, 1), 24: (6, 3, 2), 16: (16, 2, 0), 12: (6, 3, 1), 7: (4, 4, 1), 256: (256, 1, 0), 4: (4, 4, 0)}
"""Levels: radix of a coarse digit, coarse digits per byte, fine bits."""

TRELLIS_GEOMETRY = {2: (4, 4, 0), 3: (4, 4, 1), 4: (16, 2, 0), 5: (16, 2, 1), 6: (16, 2, 2)}
"""Bits of a trellis format's code: the same."""

ARTICLE_IDS = [f"article{levels}_b64" for levels in (32, 24, 16, 12, 7)]
NF_IDS = [f"nf{levels}_b64" for levels in GEOMETRY]
TRELLIS_IDS = [f"t{bits}w{8 if bits < 5 else 9}_b64" for bits in TRELLIS_GEOMETRY]
FORMAT_IDS = NF_IDS + TRELLIS_IDS + ARTICLE_IDS
COMMON_IDS = ["nf256_b64", *TRELLIS_IDS]
"""Formats with common levels."""


def parse(format_id: str) -> tuple[bool, int]:
    """Whether a format is one of the article's, and its number of levels."""
    name = format_id.removesuffix("_b64")
    if name.startswith("t"):
        return False, 2 ** parse_trellis(format_id)[1]
    article = name.startswith("article")
    return article, int(name.removeprefix("article" if article else "nf"))


def parse_trellis(format_id: str) -> tuple[int, int]:
    """Bits of a code, and bits of the window that names a level, of a trellis format."""
    bits, window = format_id.removesuffix("_b64").removeprefix("t").split("w")
    return int(bits), int(window)


def numbers_of_levels(codes: np.ndarray, bits: int, window: int) -> np.ndarray:
    """The number of the level of every weight, from codes of shape (blocks, 64): bit by bit, as it is specified."""
    stream = (codes[:, :, None] >> np.arange(bits)[::-1] & 1).reshape(len(codes), 64 * bits)
    numbers = np.zeros_like(codes)
    for weight in range(64):
        for bit in range(window):
            last = (weight + 1) * bits - 1
            numbers[:, weight] |= stream[:, (last - bit) % (64 * bits)] << bit
    return numbers


def pack_plane(digits: np.ndarray, radix: int, per_byte: int) -> np.ndarray:
    """Digits of shape (blocks, 64) as bytes: byte j of group g holds weight j of `per_byte` blocks, the first least."""
    groups = -(-len(digits) // per_byte)
    padded = np.zeros((groups * per_byte, 64), dtype=np.int64)
    padded[: len(digits)] = digits
    plane = np.zeros((groups, 64), dtype=np.int64)
    for place in range(per_byte):
        plane += padded[place::per_byte] * radix**place
    assert plane.max(initial=0) < 256
    return plane.astype(np.uint8).ravel()


def unpack_plane(plane: np.ndarray, radix: int, per_byte: int, blocks: int) -> np.ndarray:
    """Inverse of `pack_plane`, int64 of shape (blocks, 64)."""
    rows = plane.reshape(-1, 64).astype(np.int64)
    return np.stack([rows[b // per_byte] // radix ** (b % per_byte) % radix for b in range(blocks)])


def decode(data: np.ndarray, format_id: str, weights: int, common: np.ndarray | None = None) -> np.ndarray:
    """A packed buffer (uint8) as its fp16 weights, flat; `common` are the levels (fp16) of a buffer without a head."""
    article, levels = parse(format_id)
    trellis = format_id.startswith("t")
    radix, per_byte, fine_bits = TRELLIS_GEOMETRY[parse_trellis(format_id)[0]] if trellis else GEOMETRY[levels]
    blocks = -(-weights // 64)
    level_values = data[: 2 * levels].view(np.float16) if common is None else common
    position = -(-2 * levels // 32) * 32 if common is None else 0
    coarse_bytes = -(-blocks // per_byte) * 64
    codes = unpack_plane(data[position : position + coarse_bytes], radix, per_byte, blocks)
    position += coarse_bytes
    if fine_bits:
        fine_bytes = -(-blocks // (8 // fine_bits)) * 64
        fine = unpack_plane(data[position : position + fine_bytes], 2**fine_bits, 8 // fine_bits, blocks)
        codes = codes * 2**fine_bits + fine
        position += fine_bytes
    if trellis:
        codes = numbers_of_levels(codes, *parse_trellis(format_id))
    if article:
        maxima = data[position : position + -(-blocks // 256) * 4].copy().view(np.float32)
        position += maxima.nbytes
        clamped = np.maximum(data[position:].astype(np.float32), np.float32(1e-12))
        scales = np.repeat(maxima, 256)[:blocks] * clamped / np.float32(255)
    else:
        exponent, stride = data[-2:].view(np.int8).tolist()
        scales = np.array([scale(code, exponent, stride) for code in data[position:-2].tolist()], dtype=np.float32)
    assert len(scales) == blocks
    values = level_values.astype(np.float32)[codes] * scales[:, None]
    return values.astype(np.float16).ravel()[:weights]


def scale(code: int, exponent: int, stride: int) -> np.float16:
    """The scale that a logarithmic code names: ±2**exponent * 2**((c - 1) * stride / 16) rounded to fp16, or 0."""
    if code % 128 == 0:
        return np.float16(0)
    magnitude = np.float16(2.0 ** (exponent + (code % 128 - 1) * stride / 16))
    return -magnitude if code >= 128 else magnitude


def sqnr_db(weights: np.ndarray, decoded: np.ndarray) -> float:
    """Signal to quantisation noise, in dB."""
    exact = weights.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - decoded.astype(np.float64)) ** 2).sum()))
