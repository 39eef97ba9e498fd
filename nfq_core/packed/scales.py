"""Block scales: the table of 256 fp16 numbers that a scale code names, built without `exp`."""

from collections.abc import Callable, Hashable
from functools import wraps

import torch

SCALE_MAGNITUDES = 127
"""Number of non-zero magnitudes of a scale code."""

SCALE_STEPS_PER_OCTAVE = 16
SCALE_MANTISSAS = (0, 45, 93, 142, 194, 248, 304, 363, 424, 488, 555, 625, 698, 774, 854, 937)
"""The ten mantissa bits of fp16(2**(i / 16)), i = 0 … 15, from which all scales are built."""

SCALE_STRIDES = (1, 2, 3)
"""Steps of 1/16 octave between neighbouring scale codes: 16, 8 or 5⅓ codes per octave, 8, 16 or 24 octaves in all."""

FP16_MIN_EXPONENT, FP16_MAX_EXPONENT = -14, 15


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
    steps = torch.arange(SCALE_MAGNITUDES, dtype=torch.int32, device="cpu") * stride
    mantissas = scale_mantissas(steps.device)[steps % SCALE_STEPS_PER_OCTAVE]
    bits = (exponent + 15 + steps // SCALE_STEPS_PER_OCTAVE) * 1024 + mantissas
    zero = bits.new_zeros(1)
    both_signs = torch.cat([zero, bits, zero, bits - 0x8000])
    return both_signs.to(torch.int16).view(torch.float16)


SCALE_TABLE_MASK = (31, 3)
"""Masks that turn an exponent and a stride, read as unsigned bytes, into the indices of `all_scale_tables`."""


@cached_tensor
def all_scale_tables(device: torch.device) -> torch.Tensor:
    """Every `scale_table`, so that a device can select one without synchronising: fp16 of shape (32, 4, 256), 64 KiB.

    The first two indices are the exponent & 31 and the stride & 3. Entries that no valid parameters name are NaN.
    """
    rows, columns = (mask + 1 for mask in SCALE_TABLE_MASK)
    tables = torch.full((rows, columns, 256), torch.nan, dtype=torch.float16, device="cpu")
    for stride in SCALE_STRIDES:
        octaves = (SCALE_MAGNITUDES - 1) * stride // SCALE_STEPS_PER_OCTAVE
        for exponent in range(FP16_MIN_EXPONENT, FP16_MAX_EXPONENT - octaves + 1):
            tables[exponent % rows, stride] = scale_table(exponent, stride)
    return tables.to(device)


@cached_tensor
def scale_table_mask(device: torch.device) -> torch.Tensor:
    """SCALE_TABLE_MASK as int32 of shape (2,); cached, do not modify."""
    return torch.tensor(SCALE_TABLE_MASK, dtype=torch.int32, device="cpu").to(device)


@cached_tensor
def scale_mantissas(device: torch.device) -> torch.Tensor:
    """SCALE_MANTISSAS as int32 of shape (16,); cached, do not modify."""
    return torch.tensor(SCALE_MANTISSAS, dtype=torch.int32, device="cpu").to(device)
