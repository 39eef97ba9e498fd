"""NFTensor: one quantised weight as one packed buffer, and the function that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from .codebook import EFFORTS, Codebook, Effort, fit_codebook
from .errors import CannotQuantizeError, CorruptFileError
from .formats import BLOCK, BlockFormat, Scales, nf_format, scale_table
from .kernels import dequantize_into, head_levels
from .packing import pack_codes, unpack_codes
from .search import BlockQuantizer, ScaleGrid, largest_magnitudes

CHUNK_BLOCKS = 12 * 1024
"""Blocks quantised at once: temporaries of 3 MB, and a multiple of every format's blocks_per_group."""

QUANTIZABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FINE_SCALES_FROM = 16
"""Codebooks of fewer levels gain under 0.1 dB from 16 scales per octave, which cost 0.016 bits; they get 8."""

MIN_LARGEST = 2.0**-12
"""Below this largest magnitude, the smallest scale (2**-14) is too coarse for a weight."""


class NFTensor:
    """A quantised weight: its packed buffer, format and shape, and the dtype it had.

    Args:
        data: the packed buffer, 1-D uint8, exactly `fmt.packed_bytes(weights)` long, on any device.
        fmt: its format.
        shape: shape of the weight; the row-major flattened weight is cut into blocks of 64.
        dtype: dtype of the weight before it was quantised.

    Raises:
        CorruptFileError: the buffer's length or head contradicts format and shape.
    """

    def __init__(self, data: torch.Tensor, fmt: BlockFormat, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.data = data
        self.format = fmt
        self.shape = torch.Size(shape)
        self.dtype = dtype
        wanted = fmt.packed_bytes(self.numel())
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != wanted:
            raise CorruptFileError(
                f"a packed {fmt.id} weight of shape {tuple(shape)} is a 1-D uint8 buffer of {wanted:,} bytes, "
                f"got {data.dtype} of shape {tuple(data.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """Length of the packed buffer in bytes, all overheads included."""
        return self.data.numel()

    @property
    def bits_per_weight(self) -> float:
        """Packed bits per weight, all overheads included."""
        return self.nbytes * 8 / self.numel()

    @property
    def device(self) -> torch.device:
        """Where the packed buffer is."""
        return self.data.device

    @property
    def levels(self) -> torch.Tensor:
        """The levels of this weight in the order of their codes, fp16 of shape (format.levels,)."""
        return head_levels(self.data, self.format)

    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NFTensor:
        """The same weight with its packed buffer on `device`."""
        return NFTensor(self.data.to(device, non_blocking=non_blocking), self.format, self.shape, self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float16, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weights ``fp16(level * scale)``, cast to `dtype`.

        Args:
            dtype: floating dtype of the result; ignored when `out` is given.
            out: where to write them; contiguous, of this shape, on this device. Nothing of the result's size is then
                allocated.

        Raises:
            ValueError: `out` has another shape or device, or is not contiguous.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        elif out.shape != self.shape or out.device != self.device or not out.is_contiguous():
            raise ValueError(
                f"out must be a contiguous tensor of shape {tuple(self.shape)} on {self.device}, got "
                f"{tuple(out.shape)} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
            )
        dequantize_into(out, self.data, self.format)
        return out

    def validate(self, codes: bool = True) -> None:
        """Check the buffer's contents: scale parameters in bounds and, with `codes`, no byte that no writer makes.

        Raises:
            CorruptFileError: something is out of bounds.
        """
        sections = self.format.sections(self.numel())
        if self.format.scales is Scales.LOGARITHMIC:
            exponent, stride = self.data[2 * self.format.levels : 2 * self.format.levels + 2].view(torch.int8).tolist()
            try:
                scale_table(exponent, stride)
            except ValueError as error:
                raise CorruptFileError(str(error)) from None
        if not torch.isfinite(self.levels).all():
            raise CorruptFileError("its levels are not finite")
        if not codes:
            return
        coarse = self.data[sections.coarse : sections.fine]
        if int(coarse.amax()) >= self.format.coarse_radix**self.format.coarse_digits:
            raise CorruptFileError("its coarse plane holds a byte that is no set of digits")
        blocks = -(-self.numel() // BLOCK)
        fine = self.data[sections.fine : sections.superblock_scales]
        if int(unpack_codes(coarse, fine, blocks, self.format).amax()) >= self.format.levels:
            raise CorruptFileError("it holds a code that names no level")

    def __repr__(self) -> str:
        return f"NFTensor({self.format.id}, shape={tuple(self.shape)}, {self.bits_per_weight:.3f} bits per weight)"


def quantize(
    weight: torch.Tensor, levels: int = 16, *, effort: str = "fast", device: torch.device | str | None = None
) -> NFTensor:
    """Quantise one weight to an NF block format.

    Args:
        weight: fp16, bf16, fp32 or fp64, any shape, any strides.
        levels: size of the codebook: 32, 24, 16, 12 or 7.
        effort: "fast" or "best": how long the codebook is fitted.
        device: where to work; by default where `weight` is. The result stays there.

    Returns:
        The packed weight; zero blocks come back as exact zeros.

    Raises:
        CannotQuantizeError: the weight is empty, not floating, holds NaN or Inf, or is too large or small for fp16.
        ValueError: `levels` or `effort` is none of those listed.
    """
    fmt = nf_format(levels)
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    if weight.dtype not in QUANTIZABLE_DTYPES:
        raise CannotQuantizeError(f"only floating weights of 16 bits or more are quantised, this one is {weight.dtype}")
    if weight.numel() == 0:
        raise CannotQuantizeError("an empty tensor has nothing to quantise")
    work = weight.detach().to(device or weight.device).reshape(-1)
    grid, sample = _survey(work, EFFORTS[effort], 1 if levels >= FINE_SCALES_FROM else 2)
    book = fit_codebook(sample, grid, fmt, EFFORTS[effort], work.numel())
    return NFTensor(_encode(work, fmt, grid, book), fmt, weight.shape, weight.dtype)


def _blocks(flat: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Blocks `first` … of a flat weight as fp32 of shape (up to `count`, 64), the last one filled up with zeros."""
    part = flat[first * BLOCK : (first + count) * BLOCK].float()
    missing = -part.numel() % BLOCK
    if missing:
        part = torch.nn.functional.pad(part, (0, missing))
    return part.view(-1, BLOCK)


def _survey(flat: torch.Tensor, effort: Effort, finest_stride: int) -> tuple[ScaleGrid, torch.Tensor]:
    """The grid of scales that suits a weight, and a sample of its blocks spread evenly over it."""
    total = -(-flat.numel() // BLOCK)
    largest = torch.cat(
        [largest_magnitudes(_blocks(flat, first, CHUNK_BLOCKS)) for first in range(0, total, CHUNK_BLOCKS)]
    )
    if not torch.isfinite(largest).all():
        raise CannotQuantizeError("it holds NaN or Inf")
    top = largest.amax().item()
    grid = ScaleGrid.for_blocks(largest, finest_stride)
    if top > grid.magnitudes[-1] or 0 < top < MIN_LARGEST:
        raise CannotQuantizeError(f"its largest magnitude, {top:.3g}, is out of the range of fp16 scales")
    if total <= effort.sample_blocks:
        return grid, _blocks(flat, 0, total)
    whole = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    chosen = torch.linspace(0, len(whole) - 1, effort.sample_blocks, dtype=torch.float64, device=flat.device).long()
    return grid, whole.index_select(0, chosen).float()


def _encode(flat: torch.Tensor, fmt: BlockFormat, grid: ScaleGrid, book: Codebook) -> torch.Tensor:
    """The packed buffer of a flat weight, on its device.

    Levels are numbered from the most used to the least: levels that share a coarse digit are then about equally
    frequent, so that the fine bits, which entropy coding cannot shorten, carry no information that it could.
    """
    weights = flat.numel()
    sections = fmt.sections(weights)
    quantizer = BlockQuantizer(book.levels, grid, flat.device, book.prices)
    data = torch.zeros(sections.end, dtype=torch.uint8, device=flat.device)
    order = book.uses.argsort(descending=True, stable=True)
    number_of_level = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(torch.uint8)
    data[: 2 * fmt.levels].view(torch.float16).copy_(book.levels[order])
    data[2 * fmt.levels] = grid.exponent % 256
    data[2 * fmt.levels + 1] = grid.stride
    renumber = number_of_level.to(flat.device)
    for first in range(0, -(-weights // BLOCK), CHUNK_BLOCKS):
        blocks = _blocks(flat, first, CHUNK_BLOCKS)
        scale_codes = quantizer.scale_codes(blocks, largest_magnitudes(blocks))
        start = sections.block_scales + first
        data[start : start + len(blocks)] = scale_codes
        codes = quantizer.codes(blocks, quantizer.scales(scale_codes))
        coarse, fine = pack_codes(renumber.index_select(0, codes.view(-1).int()).view(-1, BLOCK), fmt)
        start = sections.coarse + first // fmt.coarse_digits * BLOCK
        data[start : start + len(coarse)] = coarse
        if fmt.fine_bits:
            start = sections.fine + first // fmt.fine_digits * BLOCK
            data[start : start + len(fine)] = fine
    return data
