"""Products in int8: every row of a weight and every token of an input is rounded to 255 steps, by a scale of its own.

The scales are symmetric and dynamic: the largest magnitude of a row or token becomes 127. Sums are exact in int32, so
that the rounding to int8 is nearly all that is lost. Vector-wise quantisation as in LLM.int8() (arXiv 2208.07339,
section 3.1), without the part of it that treats outliers apart.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger("nfq")

STEPS = 127
"""What the largest magnitude of a row or token becomes."""

MIN_MAGNITUDE = 1e-30
"""A row or token with nothing above it is taken for zero: the inverse of its scale might not be finite."""

MIN_TOKENS = 17
MULTIPLE = 8
"""The least tokens, and the divisor of a weight's sides, that torch multiplies on CUDA devices."""

DEVICES = ("cpu", "cuda")
"""Types of device that have the product; ROCm's are called cuda too."""

MAX_COLUMNS = (2**31 - 1) // STEPS**2
"""Terms of a sum that int32 holds whatever they are."""

CHUNK_NUMBERS = 1 << 20
MIN_CHUNK_TOKENS = 128
"""A CPU multiplies so few tokens at once that temporaries hold hardly more numbers: fresh memory costs more time than
the products do."""


def round_rows(matrix: torch.Tensor, *, overwrite: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row of a matrix to int8; ``rows * scales[:, None]`` are its values again, within half a scale.

    Args:
        matrix: floating, shape (rows, columns). A row that is not finite throughout gets a scale that is not finite.
        overwrite: whether its memory may be used; it is float32 then.

    Returns:
        int8 of the same shape, and float32 of shape (rows,).
    """
    largest = torch.maximum(matrix.amax(dim=1), -matrix.amin(dim=1)).float()
    factors = torch.where(largest > MIN_MAGNITUDE, STEPS / largest, 0.0).unsqueeze(1)
    scaled = matrix.mul_(factors) if overwrite else matrix * factors
    return scaled.round_().to(torch.int8), largest / STEPS


def int8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` with both factors rounded to int8.

    Args:
        x: floating, shape (…, columns); `unfit` has nothing to say about it.
        weight: float32 of shape (rows, columns); its memory is overwritten.
        bias: floating, shape (rows,).

    Returns:
        Of the dtype of `x`, shape (…, rows). Where a token of `x` is not finite, neither is what comes of it.
    """
    rows, row_scales = round_rows(weight, overwrite=True)

    def product(part: torch.Tensor) -> torch.Tensor:
        tokens, token_scales = round_rows(part)
        sums = torch._int_mm(tokens, rows.t())
        products = (sums * token_scales.unsqueeze(1)).mul_(row_scales)
        return (products if bias is None else products.add_(bias)).to(x.dtype)

    every = x.reshape(-1, x.shape[-1])
    chunk = max(MIN_CHUNK_TOKENS, CHUNK_NUMBERS // max(weight.shape))
    if torch.compiler.is_compiling() or x.device.type != "cpu" or len(every) <= chunk:
        result = product(every)
    else:
        result = x.new_empty(len(every), len(rows))
        for part, out in zip(every.split(chunk), result.split(chunk), strict=True):
            out.copy_(product(part))
    return result.view(*x.shape[:-1], len(rows))


def unfit(x: torch.Tensor, rows: int) -> str:
    """Why an input is not multiplied in int8 with a weight of so many rows; empty where it is."""
    columns = x.shape[-1]
    if x.numel() < MIN_TOKENS * columns:
        return f"{MIN_TOKENS} tokens are needed"
    if columns % MULTIPLE or rows % MULTIPLE or columns > MAX_COLUMNS:
        return f"the sides of {rows} × {columns} must be multiples of {MULTIPLE}, columns at most {MAX_COLUMNS:,}"
    if x.requires_grad and torch.is_grad_enabled():
        return "rounding has no gradient"
    # Trying a device is no part of a graph: `layers.int8_layers` has done it.
    return _other_kind(x.device) if torch.compiler.is_compiling() else obstacle(x.device)


@lru_cache(32)
def obstacle(device: torch.device) -> str:
    """Why a device does not multiply in int8; empty where it does. What keeps a device from it is logged once."""
    reason = _other_kind(device) or _fails(device)
    if reason and device.type != "meta":
        log.warning("nothing is multiplied in int8 on %s: %s", device, reason)
    return reason


def _other_kind(device: torch.device) -> str:
    return "" if device.type in DEVICES else f"torch does it on {' and '.join(DEVICES)} devices alone"


def _fails(device: torch.device) -> str:
    """Try a small product: a GPU may be too old, torch too. What went wrong; empty where nothing did."""
    # The answer is kept, so it must not be that of fake tensors.
    with _disable_current_modes():
        numbers = torch.arange(-STEPS, STEPS + 1, dtype=torch.int32, device="cpu")
        left, right = (numbers.repeat(5)[: count * 32].view(count, 32) for count in (MIN_TOKENS, 24))
        try:
            product = torch._int_mm(left.to(device, torch.int8), right.to(device, torch.int8).t())
        except Exception as error:
            return f"torch fails here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        return "" if torch.equal(product.cpu(), left @ right.t()) else "torch computes other products here"
