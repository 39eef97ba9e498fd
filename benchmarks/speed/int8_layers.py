"""Packed Linear layers that multiply in int8: an experiment.

Each row of a weight and each token of an input is rounded to 255 steps. The scales are symmetric and dynamic: the
largest magnitude of a row or token becomes 127. Sums are exact in int32, so that the rounding to int8 is nearly all
that is lost. Vector-wise quantisation as in LLM.int8() (arXiv 2208.07339, section 3.1), without the part of it that
treats outliers apart.
"""

from __future__ import annotations

import torch
from torch import nn

from nfq_core.layers import PackedLinear, packed_layers
from nfq_core.packed.op import dequantize_for_one_use

STEPS = 127
"""What the largest magnitude of a row or token becomes."""

MIN_MAGNITUDE = 1e-30
"""A row or token with nothing above it is taken for zero: the inverse of its scale might not be finite."""

MIN_TOKENS = 17
MULTIPLE = 8
"""The least tokens, and the divisor of a weight's sides, that torch multiplies on CUDA devices."""

CHUNK_NUMBERS = 1 << 20
MIN_CHUNK_TOKENS = 128
"""A CPU multiplies so few tokens at once that temporaries hold hardly more numbers: fresh memory costs more time than
the products do."""


def round_rows(matrix: torch.Tensor, *, overwrite: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row of a matrix to int8; ``rows * scales[:, None]`` are its values again, within half a scale.

    Args:
        matrix: floating, shape (rows, columns).
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
        x: floating, shape (…, columns); `fits` holds.
        weight: float32 of shape (rows, columns); its memory is overwritten.
        bias: floating, shape (rows,).

    Returns:
        Of the dtype of `x`, shape (…, rows).
    """
    rows, row_scales = round_rows(weight, overwrite=True)

    def product(part: torch.Tensor) -> torch.Tensor:
        tokens, token_scales = round_rows(part)
        sums = torch._int_mm(tokens, rows.t())
        products = (sums * token_scales.unsqueeze(1)).mul_(row_scales)
        return (products if bias is None else products.add_(bias)).to(x.dtype)

    every = x.reshape(-1, x.shape[-1])
    chunk = max(MIN_CHUNK_TOKENS, CHUNK_NUMBERS // max(weight.shape)) if x.device.type == "cpu" else len(every)
    return torch.cat([product(part) for part in every.split(chunk)]).view(*x.shape[:-1], len(rows))


def fits(x: torch.Tensor, rows: int) -> bool:
    """Whether torch multiplies an input in int8 with a weight of so many rows."""
    return x.numel() >= MIN_TOKENS * x.shape[-1] and x.shape[-1] % MULTIPLE == 0 and rows % MULTIPLE == 0


class Int8Linear(PackedLinear):
    """A packed Linear layer that multiplies in int8 where `fits` holds, and as before elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in the dtype of `x`."""
        if not fits(x, self.out_features):
            return super().forward(x)
        weight = dequantize_for_one_use(self.buffer, self.format_id, self.weight_shape, torch.float32)
        return int8_linear(x, weight, self.bias)


def int8_layers(model: nn.Module) -> None:
    """Have a model's packed Linear layers, none of which has a low-rank change, multiply in int8 from now on."""
    for layer in packed_layers(model).values():
        if type(layer) is PackedLinear:
            layer.__class__ = Int8Linear
