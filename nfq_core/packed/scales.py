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
