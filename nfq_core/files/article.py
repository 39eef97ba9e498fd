"""The file format of the article on which this project builds, to import and to compare with.

One byte per weight, compressed with bz2; one uint8 scale per block; one fp32 maximum per superblock. Rounding equals
the article's to the bit, including its bug. A block's scale is rounded, possibly down, to uint8. In a block far below
its superblock's maximum, a weight can therefore exceed the last threshold, and then gets no code. The file instead
holds the weight divided by its scale, rounded and truncated to a byte. If the uint8 scale is not 0, the byte is 1 or 2.
A reader takes it for "code" 207 or 208 and decodes it to 207 or 208 times the scale.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..errors import CannotQuantizeError, CorruptFileError, UnsupportedFileError
from ..packed.article import SCALE_STEPS, SUPERBLOCK, scale_of
from ..packed.layout import BLOCK
from .untrusted import MAX_DIMENSIONS

SHIFT = 50
"""Added to a code to make the byte that is compressed."""

MAX_LEVELS = 128 - SHIFT
"""The article's writer handles the bytes as ASCII text."""

PARTS = {
    "orig_shape": torch.int64,
    "param": torch.int32,
    "c1": torch.uint8,
    "c2": torch.float32,
    "M": torch.uint8,
}
"""Tensors that hold the parts of a quantised tensor, all 1-D; its own name holds a placeholder."""

INFIX = ".quantization."
"""Separates the names of a tensor and of its part."""

SUPERBLOCK_WEIGHTS = SUPERBLOCK * BLOCK

SPREAD = 0.96
"""Fraction of erfinv's domain that the codebook covers."""

SENTINEL = 1.3
"""Stands for a level after the last one; a weight beyond the midpoint of the two gets no code."""


@dataclass(frozen=True)
class ArticleTensor:
    """One quantised weight as the article's file holds it, decompressed."""

    shape: tuple[int, ...]
    levels: int
    c1: torch.Tensor
    """Scale of each block in 1/255 of its superblock's maximum; uint8, padded to whole superblocks."""
    c2: torch.Tensor
    """Largest magnitude of each superblock; float32."""
    codes: torch.Tensor
    """Codebook index of each weight; uint8. Values from `levels` on are not indices, see the module."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def param(self) -> torch.Tensor:
        """The five parameters that the file stores with the shape: int32."""
        numbers = [self.weights, self.levels, SHIFT, BLOCK, SUPERBLOCK_WEIGHTS]
        return torch.tensor(numbers, dtype=torch.int32)

    def block_scales(self) -> torch.Tensor:
        """Scale of each block, without padding; fp32, each operation rounded to fp32 in this order."""
        return scale_of(self.c2, self.c1[: -(-self.weights // BLOCK)])

    def corrupt_weights(self) -> int:
        """Number of weights that the bug has corrupted: those without a code that do not decode to 0."""
        return int(((self.codes >= self.levels) & (article_dequantize(self).flatten() != 0)).sum())

    def assignable_codes(self) -> torch.Tensor:
        """The codes, with values that are not indices replaced by the last level's index; uint8.

        They decode to the same bits if `corrupt_weights()` is 0: the scale of such a block turns any level into 0.
        """
        return self.codes.clamp(max=self.levels - 1)


@lru_cache(maxsize=MAX_LEVELS)
def article_codebook(levels: int) -> torch.Tensor:
    """The article's levels, ascending up to 1; float32 of shape (levels,).

    They are the midpoints of neighbouring quantiles of a normal distribution, computed with torch's erfinv.
    """
    if not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"the article's codebooks have 2 to {MAX_LEVELS} levels, got {levels}")
    # torch.linspace rounds differently from numpy, which the article uses.
    quantiles = torch.erfinv(torch.from_numpy(np.linspace(-1, 1, levels + 1)).float() * SPREAD)
    middles = (quantiles[:-1] + quantiles[1:]) / 2
    return middles / middles.max()


def article_quantize(weight: torch.Tensor, levels: int) -> ArticleTensor:
    """Quantise one weight as the article's code does, to the bit.

    Args:
        weight: floating, any shape, on the CPU.
        levels: size of the codebook, 2 to 78.

    Raises:
        CannotQuantizeError: the weight is empty or holds NaN or Inf.
    """
    flat = weight.detach().float().flatten()
    if flat.numel() == 0 or not torch.isfinite(flat).all():
        raise CannotQuantizeError("the article's format needs at least one weight, and all of them finite")
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % SUPERBLOCK_WEIGHTS))
    blocks = padded.view(-1, SUPERBLOCK, BLOCK)
    block_maxima = blocks.abs().amax(dim=-1)
    c2 = block_maxima.amax(dim=-1)
    c1 = torch.round(SCALE_STEPS * block_maxima / c2[:, None]).to(torch.uint8)
    scales = scale_of(c2, c1.flatten()).view(c1.shape)
    ratios = blocks / scales[..., None]
    codebook = article_codebook(levels)
    thresholds = (codebook + torch.cat((codebook[1:], torch.tensor([SENTINEL])))) / 2
    codes = torch.bucketize(ratios, thresholds, out_int32=True)
    # Out of the integer range this cast depends on the machine, but such blocks decode to 0 in any case.
    without_code = torch.round(ratios).to(torch.uint8) - SHIFT
    codes = torch.where(codes < levels, codes.to(torch.uint8), without_code)
    return ArticleTensor(tuple(weight.shape), levels, c1.flatten(), c2, codes.flatten()[: len(flat)].clone())


def article_dequantize(tensor: ArticleTensor) -> torch.Tensor:
    """The weights that the article's loader returns: fp16(fp32(fp16(level) * scale)), in the tensor's shape.

    A code that is not an index serves as its own level.
    """
    values = torch.arange(256, dtype=torch.float16)
    values[: tensor.levels] = article_codebook(tensor.levels)
    padded = torch.nn.functional.pad(tensor.codes, (0, -tensor.weights % BLOCK))
    products = values[padded.int()].view(-1, BLOCK) * tensor.block_scales()[:, None]
    return products.half().flatten()[: tensor.weights].reshape(tensor.shape)


def article_disk_bytes(tensor: ArticleTensor) -> int:
    """Bytes that the tensor takes in the article's file: compressed codes, block scales and superblock maxima."""
    return len(_compressed_codes(tensor)) + tensor.c1.nbytes + tensor.c2.nbytes


def _compressed_codes(tensor: ArticleTensor) -> bytes:
    return bz2.compress((tensor.codes + SHIFT).numpy().tobytes())


def is_article_file(names: Iterable[str]) -> bool:
    """Whether these tensor names are from a file that the article's code wrote."""
    return any(_quantized_name(name) for name in names)


def write_article_file(
    path: str | Path, state_dict: Mapping[str, torch.Tensor], linear_levels: int, conv_levels: int
) -> None:
    """Write `state_dict` as the article's code does: 4-D tensors and 2-D ones without "emb" in the name are quantised.

    Raises:
        CannotQuantizeError: a weight cannot be quantised, or its codes cannot be written (the bug).
    """
    written: dict[str, torch.Tensor] = {}
    for name, weight in state_dict.items():
        if weight.dim() == 4 or (weight.dim() == 2 and "emb" not in name):
            levels = conv_levels if weight.dim() == 4 else linear_levels
            try:
                written |= _file_tensors(name, article_quantize(weight, levels))
            except CannotQuantizeError as error:
                raise CannotQuantizeError(f"tensor {name!r}: {error}") from error
        else:
            written[name] = weight.detach().clone().contiguous()
    save_file(written, path)


def _file_tensors(name: str, tensor: ArticleTensor) -> dict[str, torch.Tensor]:
    beyond_ascii = int((tensor.codes + SHIFT >= 128).sum())
    if beyond_ascii:
        raise CannotQuantizeError(
            f"the article's writer stops at bytes that are not ASCII, and {beyond_ascii:,} weights have such bytes"
        )
    compressed = np.frombuffer(_compressed_codes(tensor), dtype=np.uint8).copy()
    stored = {
        "orig_shape": torch.tensor(tensor.shape),
        "param": tensor.param,
        "c1": tensor.c1,
        "c2": tensor.c2,
        "M": torch.from_numpy(compressed),
    }
    return {name: torch.tensor([0])} | {f"{name}{INFIX}{part}": stored[part] for part in PARTS}


def iter_article_tensors(
    names: Iterable[str], get: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor | ArticleTensor]]:
    """Read an article file: the name of every tensor, with the tensor, if it is quantised as ArticleTensor.

    Args:
        names: names of all tensors in the file.
        get: reads the tensor of a name; called once for each, lazily.

    Raises:
        CorruptFileError: parts of a quantised tensor are missing, or as for `read_article_tensor`.
        UnsupportedFileError: as for `read_article_tensor`.
    """
    for name, quantised in _entries(names):
        yield name, read_article_tensor(get, name) if quantised else get(name)


def quantized_shapes(
    names: Iterable[str], get: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, tuple[tuple[int, ...], int] | None]]:
    """The shape and number of levels of every quantised tensor of an article file; None for a kept tensor.

    Reads only the small tensors that hold them.

    Raises:
        CorruptFileError, UnsupportedFileError: as for `read_article_tensor`.
    """
    for name, quantised in _entries(names):
        parts = (f"{name}{INFIX}{part}" for part in ("orig_shape", "param"))
        yield name, _shape_and_levels(name, *map(get, parts)) if quantised else None


def _check_kind(name: str, part: str, stored: torch.Tensor) -> None:
    if stored.dtype != PARTS[part] or stored.dim() != 1:
        raise CorruptFileError(f"tensor {name + INFIX + part!r} must be 1-D {PARTS[part]}, got {_describe(stored)}")


def _entries(names: Iterable[str]) -> list[tuple[str, bool]]:
    """The names of the file's tensors, without parts, and whether each is quantised."""
    present = dict.fromkeys(names)
    quantised = dict.fromkeys(filter(None, map(_quantized_name, present)))
    for name in quantised:
        missing = [key for key in (name, *_part_names(name)) if key not in present]
        if missing:
            raise CorruptFileError(f"tensor {name!r} is incomplete: the file lacks {', '.join(map(repr, missing))}")
    return [(name, name in quantised) for name in present if _quantized_name(name) is None]


def read_article_tensor(get: Callable[[str], torch.Tensor], name: str) -> ArticleTensor:
    """Read one quantised tensor of an article file.

    Lengths are checked before anything is allocated. The result's `corrupt_weights()` counts weights that the article's
    bug has corrupted.

    Args:
        get: reads a stored tensor by name.
        name: the tensor's name.

    Raises:
        CorruptFileError: the parts contradict each other or are damaged.
        UnsupportedFileError: the parts have parameters that the article's code does not write.
    """
    placeholder, orig_shape, param, c1, c2, compressed = map(get, (name, *_part_names(name)))
    if placeholder.numel() != 1:
        raise CorruptFileError(
            f"tensor {name!r} is stored twice: quantised, and as {_describe(placeholder)} instead of a placeholder"
        )
    for part, stored in (("c1", c1), ("c2", c2), ("M", compressed)):
        _check_kind(name, part, stored)
    shape, levels = _shape_and_levels(name, orig_shape, param)
    weights = prod(shape)
    superblocks = -(-weights // SUPERBLOCK_WEIGHTS)
    for part, stored, wanted in (("c1", c1, superblocks * SUPERBLOCK), ("c2", c2, superblocks)):
        if len(stored) != wanted:
            raise CorruptFileError(
                f"tensor {name!r} of shape {shape} needs {wanted:,} values in {part}, found {len(stored):,}"
            )
    if (c2 < 0).any():
        raise CorruptFileError(f"tensor {name!r} has a negative superblock maximum in c2")
    codes = _decompress(name, compressed, weights)
    return ArticleTensor(shape, levels, c1, c2, codes - SHIFT)


def _shape_and_levels(name: str, orig_shape: torch.Tensor, param: torch.Tensor) -> tuple[tuple[int, ...], int]:
    _check_kind(name, "orig_shape", orig_shape)
    _check_kind(name, "param", param)
    if not 1 <= len(orig_shape) <= MAX_DIMENSIONS:
        raise CorruptFileError(f"tensor {name!r} has {len(orig_shape)} dimensions, wanted 1 to {MAX_DIMENSIONS}")
    shape = tuple(orig_shape.tolist())
    if min(shape) < 1:
        raise CorruptFileError(f"tensor {name!r} has a size below 1 in its shape {shape}")
    if len(param) != 5:
        raise CorruptFileError(f"tensor {name!r} has {len(param)} parameters, wanted 5")
    weights, levels, *geometry = param.tolist()
    if geometry != [SHIFT, BLOCK, SUPERBLOCK_WEIGHTS]:
        raise UnsupportedFileError(
            f"tensor {name!r} has shift, block and superblock {geometry}, "
            f"the article's code writes {[SHIFT, BLOCK, SUPERBLOCK_WEIGHTS]}"
        )
    if not 2 <= levels <= MAX_LEVELS:
        raise CorruptFileError(f"tensor {name!r} has {levels} levels, wanted 2 to {MAX_LEVELS}")
    if weights != prod(shape):
        raise CorruptFileError(
            f"tensor {name!r} of shape {shape} needs {prod(shape):,} weights, its length is {weights:,}"
        )
    return shape, levels


def _decompress(name: str, compressed: torch.Tensor, weights: int) -> torch.Tensor:
    decompressor = bz2.BZ2Decompressor()
    try:
        # One byte more than needed detects excess data without decompressing all of it.
        data = decompressor.decompress(compressed.numpy().tobytes(), max_length=weights + 1)
    except OSError as error:
        raise CorruptFileError(f"tensor {name!r} has damaged codes: {error}") from error
    if len(data) != weights:
        count = f"more than {weights:,}" if len(data) > weights else f"{len(data):,}"
        raise CorruptFileError(f"tensor {name!r} needs {weights:,} codes, found {count}")
    if not decompressor.eof or decompressor.unused_data:
        state = "followed by other data" if decompressor.eof else "cut short"
        raise CorruptFileError(f"tensor {name!r} has codes whose bz2 stream is {state}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _part_names(name: str) -> list[str]:
    return [f"{name}{INFIX}{part}" for part in PARTS]


def _quantized_name(name: str) -> str | None:
    """Name of the tensor to which the part of this name belongs; None if it is not a part."""
    base, infix, part = name.rpartition(INFIX)
    return base if infix and part in PARTS else None


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
