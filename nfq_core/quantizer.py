"""Quantising one weight: survey it, fit levels, choose scales and codes, pack."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .codebook import Codebook, effort_by_name, fit_codebook
from .errors import CannotQuantizeError
from .formats import BLOCK, BlockFormat, nf_format, writable_format
from .packing import pack_codes
from .search import BlockQuantizer, ScaleGrid, largest_magnitudes
from .tensor import QUANTIZABLE_DTYPES, NFTensor
from .trellis_fit import TRELLIS_EFFORTS, TrellisQuantizer, fit_trellis

CHUNK_BLOCKS = 12 * 1024
"""Blocks quantised at once on a CPU: temporaries of 3 MB, and a multiple of every format's blocks_per_group."""

DEVICE_CHUNK_BLOCKS = 12 * CHUNK_BLOCKS
"""The same on other devices, where fewer launches count for more: temporaries of 38 MB, six at once in a thread."""

FIT_DTYPE = torch.float64
"""What levels are fitted in; a device that lacks it cannot quantise."""

FINE_SCALES_FROM = 16
"""Codebooks of fewer levels gain under 0.1 dB from 16 scales per octave, which cost 0.016 bits; they get 8."""

MIN_LARGEST = 2.0**-12
"""Below this largest magnitude, the smallest scale (2**-14) is too coarse for a weight."""


ChooseCodes = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes blocks, fp32 of shape (blocks, 64), and their largest magnitudes, fp32 of shape (blocks,).

Returns scale codes, uint8 of shape (blocks,), and codes, uint8 of shape (blocks, 64).
"""


def quantize(
    weight: torch.Tensor,
    levels: int = 16,
    *,
    format: str | None = None,
    effort: str = "fast",
    device: torch.device | str | None = None,
) -> NFTensor:
    """Quantise one weight to a block format.

    Args:
        weight: fp16, bf16, fp32 or fp64, any shape, any strides.
        levels: size of the codebook: 32, 24, 16, 12 or 7.
        format: one of `formats.WRITABLE_IDS`, such as "t4w8_b64"; by default the NF format of `levels` levels.
        effort: "fast" or "best": how long levels are fitted, and for trellis formats how many scales are tried.
        device: where to work; by default where `weight` is. The result stays there. Its bytes are the same every
            time on a CPU, and close to those of another device: that adds up errors and fitted levels in an order of
            its own, which turns a few choices between almost equal scales or levels.

    Returns:
        The packed weight; zero blocks come back as exact zeros.

    Raises:
        CannotQuantizeError: the weight is empty, not floating, holds NaN or Inf, or is too large or small for fp16.
        ValueError: `levels`, `format` or `effort` is none of those listed.
    """
    fmt = nf_format(levels) if format is None else writable_format(format)
    work = effort_by_name(effort)
    if weight.dtype not in QUANTIZABLE_DTYPES:
        raise CannotQuantizeError(f"only floating weights of 16 bits or more are quantised, this one is {weight.dtype}")
    if weight.numel() == 0:
        raise CannotQuantizeError("an empty tensor has nothing to quantise")
    flat = weight.detach().to(device or weight.device).reshape(-1)
    largest = _largest_magnitudes(flat)
    finest_stride = 1 if fmt.levels >= FINE_SCALES_FROM else 2
    grid, gain = ScaleGrid.for_blocks(largest, finest_stride), 1.0
    if largest.amax() > grid.magnitudes[-1]:
        # fp16 numbers beyond the largest scale: half the weights, twice the levels, and no product beyond fp16.
        flat, gain = flat.float() / 2, 2.0
        largest = largest / 2
        grid = ScaleGrid.for_blocks(largest, finest_stride, torch.finfo(torch.float16).max / 2)
    if fmt.window:
        work = TRELLIS_EFFORTS[effort]
        trellis = fit_trellis(_sample(flat, work.sample_blocks), fmt, work)
        fitted, choose = trellis.levels, TrellisQuantizer(trellis, fmt, grid, flat.device, work.scale_steps).encode
    else:
        book = fit_codebook(_sample(flat, work.sample_blocks), grid, fmt, work, flat.numel())
        fitted, choose = _scalar(book, grid, flat.device)
    return NFTensor(_encode(flat, largest, fmt, grid, fitted * gain, choose), fmt, weight.shape, weight.dtype)


def chunk_blocks(device: torch.device) -> int:
    """How many blocks are quantised at once on a device."""
    return CHUNK_BLOCKS if device.type == "cpu" else DEVICE_CHUNK_BLOCKS


def _blocks(flat: torch.Tensor, first: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Blocks `first` … of a flat weight in `dtype`, shape (up to `count`, 64), the last one filled up with zeros."""
    part = flat[first * BLOCK : (first + count) * BLOCK].to(dtype)
    missing = -part.numel() % BLOCK
    if missing:
        part = torch.nn.functional.pad(part, (0, missing))
    return part.view(-1, BLOCK)


def _largest_magnitudes(flat: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, fp32 of shape (blocks,); CannotQuantizeError where fp16 does not do."""
    dtype = flat.dtype if flat.element_size() == 2 else torch.float32
    chunk = chunk_blocks(flat.device)
    largest = torch.cat(
        [largest_magnitudes(_blocks(flat, first, chunk, dtype)) for first in range(0, -(-flat.numel() // BLOCK), chunk)]
    )
    if not torch.isfinite(largest).all():
        raise CannotQuantizeError("it holds NaN or Inf")
    top = largest.amax().item()
    if top > torch.finfo(torch.float16).max or 0 < top < MIN_LARGEST:
        raise CannotQuantizeError(f"its largest magnitude, {top:.3g}, is out of the range of fp16 scales")
    return largest


def _sample(flat: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` blocks spread evenly over a flat weight, fp32 of shape (blocks, 64)."""
    total = -(-flat.numel() // BLOCK)
    if total <= count:
        return _blocks(flat, 0, total)
    whole = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    chosen = torch.linspace(0, len(whole) - 1, count, dtype=torch.float64, device=flat.device).long()
    return whole.index_select(0, chosen).float()


def _scalar(book: Codebook, grid: ScaleGrid, device: torch.device) -> tuple[torch.Tensor, ChooseCodes]:
    """The levels of a codebook in the order of their codes, and what chooses codes.

    Levels are numbered from the most used to the least: levels that share a coarse digit are then about equally
    frequent, so that the fine bits, which entropy coding cannot shorten, carry no information that it could.
    """
    order = book.uses.argsort(descending=True, stable=True)
    number_of_level = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(torch.uint8)
    quantizer = BlockQuantizer(book.levels, grid, device, book.prices, number_of_level)

    def choose(blocks: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale_codes = quantizer.scale_codes(blocks, largest)
        return scale_codes, quantizer.codes(blocks, quantizer.scales(scale_codes))

    return book.levels[order], choose


def _encode(
    flat: torch.Tensor,
    largest: torch.Tensor,
    fmt: BlockFormat,
    grid: ScaleGrid,
    levels: torch.Tensor,
    choose: ChooseCodes,
) -> torch.Tensor:
    """The packed buffer of a flat weight, on its device.

    Args:
        flat: the weight.
        largest: the largest magnitude of each block.
        fmt: the format.
        grid: the scales that may be used.
        levels: stand in the head as they are.
        choose: chooses scales and codes.
    """
    weights = flat.numel()
    sections = fmt.sections(weights)
    data = torch.zeros(sections.end, dtype=torch.uint8, device=flat.device)
    data[: 2 * fmt.levels].view(torch.float16).copy_(levels)
    data[2 * fmt.levels] = grid.exponent % 256
    data[2 * fmt.levels + 1] = grid.stride
    chunk = chunk_blocks(flat.device)
    for first in range(0, len(largest), chunk):
        blocks = _blocks(flat, first, chunk)
        scale_codes, codes = choose(blocks, largest[first : first + chunk])
        start = sections.block_scales + first
        data[start : start + len(blocks)] = scale_codes
        coarse, fine = pack_codes(codes, fmt)
        start = sections.coarse + first // fmt.coarse_digits * BLOCK
        data[start : start + len(coarse)] = coarse
        if fmt.fine_bits:
            start = sections.fine + first // fmt.fine_digits * BLOCK
            data[start : start + len(fine)] = fine
    return data
