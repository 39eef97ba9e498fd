"""Quantising one weight: find the largest magnitudes, fit levels, choose scales and codes, pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch

from ..errors import CannotQuantizeError
from ..packed.common_levels import common_levels
from ..packed.formats import nf_format, writable_format
from ..packed.layout import BLOCK, BlockFormat
from ..packed.packing import pack_codes
from ..packed.tensor import QUANTIZABLE_DTYPES, NFTensor
from .codebook import Codebook, effort_by_name, fit_codebook
from .feedback import SecondMoment, check_inputs, round_columns
from .search import BlockQuantizer, ScaleGrid, grid_and_factor, largest_magnitudes
from .trellis_feedback import TURNS, code_with_feedback
from .trellis_fit import TRELLIS_EFFORTS, TrellisQuantizer, fit_trellis, other_scales

CHUNK_BLOCKS = 12 * 1024
"""Blocks quantised at once on a CPU: temporaries of 3 MB each, and a multiple of every format's blocks_per_group."""

DEVICE_CHUNK_BLOCKS = 12 * CHUNK_BLOCKS
"""The same on other devices, where launches are expensive: temporaries of 38 MB each, six at once per thread."""

FIT_DTYPE = torch.float64
"""Dtype in which levels are fitted; a device without it cannot quantise."""

FINE_SCALES_FROM = 16
"""Codebooks with fewer levels get 8 scales per octave: 16 would cost 0.016 bits and gain less than 0.1 dB."""

MIN_LARGEST = 2.0**-12
"""Smallest accepted largest magnitude of a weight; below it the smallest scale, 2**-14, is too coarse."""

MAX_LOST_BLOCKS = 1e-2
"""Largest accepted share of blocks of at least MIN_BLOCK that decode to zeros because no scale is small enough."""

MIN_BLOCK = 2.0**-22
"""Blocks with a smaller largest magnitude may decode to zeros: it is four times the smallest step of fp16."""

MIN_IMPORTANCE = 1e-3
"""Lower bound of an input channel's importance, relative to the mean, so that no channel is ignored."""

Parts = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""A quantised weight in parts: scale codes, uint8 of shape (blocks,), and codes, uint8 of shape (blocks, 64).

Every part but the last has `chunk_blocks` blocks.
"""


def quantize(
    weight: torch.Tensor,
    levels: int = 16,
    *,
    format: str | None = None,
    effort: str = "fast",
    device: torch.device | str | None = None,
    importance: torch.Tensor | None = None,
    hessian: torch.Tensor | SecondMoment | None = None,
) -> NFTensor:
    """Quantise one weight to a block format.

    Args:
        weight: fp16, bf16, fp32 or fp64, any shape and strides.
        levels: size of the codebook: 32, 24, 16, 12 or 7.
        format: one of `formats.WRITABLE_IDS`, such as "t4w8_b64"; default: the NF format with `levels` levels.
        effort: "fast" or "best": time for fitting levels and, in trellis formats, number of scales tried.
        device: where to compute, and where the result stays; default: the device of `weight`. On a CPU the bytes are
            reproducible. Other devices sum in another order, so a few choices between almost equal scales or levels
            differ.
        importance: E[x²] of each input channel, floating, shape (weight.shape[1],). Levels and scales then minimise the
            error where inputs are strong. Ignored with `hessian`, which gives better results alone, and in trellis
            formats.
        hessian: E[x xᵀ] of the inputs, floating, shape (columns, columns) for a weight viewed as (rows, columns), or a
            `SecondMoment`. Codes are then chosen with error feedback, see `feedback` and `trellis_feedback`.

    Returns:
        The packed weight, on `device`; zero blocks decode to exact zeros.

    Raises:
        CannotQuantizeError: the weight is empty, not floating, holds NaN or Inf, is out of fp16's range, or has too
            many blocks far below its largest magnitude.
        ValueError: `levels`, `format` or `effort` is not one of those listed, or `importance` or `hessian` does not
            match the weight or holds NaN, Inf or (on the diagonal) negative numbers.
    """
    fmt = nf_format(levels) if format is None else writable_format(format)
    work = effort_by_name(effort)
    if weight.dtype not in QUANTIZABLE_DTYPES:
        raise CannotQuantizeError(f"only floating weights of 16 bits or more are quantised, this one is {weight.dtype}")
    if weight.numel() == 0:
        raise CannotQuantizeError("an empty tensor has nothing to quantise")
    moment = SecondMoment.of(hessian) if isinstance(hessian, torch.Tensor) else hessian
    check_inputs(weight.shape, importance, moment)
    flat = weight.detach().to(device or weight.device).reshape(-1)
    largest = _largest_magnitudes(flat)
    finest_stride = 1 if fmt.levels >= FINE_SCALES_FROM else 2
    original = largest
    grid, factor = grid_and_factor(largest, finest_stride)
    if factor != 1:
        flat, largest = flat.float() * factor, largest * factor
    # Common levels cannot be divided by a factor.
    may_be_common = fmt.has_common_levels and factor == 1
    common = common_levels(fmt.id, torch.device("cpu")).float() if may_be_common else None
    if fmt.window:
        work = TRELLIS_EFFORTS[effort]
        weights = flat.numel() if may_be_common else None
        trellis = fit_trellis(_sample(flat, work.sample_blocks)[0], fmt, work, weights)
        others = other_scales(effort, fmt, flat.numel(), flat.device)
        quantizer = TrellisQuantizer(trellis, fmt, grid, flat.device, others)
        fitted = trellis.levels
        if moment is None:
            parts = (quantizer.encode(*chunk) for _, *chunk in _chunks(flat, largest))
        else:
            matrix = flat.view(-1, len(moment.diagonal)).float()
            codes = code_with_feedback(matrix, moment, quantizer, fitted, grid.table, fmt, TURNS[effort])
            parts = zip(*(tensor.split(chunk_blocks(flat.device)) for tensor in codes), strict=True)
    else:
        columns = None
        if importance is not None and moment is None:
            columns = _column_importance(importance, weight.shape).to(flat.device)
        sample, sampled_importance = _sample(flat, work.sample_blocks, columns)
        book = fit_codebook(sample, grid, fmt, work, flat.numel(), sampled_importance, common)
        fitted, parts = _scalar(flat, largest, grid, book, columns, moment)
    stored = None if may_be_common and torch.equal(fitted, common) else fitted / factor
    data = _encode(parts, flat.numel(), fmt, grid, stored, flat.device)
    packed = NFTensor(data, fmt, weight.shape, weight.dtype)
    _refuse_lost_blocks(packed, original, grid.magnitudes[0].item() / factor)
    return packed


def _refuse_lost_blocks(packed: NFTensor, largest: torch.Tensor, smallest: float) -> None:
    """CannotQuantizeError if more than MAX_LOST_BLOCKS of the blocks of at least MIN_BLOCK decode to zeros.

    Args:
        packed: the quantised weight.
        largest: largest magnitude of each block before quantising, fp32 of shape (blocks,).
        smallest: the smallest scale as a magnitude of the weight; no block above it is lost.
    """
    counted = largest >= MIN_BLOCK
    count = int(counted.sum())
    if int((counted & (largest < smallest)).sum()) <= MAX_LOST_BLOCKS * count:
        return
    dense = torch.empty(packed.numel(), dtype=torch.float16, device=packed.device)
    packed.dequantize(out=dense.view(packed.shape))
    decoded = torch.cat([largest_magnitudes(blocks) for _, blocks, _ in _chunks(dense, largest)])
    lost = int((counted & (decoded == 0)).sum())
    if lost > MAX_LOST_BLOCKS * count:
        raise CannotQuantizeError(
            f"{lost / count:.1%} of its blocks that hold weights would decode to zeros: they are too far below its "
            f"largest magnitude, {largest.amax().item():.3g}"
        )


def chunk_blocks(device: torch.device) -> int:
    """Number of blocks quantised at once on a device."""
    return CHUNK_BLOCKS if device.type == "cpu" else DEVICE_CHUNK_BLOCKS


def _column_importance(importance: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Importance of each column of the flattened weight, fp32, 1 on average, at least MIN_IMPORTANCE."""
    relative = importance.double() / importance.double().mean().clamp_min(1e-300)
    return relative.clamp_min(MIN_IMPORTANCE).float().repeat_interleave(prod(shape[2:]))


def _block_importance(columns: torch.Tensor | None, block_indices: torch.Tensor) -> torch.Tensor | None:
    """Importance of every weight of some blocks, fp32 of shape (blocks, 64); None if `columns` is None."""
    if columns is None:
        return None
    positions = block_indices[:, None] * BLOCK + torch.arange(BLOCK, device=columns.device)
    return columns[positions % len(columns)]


def _blocks(flat: torch.Tensor, first: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Up to `count` blocks of a flat weight from block `first`, in `dtype`, shape (blocks, 64), padded with zeros."""
    part = flat[first * BLOCK : (first + count) * BLOCK].to(dtype)
    missing = -part.numel() % BLOCK
    if missing:
        part = torch.nn.functional.pad(part, (0, missing))
    return part.view(-1, BLOCK)


def _chunks(flat: torch.Tensor, largest: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each chunk of a flat weight: index of its first block, its blocks in fp32, their largest magnitudes."""
    chunk = chunk_blocks(flat.device)
    for first in range(0, len(largest), chunk):
        yield first, _blocks(flat, first, chunk), largest[first : first + chunk]


def _largest_magnitudes(flat: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, fp32 of shape (blocks,); CannotQuantizeError if fp16 cannot hold the weight."""
    dtype = flat.dtype if flat.element_size() == 2 else torch.float32
    chunk = chunk_blocks(flat.device)
    largest = torch.cat(
        [largest_magnitudes(_blocks(flat, first, chunk, dtype)) for first in range(0, -(-flat.numel() // BLOCK), chunk)]
    )
    if not torch.isfinite(largest).all():
        beyond_fp32 = flat.dtype == torch.float64 and torch.isfinite(flat).all()
        raise CannotQuantizeError("its largest magnitude is beyond fp32" if beyond_fp32 else "it holds NaN or Inf")
    top = largest.amax().item()
    if top > torch.finfo(torch.float16).max or 0 < top < MIN_LARGEST:
        raise CannotQuantizeError(f"its largest magnitude, {top:.3g}, is out of the range of fp16 scales")
    return largest


def _sample(
    flat: torch.Tensor, count: int, columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `count` blocks spread evenly over a flat weight, and their importance, None if `columns` is None.

    Both are fp32 of shape (blocks, 64).
    """
    total = -(-flat.numel() // BLOCK)
    if total <= count:
        indices = torch.arange(total, device=flat.device)
        return _blocks(flat, 0, total), _block_importance(columns, indices)
    whole = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    indices = torch.linspace(0, len(whole) - 1, count, dtype=torch.float64, device=flat.device).long()
    return whole.index_select(0, indices).float(), _block_importance(columns, indices)


def _scalar(
    flat: torch.Tensor,
    largest: torch.Tensor,
    grid: ScaleGrid,
    book: Codebook,
    columns: torch.Tensor | None = None,
    moment: SecondMoment | None = None,
) -> tuple[torch.Tensor, Parts]:
    """Quantise a flat weight in a scalar format: the levels in the order of their codes, and the parts.

    The most used level gets code 0. Levels that share a coarse digit are then about equally frequent, so the fine bits,
    which entropy coding does not shorten, would hardly shrink anyway.

    Args:
        flat: the weight.
        largest: largest magnitude of each block.
        grid: the scales that may be used.
        book: the levels.
        columns: importance of each column.
        moment: second moment of the inputs; None: no error feedback.
    """
    order = book.uses.argsort(descending=True, stable=True)
    code_of_level = order.argsort().to(torch.uint8)
    quantizer = BlockQuantizer(book.levels, grid, flat.device, book.prices, code_of_level)
    if moment is None:
        parts = _rounded(flat, largest, quantizer, columns)
    else:
        parts = _rounded_with_feedback(flat, largest, quantizer, moment)
    return book.levels[order], parts


def _rounded(
    flat: torch.Tensor, largest: torch.Tensor, quantizer: BlockQuantizer, columns: torch.Tensor | None
) -> Parts:
    """The parts of a flat weight, each weight rounded to the nearest level."""
    for first, blocks, tops in _chunks(flat, largest):
        indices = torch.arange(first, first + len(blocks), device=flat.device)
        scale_codes = quantizer.scale_codes(blocks, tops, _block_importance(columns, indices))
        yield scale_codes, quantizer.codes(blocks, quantizer.scales(scale_codes))


def _rounded_with_feedback(
    flat: torch.Tensor,
    largest: torch.Tensor,
    quantizer: BlockQuantizer,
    moment: SecondMoment,
) -> Parts:
    """The parts of a flat weight, rounded as a whole by `round_columns`."""
    scale_codes = torch.cat([quantizer.scale_codes(blocks, tops) for _, blocks, tops in _chunks(flat, largest)])
    weight = flat.view(-1, len(moment.diagonal)).float()
    codes = round_columns(weight, quantizer.scales(scale_codes), quantizer.nearest, moment).view(-1)
    codes = torch.nn.functional.pad(codes, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    chunk = chunk_blocks(flat.device)
    return zip(scale_codes.split(chunk), codes.split(chunk), strict=True)


def _encode(
    parts: Parts, weights: int, fmt: BlockFormat, grid: ScaleGrid, levels: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Build the packed buffer of a weight.

    Args:
        parts: scale codes and codes.
        weights: number of weights.
        fmt: the format.
        grid: the scales that were used.
        levels: in the order of their numbers, to be stored as fp16; None: the common ones.
        device: device of the parts and of the buffer.
    """
    sections = fmt.sections(weights, levels is not None)
    data = torch.zeros(sections.end, dtype=torch.uint8, device=device)
    if levels is not None:
        fmt.levels_in(data, sections).copy_(levels)
    fmt.scale_parameters(data).copy_(torch.tensor([grid.exponent, grid.stride], device="cpu"))
    first = 0
    for scale_codes, codes in parts:
        start = sections.scales + first
        data[start : start + len(scale_codes)] = scale_codes
        coarse, fine = pack_codes(codes, fmt)
        start = sections.coarse + first // fmt.coarse_digits * BLOCK
        data[start : start + len(coarse)] = coarse
        if fmt.fine_bits:
            start = sections.fine + first // fmt.fine_digits * BLOCK
            data[start : start + len(fine)] = fine
        first += len(scale_codes)
    return data
