"""Lossless coding of packed buffers as independent zstd frames, none of which crosses a section border.

Frames with one kind of content compress best, and independent frames decode on several threads. zstd's fast strategy
with matches of at least 7 bytes finds matches only in zeroed or repeated data; it entropy-codes all else as literals.
"""

from __future__ import annotations

import threading

import torch
import zstandard

from ..errors import CorruptFileError, NFQError
from .layout import BlockFormat, Sections

FRAME_BYTES = 256 * 1024
"""Decoded bytes per frame, except the last of a section."""

CODE_TABLE_BITS = 1024
"""Approximate size in bits of the entropy coder's table in one zstd frame."""

PAIRING_LOSS = 1.004
"""Length of zstd's Huffman code relative to the entropy, for bytes of two to four digits."""

_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    target_length=0,
    min_match=7,
    hash_log=6,
    window_log=18,
    write_content_size=True,
)

_local = threading.local()


def frame_spans(sections: Sections) -> list[tuple[int, int]]:
    """The (start, end) bytes of a packed buffer that each frame holds."""
    return [
        (first, min(first + FRAME_BYTES, end))
        for start, end in sections.spans()
        for first in range(start, end, FRAME_BYTES)
    ]


def frame_count(sections: Sections) -> int:
    """The number of frames of a packed buffer, computed without listing them."""
    return sum(-(-(end - start) // FRAME_BYTES) for start, end in sections.spans())


def expected_code_bits(uses: torch.Tensor, fmt: BlockFormat, weights: int) -> float:
    """Estimate the bits per weight that a tensor's two planes take as frames.

    zstd stores a frame uncompressed if entropy coding gains less than 1/64, or if the most frequent byte has a share
    below 1/128. Codes that are used almost equally often therefore do not shrink.

    Args:
        uses: how often each code occurs, most frequent first, shape (fmt.levels,).
        fmt: a scalar format.
        weights: number of weights of the whole tensor.
    """
    shares = torch.nn.functional.pad(uses.double() / uses.sum(), (0, -fmt.levels % (1 << fmt.fine_bits)))
    digits = shares.view(-1, 1 << fmt.fine_bits).sum(dim=1)
    entropy = float(-(digits * digits.clamp_min(1e-12).log2()).sum())
    return stored_code_bits(entropy, float(digits.amax()), fmt, weights)


def stored_code_bits(entropy: float, largest_share: float, fmt: BlockFormat, weights: int) -> float:
    """`expected_code_bits` from the entropy of a coarse digit in bits and the share of the most frequent digit."""
    raw = 8 / fmt.coarse_digits
    frame = min(FRAME_BYTES, weights / fmt.coarse_digits)
    coded = entropy * PAIRING_LOSS + CODE_TABLE_BITS / (frame * fmt.coarse_digits)
    shrinks = coded < raw * (1 - 1 / 64) and largest_share**fmt.coarse_digits > 1 / 128 + 4 / frame
    return (coded if shrinks else raw) + fmt.fine_bits


def max_frame_bytes(decoded_bytes: int) -> int:
    """Upper bound of the size of a frame that decodes to `decoded_bytes` (zstd's bound plus its frame header)."""
    return decoded_bytes + (decoded_bytes >> 8) + 128


def encode(data: torch.Tensor, sections: Sections) -> list[bytes]:
    """Compress a packed buffer, 1-D uint8 on the CPU, into the frames of `frame_spans`."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    view = memoryview(data.numpy())
    return [_local.compressor.compress(view[start:end]) for start, end in frame_spans(sections)]


def _frame_end(frame: memoryview, has_checksum: bool) -> int:
    """Length of a zstd frame by its block headers (RFC 8878, section 3.1.1.2); too large for a truncated frame."""
    position = zstandard.frame_header_size(frame)
    last = False
    while not last and position < len(frame):
        header = int.from_bytes(frame[position : position + 3], "little")
        last, repeats_one_byte = bool(header & 1), header >> 1 & 3 == 1
        position += 3 + (1 if repeats_one_byte else header >> 3)
    return position + 4 * has_checksum


def decode(stored: memoryview, lengths: list[int], sections: Sections) -> torch.Tensor:
    """Decompress frames into a packed buffer.

    Args:
        stored: the concatenated frames.
        lengths: bytes of each frame; one for each of `frame_spans(sections)`, with the length of `stored` as sum.
        sections: offsets of the sections in the decoded buffer.

    Returns:
        The packed buffer, 1-D uint8 on the CPU.

    Raises:
        CorruptFileError: a frame is not valid zstd or has the wrong length.
        NFQError: not enough memory.
    """
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 18)
    try:
        data = torch.empty(sections.end, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError):
        raise NFQError(f"it needs {sections.end:,} bytes of memory, more than there is") from None
    view = memoryview(data.numpy())
    position = 0
    for number, ((start, end), length) in enumerate(zip(frame_spans(sections), lengths, strict=True)):
        frame = stored[position : position + length]
        position += length
        try:
            declared = zstandard.get_frame_parameters(frame)
            if declared.content_size != end - start:
                raise CorruptFileError(f"frame {number} declares {declared.content_size} bytes, expected {end - start}")
            if _frame_end(frame, declared.has_checksum) != length:
                raise CorruptFileError(f"frame {number} does not end after its {length} bytes")
            with _local.decompressor.stream_reader(frame) as reader:
                if reader.readinto(view[start:end]) != end - start or reader.read(1):
                    raise CorruptFileError(f"frame {number} does not hold the {end - start} bytes it declares")
        except (zstandard.ZstdError, ValueError) as error:
            raise CorruptFileError(f"frame {number} of {len(lengths)} cannot be decompressed ({error})") from None
    return data
