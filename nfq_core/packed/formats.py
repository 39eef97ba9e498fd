"""The block formats: number of levels, how codes select them, how codes are packed, layout of the packed buffer.

A format does not contain the levels: every packed buffer stores its own. `docs/FORMAT.md` is the specification; the
bytes of a released format id never change.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache, wraps
from itertools import pairwise

import torch

from ..errors import UnsupportedFileError

BLOCK = 64
"""Weights per block: consecutive weights of the row-major flattened tensor, which share one scale."""

SUPERBLOCK = 256
"""Blocks per superblock of the article's scales."""

ARTICLE_MIN_SCALE = 1e-12
"""Lower bound of a block's scale byte in the article's formats, so that 0 does not divide by zero."""

ARTICLE_SCALE_STEPS = 255.0
"""The article stores a block scale in units of 1/255 of its superblock's maximum."""

HEAD_ALIGNMENT = 32
"""Alignment in bytes of the first plane: a GPU reads memory in sectors of 32 bytes."""

SCALE_MAGNITUDES = 127
"""Number of non-zero magnitudes of a logarithmic scale code."""

SCALE_STEPS_PER_OCTAVE = 16
SCALE_MANTISSAS = (0, 45, 93, 142, 194, 248, 304, 363, 424, 488, 555, 625, 698, 774, 854, 937)
"""The ten mantissa bits of fp16(2**(i / 16)), i = 0 … 15, from which all scales are built."""

SCALE_STRIDES = (1, 2, 3)
"""Steps of 1/16 octave between neighbouring scale codes: 16, 8 or 5⅓ codes per octave, 8, 16 or 24 octaves in all."""

FP16_MIN_EXPONENT, FP16_MAX_EXPONENT = -14, 15


class Scales(Enum):
    """How a format stores its block scales."""

    LOGARITHMIC = "logarithmic"
    ARTICLE = "article"


@dataclass(frozen=True)
class Sections:
    """Byte offset of each section of a packed buffer; a section ends where the next one begins."""

    head: int
    coarse: int
    fine: int
    superblock_scales: int
    block_scales: int
    end: int

    def spans(self) -> list[tuple[int, int]]:
        """The non-empty sections as (start, end), in order."""
        offsets = [self.head, self.coarse, self.fine, self.superblock_scales, self.block_scales, self.end]
        return [(start, end) for start, end in pairwise(offsets) if end > start]


@dataclass(frozen=True)
class BlockFormat:
    """One block format. A code is ``coarse * 2**fine_bits + fine``.

    In a scalar format a code is the number of a level. In a trellis format (`window` > 0) a code has `code_bits` bits,
    and a weight's level number is the last `window` bits of the block's code stream, up to and including its own code.
    The stream is circular: the last codes of a block precede its first one.

    A byte of the coarse plane holds `coarse_digits` digits of base `coarse_radix`; a byte of the fine plane holds
    `8 / fine_bits` digits of `fine_bits` bits. Entropy coding can shorten coarse digits; fine bits are almost uniform.
    """

    id: str
    levels: int
    coarse_radix: int
    coarse_digits: int
    fine_bits: int
    scales: Scales
    window: int = 0

    @property
    def codes(self) -> int:
        """Number of different codes."""
        return self.coarse_radix << self.fine_bits if self.window else self.levels

    @property
    def code_bits(self) -> int:
        """Bits per code (trellis formats only)."""
        return self.codes.bit_length() - 1

    @property
    def states(self) -> int:
        """Number of trellis states: what the previous codes contribute to a level number (trellis formats only)."""
        return self.levels // self.codes

    @property
    def fine_digits(self) -> int:
        """Digits per byte of the fine plane: blocks that share a 64-byte group; 0 without a fine plane."""
        return 8 // self.fine_bits if self.fine_bits else 0

    @cached_property
    def blocks_per_group(self) -> int:
        """Smallest number of blocks that fills whole groups of both planes."""
        blocks = self.coarse_digits
        while self.fine_digits and blocks % self.fine_digits:
            blocks += self.coarse_digits
        return blocks

    def __hash__(self) -> int:
        # Ids are unique, and hashing every field would cost as much as the cached results.
        return hash(self.id)

    def sections(self, weights: int) -> Sections:
        """Section offsets of the packed buffer of `weights` weights, in bytes."""
        return _sections(self, weights)

    def packed_bytes(self, weights: int) -> int:
        """Length of the packed buffer of `weights` weights, in bytes."""
        return self.sections(weights).end


@lru_cache(1024)
def _sections(fmt: BlockFormat, weights: int) -> Sections:
    """`BlockFormat.sections`, cached: every layer needs it twice per run, and few layers differ in size."""
    blocks = -(-weights // BLOCK)
    article = fmt.scales is Scales.ARTICLE
    head_bytes = 2 * fmt.levels + (0 if article else 2)
    coarse = -(-head_bytes // HEAD_ALIGNMENT) * HEAD_ALIGNMENT
    fine = coarse + -(-blocks // fmt.coarse_digits) * BLOCK
    superblock_scales = fine + (-(-blocks // fmt.fine_digits) * BLOCK if fmt.fine_bits else 0)
    block_scales = superblock_scales + (-(-blocks // SUPERBLOCK) * 4 if article else 0)
    return Sections(0, coarse, fine, superblock_scales, block_scales, block_scales + blocks)


LEVELS = (32, 24, 16, 12, 7)
"""Codebook sizes of the article."""

_PACKING = {32: (16, 2, 1), 24: (6, 3, 2), 16: (16, 2, 0), 12: (6, 3, 1), 7: (4, 4, 1)}

_TRELLIS_PACKING = {2: (4, 4, 0), 3: (4, 4, 1), 4: (16, 2, 0), 5: (16, 2, 1)}
"""Coarse radix, coarse digits and fine bits, by bits per code."""

_WINDOWS = {2: (8, 10), 3: (8, 10), 4: (8, 10), 5: (9, 10)}
"""Window sizes of the trellis formats in bits, by bits per code."""

FORMATS = {
    fmt.id: fmt
    for fmt in (
        *(
            BlockFormat(f"{prefix}{n}_b{BLOCK}", n, *_PACKING[n], scales)
            for prefix, scales in (("nf", Scales.LOGARITHMIC), ("article", Scales.ARTICLE))
            for n in LEVELS
        ),
        BlockFormat(f"nf256_b{BLOCK}", 256, 256, 1, 0, Scales.LOGARITHMIC),
        *(
            BlockFormat(f"t{bits}w{window}_b{BLOCK}", 1 << window, *_TRELLIS_PACKING[bits], Scales.LOGARITHMIC, window)
            for bits, windows in _WINDOWS.items()
            for window in windows
        ),
    )
}

TRELLIS_IDS = tuple(fmt.id for fmt in FORMATS.values() if fmt.window)

WRITABLE_IDS = tuple(fmt.id for fmt in FORMATS.values() if fmt.scales is Scales.LOGARITHMIC)
"""Formats to quantise to; the others hold weights that the article's code has quantised."""


def nf_format(levels: int) -> BlockFormat:
    """The NF format with `levels` levels: 32, 24, 16, 12 or 7; ValueError for any other number."""
    return _by_levels("nf", levels)


def writable_format(format_id: str) -> BlockFormat:
    """The format with this id, one of WRITABLE_IDS; ValueError for any other id."""
    if format_id not in WRITABLE_IDS:
        raise ValueError(f"format must be one of {', '.join(WRITABLE_IDS)}, got {format_id!r}")
    return FORMATS[format_id]


def article_format(levels: int) -> BlockFormat:
    """The format for an article file's tensor with `levels` levels, bit for bit; ValueError for other numbers."""
    return _by_levels("article", levels)


def _by_levels(prefix: str, levels: int) -> BlockFormat:
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(map(str, LEVELS))}, got {levels}")
    return FORMATS[f"{prefix}{levels}_b{BLOCK}"]


def format_by_id(format_id: str) -> BlockFormat:
    """The format with this id; UnsupportedFileError if this version does not know it."""
    if format_id not in FORMATS:
        raise UnsupportedFileError(
            f"format id {format_id!r} is unknown to this version, which knows {', '.join(FORMATS)}; update the plugin"
        )
    return FORMATS[format_id]


def cached_tensor(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator that caches the tensor which a function returns for each set of arguments.

    The function must build its tensor on the CPU and then move it to the device: the move waits until the data are
    there, so other threads and streams never see a partial tensor. Tensor subclasses, such as fakes, are not cached.
    """
    cache: dict[tuple, torch.Tensor] = {}

    @wraps(build)
    def get(*arguments: Hashable) -> torch.Tensor:
        if arguments not in cache:
            tensor = build(*arguments)
            if type(tensor) is not torch.Tensor:
                return tensor
            cache[arguments] = tensor
        return cache[arguments]

    return get


def check_scale_parameters(exponent: int, stride: int) -> None:
    """ValueError if `scale_table` has no table for these parameters."""
    if stride not in SCALE_STRIDES:
        raise ValueError(f"scale stride must be one of {SCALE_STRIDES}, got {stride}")
    top = exponent + (SCALE_MAGNITUDES - 1) * stride // SCALE_STEPS_PER_OCTAVE
    if exponent < FP16_MIN_EXPONENT or top > FP16_MAX_EXPONENT:
        raise ValueError(f"scale exponents {exponent} … {top} leave the normal fp16 range")


@cached_tensor
def scale_table(exponent: int, stride: int) -> torch.Tensor:
    """The scale of each of the 256 scale codes, fp16 of shape (256,); cached, do not modify.

    Codes 0 and 128 are zero. Code c in 1 … 127 is ``2**exponent * 2**((c - 1) * stride / 16)``, rounded as in
    SCALE_MANTISSAS; bit 7 negates it.

    Raises:
        ValueError: the table would leave the normal fp16 range, or the stride is not one of SCALE_STRIDES.
    """
    check_scale_parameters(exponent, stride)
    return unchecked_scale_table(torch.tensor(exponent, device="cpu"), torch.tensor(stride, device="cpu"))


def unchecked_scale_table(exponent: torch.Tensor, stride: torch.Tensor) -> torch.Tensor:
    """`scale_table`, unchecked, computed on the device of its parameters without synchronising.

    Args:
        exponent: integer of shape ().
        stride: integer of shape ().
    """
    steps = torch.arange(SCALE_MAGNITUDES, dtype=torch.int32, device=exponent.device) * stride
    mantissas = scale_mantissas(exponent.device)
    bits = (exponent + 15 + steps // SCALE_STEPS_PER_OCTAVE) * 1024 + mantissas[steps % SCALE_STEPS_PER_OCTAVE]
    zero = bits.new_zeros(1)
    both_signs = torch.cat([zero, bits, zero, bits - 0x8000])
    return both_signs.to(torch.int16).view(torch.float16)


@cached_tensor
def scale_mantissas(device: torch.device) -> torch.Tensor:
    """SCALE_MANTISSAS as int32 of shape (16,); cached, do not modify."""
    return torch.tensor(SCALE_MANTISSAS, dtype=torch.int32, device="cpu").to(device)
