"""NFTensor: one quantised weight in one packed buffer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from ..errors import CorruptFileError
from .backends import dequantize_into
from .layout import BLOCK, BlockFormat, Sections
from .packing import unpack_codes

QUANTIZABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be quantised, and to which they can be dequantised."""


class NFTensor:
    """A quantised weight: packed buffer, format, shape and original dtype.

    Args:
        data: the packed buffer, 1-D uint8, on any device.
        fmt: its format.
        shape: shape of the weight; blocks are cut from the row-major flattened weight.
        dtype: dtype of the weight before it was quantised.

    Raises:
        CorruptFileError: the buffer's dtype or length contradicts format and shape, it is not contiguous, or its
            storage offset is not a multiple of four bytes.
    """

    def __init__(self, data: torch.Tensor, fmt: BlockFormat, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.data = data
        self.format = fmt
        self.shape = torch.Size(shape)
        self.dtype = dtype
        wanted = self.sections.end
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != wanted:
            raise CorruptFileError(
                f"a packed {fmt.id} weight of shape {tuple(shape)} is a 1-D uint8 buffer of {self._lengths()} bytes, "
                f"got {data.dtype} of shape {tuple(data.shape)}"
            )
        if not data.is_contiguous() or data.storage_offset() % 4:
            raise CorruptFileError(
                "a packed buffer must be contiguous, with a storage offset that is a multiple of four bytes; clone it"
            )

    @property
    def sections(self) -> Sections:
        """Where each section of the packed buffer begins."""
        return self.format.sections_of(self.data, self.numel())

    def _lengths(self) -> str:
        """The possible lengths of the packed buffer in bytes, in words."""
        own = self.format.sections(self.numel()).end
        shorter = (
            f"{self.format.sections(self.numel(), own_levels=False).end:,} or " if self.format.has_common_levels else ""
        )
        return f"{shorter}{own:,}"

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffer, all overheads included."""
        return self.data.numel()

    @property
    def bits_per_weight(self) -> float:
        """Bits of the packed buffer per weight, all overheads included."""
        return self.nbytes * 8 / self.numel()

    @property
    def device(self) -> torch.device:
        """Device of the packed buffer."""
        return self.data.device

    @property
    def levels(self) -> torch.Tensor:
        """The levels of this weight by level number, fp16 of shape (format.levels,)."""
        return self.format.levels_in(self.data, self.sections)

    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or its length in one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def to(
        self,
        target: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **moving: Any,
    ) -> NFTensor | torch.Tensor:
        """The same weight on another device, or dequantised to a dtype; the arguments of `torch.Tensor.to`.

        Args:
            target: a device, or the dtype.
            dtype: one of QUANTIZABLE_DTYPES; None keeps the weight packed.
            moving: `device`, or `non_blocking`.

        Raises:
            TypeError: another argument.
            ValueError: weights cannot be dequantised to the dtype.
        """
        if isinstance(target, torch.dtype):
            target, dtype = None, target
        target = moving.pop("device", target)
        if moving.keys() - {"non_blocking"}:
            raise TypeError(f"a packed weight has no {', '.join(moving)}; dequantize() it first")
        packed = self if target is None else self._with(self.data.to(device=target, **moving))
        return packed if dtype is None else packed.dequantize(dtype)

    def cpu(self) -> NFTensor:
        """The same weight, packed, in RAM."""
        return self._with(self.data.cpu())

    def cuda(self, device: torch.device | str | int | None = None) -> NFTensor:
        """The same weight, packed, on a CUDA device, by default the current one."""
        return self._with(self.data.cuda(device))

    def _with(self, data: torch.Tensor) -> NFTensor:
        return NFTensor(data, self.format, self.shape, self.dtype)

    def float(self) -> torch.Tensor:
        """The weight dequantised to fp32."""
        return self.dequantize(torch.float32)

    def half(self) -> torch.Tensor:
        """The weight dequantised to fp16, the dtype of the decode."""
        return self.dequantize(torch.float16)

    def bfloat16(self) -> torch.Tensor:
        """The weight dequantised to bf16."""
        return self.dequantize(torch.bfloat16)

    def numpy(self) -> np.ndarray:
        """The weight dequantised to fp16 as a numpy array, from any device."""
        return self.cpu().dequantize().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a packed weight has no array of its own; leave copy=False out")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def dequantize(self, dtype: torch.dtype = torch.float16, out: torch.Tensor | None = None) -> torch.Tensor:
        """Decode the weights: ``fp16(level * scale)``, cast to `dtype`.

        Args:
            dtype: one of QUANTIZABLE_DTYPES; ignored when `out` is given.
            out: contiguous tensor to write to, with the weight's shape and device. Only temporaries are then allocated,
                see `torch_decode.dequantize_into`.

        Raises:
            ValueError: `out` has the wrong shape or device or is not contiguous, or the dtype is not supported.
        """
        result_dtype = dtype if out is None else out.dtype
        if result_dtype not in QUANTIZABLE_DTYPES:
            raise ValueError(f"weights are dequantised to fp16, bf16, fp32 or fp64, got {result_dtype}")
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
        """Check the buffer's contents: levels and scales finite and in bounds and, if `codes`, every code valid.

        Raises:
            CorruptFileError: a value is invalid.
        """
        sections = self.sections
        self.format.check_scales(self.data, self.numel())
        if not torch.isfinite(self.levels).all():
            raise CorruptFileError("its levels are not finite")
        if not codes:
            return
        coarse = self.data[sections.coarse : sections.fine]
        if int(coarse.amax()) >= self.format.coarse_radix**self.format.coarse_digits:
            raise CorruptFileError("its coarse plane holds an invalid byte")
        blocks = -(-self.numel() // BLOCK)
        fine = self.data[sections.fine : sections.scales]
        if int(unpack_codes(coarse, fine, blocks, self.format).amax()) >= self.format.codes:
            raise CorruptFileError("it holds a code without a level")

    def __repr__(self) -> str:
        return f"NFTensor({self.format.id}, shape={tuple(self.shape)}, {self.bits_per_weight:.3f} bits per weight)"
