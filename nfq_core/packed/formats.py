"""The block formats: how many levels, what names them, how codes are packed, where each section of a buffer lies.

A format is geometry only. The levels themselves travel in every packed buffer, so kernels never repeat them.
`docs/FORMAT.md` is the specification; a released format id never changes its bytes.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache, wraps
from itertools import pairwise

import torch

from ..errors import UnsupportedFileError

BLOCK = 64
"""Weights per block: consecutive weights of the row-major flattened tensor that share one scale."""

SUPERBLOCK = 256
"""Blocks per superblock of the article's scales."""

ARTICLE_MIN_SCALE = 1e-12
"""Takes the place of a block scale of 0 in the article's formats."""

ARTICLE_SCALE_STEPS = 255.0
"""The article's block scales are in this many parts of their superblock's maximum."""

HEAD_ALIGNMENT = 32
"""The planes start at a multiple of this many bytes: a GPU reads memory in sectors of 32."""

SCALE_MAGNITUDES = 127
"""Magnitudes a logarithmic scale code can name besides zero."""

SCALE_STEPS_PER_OCTAVE = 16
SCALE_MANTISSAS = (0, 45, 93, 142, 194, 248, 304, 363, 424, 488, 555, 625, 698, 774, 854, 937)
"""The ten mantissa bits of fp16(2**(i / 16)), i = 0 … 15: the stored table that scales are built from."""

SCALE_STRIDES = (1, 2, 3)
"""Table entries between neighbouring scale codes: 16, 8 or 5⅓ codes per octave, a range of 8, 16 or 24 octaves."""

FP16_MIN_EXPONENT, FP16_MAX_EXPONENT = -14, 15


class Scales(Enum):
    """How a format stores its block scales."""

    LOGARITHMIC = "logarithmic"
    ARTICLE = "article"


@dataclass(frozen=True)
class Sections:
    """Byte offsets of the sections of one packed buffer, each section ending where the next begins."""

    head: int
    coarse: int
    fine: int
    superblock_scales: int
    block_scales: int
    end: int

    def spans(self) -> list[tuple[int, int]]:
        """The non-empty sections as (start, end), in order."""
        marks = [self.head, self.coarse, self.fine, self.superblock_scales, self.block_scales, self.end]
        return [(start, end) for start, end in pairwise(marks) if end > start]


@dataclass(frozen=True)
class BlockFormat:
    """One block format: a code is ``coarse * 2**fine_bits + fine``.

    In a scalar format a code names a level. In a trellis format (`window` > 0) a code has `code_bits` bits, and the
    last `window` bits of the stream of a block's codes, up to and with a weight's own, name its level. The stream is
    circular: before a block's first code stand its last ones.

    The coarse plane holds `coarse_digits` digits of base `coarse_radix` in each byte, the fine plane `8 / fine_bits`
    digits of `fine_bits` bits. Coarse digits carry what entropy coding can shorten; fine bits are close to uniform.
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
        """Different codes that a weight can have."""
        return self.coarse_radix << self.fine_bits if self.window else self.levels

    @property
    def code_bits(self) -> int:
        """Bits of a code of a trellis format."""
        return self.codes.bit_length() - 1

    @property
    def states(self) -> int:
        """What the codes before one can say about its level, in a trellis format."""
        return self.levels // self.codes

    @property
    def fine_digits(self) -> int:
        """Blocks that share one 64-byte group of the fine plane (0 without a fine plane)."""
        return 8 // self.fine_bits if self.fine_bits else 0

    @cached_property
    def blocks_per_group(self) -> int:
        """Least number of blocks after which both planes start a new byte."""
        blocks = self.coarse_digits
        while self.fine_digits and blocks % self.fine_digits:
            blocks += self.coarse_digits
        return blocks

    def __hash__(self) -> int:
        # Ids are unique; hashing every field would cost as much as what is looked up by a format.
        return hash(self.id)

    def sections(self, weights: int) -> Sections:
        """Where the sections of the packed buffer of `weights` weights lie, in bytes."""
        return _sections(self, weights)

    def packed_bytes(self, weights: int) -> int:
        """Length of the packed buffer of `weights` weights, in bytes."""
        return self.sections(weights).end


@lru_cache(1024)
def _sections(fmt: BlockFormat, weights: int) -> Sections:
    """`BlockFormat.sections`: looked up twice whenever a layer runs, and a model has few different sizes of layers."""
    blocks = -(-weights // BLOCK)
    article = fmt.scales is Scales.ARTICLE
    head_bytes = 2 * fmt.levels + (0 if article else 2)
    coarse = -(-head_bytes // HEAD_ALIGNMENT) * HEAD_ALIGNMENT
    fine = coarse + -(-blocks // fmt.coarse_digits) * BLOCK
    superblock_scales = fine + (-(-blocks // fmt.fine_digits) * BLOCK if fmt.fine_bits else 0)
    block_scales = superblock_scales + (-(-blocks // SUPERBLOCK) * 4 if article else 0)
    return Sections(0, coarse, fine, superblock_scales, block_scales, block_scales + blocks)


LEVELS = (32, 24, 16, 12, 7)
"""The article's numbers of levels."""

_PACKING = {32: (16, 2, 1), 24: (6, 3, 2), 16: (16, 2, 0), 12: (6, 3, 1), 7: (4, 4, 1)}

_TRELLIS_PACKING = {2: (4, 4, 0), 3: (4, 4, 1), 4: (16, 2, 0), 5: (16, 2, 1)}
"""By the bits of a code."""

_WINDOWS = {2: (8, 10), 3: (8, 10), 4: (8, 10), 5: (9, 10)}
"""Bits of a trellis format's window, by those of a code."""

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
"""Formats that weights are quantised to; the others hold what the article's code has quantised."""


def nf_format(levels: int) -> BlockFormat:
    """The NF block format of `levels` levels (32, 24, 16, 12 or 7); ValueError for any other number."""
    return _by_levels("nf", levels)


def writable_format(format_id: str) -> BlockFormat:
    """The format named `format_id`, one of WRITABLE_IDS; ValueError for any other."""
    if format_id not in WRITABLE_IDS:
        raise ValueError(f"format must be one of {', '.join(WRITABLE_IDS)}, got {format_id!r}")
    return FORMATS[format_id]


def article_format(levels: int) -> BlockFormat:
    """The format that holds an article file's tensor of `levels` levels bit for bit; ValueError for other numbers."""
    return _by_levels("article", levels)


def _by_levels(prefix: str, levels: int) -> BlockFormat:
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(map(str, LEVELS))}, got {levels}")
    return FORMATS[f"{prefix}{levels}_b{BLOCK}"]


def format_by_id(format_id: str) -> BlockFormat:
    """The format named `format_id`; UnsupportedFileError when this version does not know it."""
    if format_id not in FORMATS:
        raise UnsupportedFileError(
            f"format id {format_id!r} is unknown to this version, which knows {', '.join(FORMATS)}; update the plugin"
        )
    return FORMATS[format_id]


def cached_tensor(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Have a function's tensors made once for each set of arguments.

    A function that makes them for a device makes them on the CPU and moves them: that waits until they are there, so
    that other threads and streams find them whole. Tensors of a mode's own kind, such as fakes, are not kept.
    """
    kept: dict[tuple, torch.Tensor] = {}

    @wraps(build)
    def get(*arguments: Hashable) -> torch.Tensor:
        if arguments not in kept:
            made = build(*arguments)
            if type(made) is not torch.Tensor:
                return made
            kept[arguments] = made
        return kept[arguments]

    return get


def check_scale_parameters(exponent: int, stride: int) -> None:
    """ValueError when `scale_table` has no table for these."""
    if stride not in SCALE_STRIDES:
        raise ValueError(f"scale stride must be one of {SCALE_STRIDES}, got {stride}")
    top = exponent + (SCALE_MAGNITUDES - 1) * stride // SCALE_STEPS_PER_OCTAVE
    if exponent < FP16_MIN_EXPONENT or top > FP16_MAX_EXPONENT:
        raise ValueError(f"scale exponents {exponent} … {top} leave the normal fp16 range")


@cached_tensor
def scale_table(exponent: int, stride: int) -> torch.Tensor:
    """All 256 scales that a scale code can name, as fp16, shape (256,); shared, not to be written to.

    Code 0 and 128 are zero. Code c in 1 … 127 is ``2**exponent * 2**((c - 1) * stride / 16)`` in the rounding of
    SCALE_MANTISSAS; bit 7 negates it.

    Raises:
        ValueError: the table would leave the normal fp16 range, or the stride is not one of SCALE_STRIDES.
    """
    check_scale_parameters(exponent, stride)
    return unchecked_scale_table(torch.tensor(exponent, device="cpu"), torch.tensor(stride, device="cpu"))


def unchecked_scale_table(exponent: torch.Tensor, stride: torch.Tensor) -> torch.Tensor:
    """`scale_table` where the parameters lie, integers of shape (), without waiting for their device."""
    steps = torch.arange(SCALE_MAGNITUDES, dtype=torch.int32, device=exponent.device) * stride
    mantissas = scale_mantissas(exponent.device)
    bits = (exponent + 15 + steps // SCALE_STEPS_PER_OCTAVE) * 1024 + mantissas[steps % SCALE_STEPS_PER_OCTAVE]
    zero = bits.new_zeros(1)
    both_signs = torch.cat([zero, bits, zero, bits - 0x8000])
    return both_signs.to(torch.int16).view(torch.float16)


@cached_tensor
def scale_mantissas(device: torch.device) -> torch.Tensor:
    """SCALE_MANTISSAS as int32 of shape (16,); shared, not to be written to."""
    return torch.tensor(SCALE_MANTISSAS, dtype=torch.int32, device="cpu").to(device)
