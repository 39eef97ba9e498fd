"""Quantising one weight: survey it, fit levels, choose scales and codes, pack."""

from __future__ import annotations

from math import prod

import torch

from .codebook import Codebook, effort_by_name, fit_codebook
from .errors import CannotQuantizeError
from .feedback import SecondMoment, check_inputs, round_columns
from .formats import BLOCK, BlockFormat, nf_format
from .packing import pack_codes
from .search import BlockQuantizer, ScaleGrid, largest_magnitudes
from .tensor import QUANTIZABLE_DTYPES, NFTensor

CHUNK_BLOCKS = 12 * 1024
"""Blocks quantised at once: temporaries of 3 MB, and a multiple of every format's blocks_per_group."""

FINE_SCALES_FROM = 16
"""Codebooks of fewer levels gain under 0.1 dB from 16 scales per octave, which cost 0.016 bits; they get 8."""

MIN_LARGEST = 2.0**-12
"""Below this largest magnitude, the smallest scale (2**-14) is too coarse for a weight."""

MIN_IMPORTANCE = 1e-3
"""The least that an input channel counts, as a share of the mean: weights there are still rounded with some care."""


def quantize(
    weight: torch.Tensor,
    levels: int = 16,
    *,
    effort: str = "fast",
    device: torch.device | str | None = None,
    importance: torch.Tensor | None = None,
    hessian: torch.Tensor | SecondMoment | None = None,
) -> NFTensor:
    """Quantise one weight to an NF block format.

    Args:
        weight: fp16, bf16, fp32 or fp64, any shape, any strides.
        levels: size of the codebook: 32, 24, 16, 12 or 7.
        effort: "fast" or "best": how long the codebook is fitted.
        device: where to work; by default where `weight` is. The result stays there.
        importance: E[x²] of each input channel, floating of shape (weight.shape[1],): levels and scales are chosen for
            the least error where inputs are strong. Without effect beside `hessian`, which does better alone.
        hessian: E[x xᵀ] of the inputs, floating of shape (columns, columns) for a weight seen as (rows, columns), or a
            `SecondMoment`: codes are chosen with error feedback, see `feedback`.

    Returns:
        The packed weight; zero blocks come back as exact zeros.

    Raises:
        CannotQuantizeError: the weight is empty, not floating, holds NaN or Inf, or is too large or small for fp16.
        ValueError: `levels` or `effort` is none of those listed, or `importance` or `hessian` does not fit the weight
            or holds NaN, Inf or (on the diagonal) negative numbers.
    """
    fmt = nf_format(levels)
    work = effort_by_name(effort)
    if weight.dtype not in QUANTIZABLE_DTYPES:
        raise CannotQuantizeError(f"only floating weights of 16 bits or more are quantised, this one is {weight.dtype}")
    if weight.numel() == 0:
        raise CannotQuantizeError("an empty tensor has nothing to quantise")
    moment = SecondMoment.of(hessian) if isinstance(hessian, torch.Tensor) else hessian
    check_inputs(weight.shape, importance, moment)
    flat = weight.detach().to(device or weight.device).reshape(-1)
    largest = _largest_magnitudes(flat)
    finest_stride = 1 if levels >= FINE_SCALES_FROM else 2
    grid, gain = ScaleGrid.for_blocks(largest, finest_stride), 1.0
    if largest.amax() > grid.magnitudes[-1]:
        # fp16 numbers beyond the largest scale: half the weights, twice the levels, and no product beyond fp16.
        flat, gain = flat.float() / 2, 2.0
        grid = ScaleGrid.for_blocks(largest / 2, finest_stride, torch.finfo(torch.float16).max / 2)
    columns = None
    if importance is not None and moment is None:
        columns = _column_importance(importance, weight.shape).to(flat.device)
    sample, sampled_importance = _sample(flat, work.sample_blocks, columns)
    book = fit_codebook(sample, grid, fmt, work, flat.numel(), sampled_importance)
    data = _encode(flat.view((*weight.shape[:1], -1)), fmt, grid, book, gain, columns, moment)
    return NFTensor(data, fmt, weight.shape, weight.dtype)


def _column_importance(importance: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The importance of each column of the flattened weight, fp32, 1 in the mean; none counts next to nothing."""
    relative = importance.double() / importance.double().mean().clamp_min(1e-300)
    return relative.clamp_min(MIN_IMPORTANCE).float().repeat_interleave(prod(shape[2:]))


def _block_importance(columns: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The importance of every weight of some blocks, named by their numbers, fp32 of shape (blocks, 64)."""
    positions = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=columns.device)
    return columns[positions % len(columns)]


def _blocks(flat: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Blocks `first` … of a flat weight as fp32 of shape (up to `count`, 64), the last one filled up with zeros."""
    part = flat[first * BLOCK : (first + count) * BLOCK].float()
    missing = -part.numel() % BLOCK
    if missing:
        part = torch.nn.functional.pad(part, (0, missing))
    return part.view(-1, BLOCK)


def _largest_magnitudes(flat: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, fp32 of shape (blocks,); CannotQuantizeError where fp16 does not do."""
    largest = torch.cat(
        [
            largest_magnitudes(_blocks(flat, first, CHUNK_BLOCKS))
            for first in range(0, -(-flat.numel() // BLOCK), CHUNK_BLOCKS)
        ]
    )
    if not torch.isfinite(largest).all():
        raise CannotQuantizeError("it holds NaN or Inf")
    top = largest.amax().item()
    if top > torch.finfo(torch.float16).max or 0 < top < MIN_LARGEST:
        raise CannotQuantizeError(f"its largest magnitude, {top:.3g}, is out of the range of fp16 scales")
    return largest


def _sample(flat: torch.Tensor, count: int, columns: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `count` blocks spread evenly over a flat weight, and their importance where there is one.

    Both are fp32 of shape (blocks, 64).
    """
    total = -(-flat.numel() // BLOCK)
    if total <= count:
        chosen = torch.arange(total, device=flat.device)
        sample = _blocks(flat, 0, total)
    else:
        whole = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
        chosen = torch.linspace(0, len(whole) - 1, count, dtype=torch.float64, device=flat.device).long()
        sample = whole.index_select(0, chosen).float()
    return sample, None if columns is None else _block_importance(columns, chosen)


def _codes_with_feedback(
    weight: torch.Tensor, quantizer: BlockQuantizer, moment: SecondMoment
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale codes (blocks,) and codes (blocks, 64) of a weight of shape (rows, columns), uint8."""
    flat = weight.reshape(-1)
    scale_codes = []
    for first in range(0, -(-flat.numel() // BLOCK), CHUNK_BLOCKS):
        blocks = _blocks(flat, first, CHUNK_BLOCKS)
        scale_codes.append(quantizer.scale_codes(blocks, largest_magnitudes(blocks)))
    scale_codes = torch.cat(scale_codes)
    scales = quantizer.scales(scale_codes).repeat_interleave(BLOCK)[: flat.numel()].view(weight.shape)
    levels, boundaries = (tensor.to(flat.device) for tensor in (quantizer.levels, quantizer.boundaries))
    codes = round_columns(weight.float(), scales, levels, boundaries, moment).reshape(-1)
    return scale_codes, torch.nn.functional.pad(codes, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _encode(
    weight: torch.Tensor,
    fmt: BlockFormat,
    grid: ScaleGrid,
    book: Codebook,
    gain: float,
    columns: torch.Tensor | None,
    moment: SecondMoment | None,
) -> torch.Tensor:
    """The packed buffer of `gain` times a weight of shape (rows, columns), on its device.

    Levels are numbered from the most used to the least: levels that share a coarse digit are then about equally
    frequent, so that the fine bits, which entropy coding cannot shorten, carry no information that it could.
    """
    flat = weight.reshape(-1)
    weights = flat.numel()
    sections = fmt.sections(weights)
    quantizer = BlockQuantizer(book.levels, grid, flat.device, book.prices)
    data = torch.zeros(sections.end, dtype=torch.uint8, device=flat.device)
    order = book.uses.argsort(descending=True, stable=True)
    number_of_level = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(torch.uint8)
    data[: 2 * fmt.levels].view(torch.float16).copy_(book.levels[order] * gain)
    data[2 * fmt.levels] = grid.exponent % 256
    data[2 * fmt.levels + 1] = grid.stride
    renumber = number_of_level.to(flat.device)
    fed = None if moment is None else _codes_with_feedback(weight, quantizer, moment)
    for first in range(0, -(-weights // BLOCK), CHUNK_BLOCKS):
        if fed is None:
            blocks = _blocks(flat, first, CHUNK_BLOCKS)
            importance = None
            if columns is not None:
                numbers = torch.arange(first, first + len(blocks), device=flat.device)
                importance = _block_importance(columns, numbers)
            scale_codes = quantizer.scale_codes(blocks, largest_magnitudes(blocks), importance)
            codes = quantizer.codes(blocks, quantizer.scales(scale_codes))
        else:
            scale_codes, codes = (part[first : first + CHUNK_BLOCKS] for part in fed)
        start = sections.block_scales + first
        data[start : start + len(scale_codes)] = scale_codes
        coarse, fine = pack_codes(renumber.index_select(0, codes.view(-1).int()).view(-1, BLOCK), fmt)
        start = sections.coarse + first // fmt.coarse_digits * BLOCK
        data[start : start + len(coarse)] = coarse
        if fmt.fine_bits:
            start = sections.fine + first // fmt.fine_digits * BLOCK
            data[start : start + len(fine)] = fine
    return data
