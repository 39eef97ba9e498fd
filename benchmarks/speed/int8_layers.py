"""Linear layers that multiply in int8: packed ones, an experiment, and torch's dynamic quantisation.

Each row of a weight and each token of an input is rounded to 255 steps with a symmetric, dynamic scale; sums are exact
in int32. This is LLM.int8()'s vector-wise quantisation (arXiv 2208.07339, section 3.1) without its outliers.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from nfq_core.layers import PackedLinear, packed_layers
from nfq_core.packed.op import dequantize_for_one_use

STEPS = 127  # The largest magnitude of a row or token becomes this
MIN_MAGNITUDE = 1e-30  # A row or token with nothing larger counts as zero: the inverse of its scale might not be finite
# The fewest tokens, and the divisor of a weight's sides, that torch multiplies in int8 on CUDA devices.
MIN_TOKENS, MULTIPLE = 17, 8
# A CPU multiplies about this many numbers at once: fresh memory for larger temporaries costs more than products.
CHUNK_NUMBERS, MIN_CHUNK_TOKENS = 1 << 20, 128


def round_rows(matrix: torch.Tensor, *, overwrite: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row of a matrix to int8; ``rows * scales[:, None]`` is the matrix, within half a scale.

    Returns int8 of the same shape, and float32 of shape (rows,); `overwrite` reuses the memory of a float32 matrix.
    """
    largest = torch.maximum(matrix.amax(dim=1), -matrix.amin(dim=1)).float()
    factors = torch.where(largest > MIN_MAGNITUDE, STEPS / largest, 0.0).unsqueeze(1)
    scaled = matrix.mul_(factors) if overwrite else matrix * factors
    return scaled.round_().to(torch.int8), largest / STEPS


def int8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` with both factors rounded to int8, in the dtype of `x`; see `fits`.

    The weight must be float32; it is overwritten.
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
    """Whether torch multiplies an input in int8 with a weight of this many rows."""
    return x.numel() >= MIN_TOKENS * x.shape[-1] and x.shape[-1] % MULTIPLE == 0 and rows % MULTIPLE == 0


class Int8Linear(PackedLinear):
    """A packed Linear layer that multiplies in int8 where `fits` holds, and in floating point elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, in the dtype of `x`."""
        if not fits(x, self.out_features):
            return super().forward(x)
        weight = dequantize_for_one_use(self.buffer, self.format_id, self.weight_shape, torch.float32)
        return int8_linear(x, weight, self.bias)


def int8_layers(model: nn.Module) -> None:
    """Make a model's packed Linear layers multiply in int8; none of them may have a low-rank addition."""
    for layer in packed_layers(model).values():
        if type(layer) is PackedLinear:
            layer.__class__ = Int8Linear


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy of an fp32 model on the CPU whose Linear layers torch has quantised to dynamic int8, as in the article."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        # Deprecated in favour of another package, but the one that the article used.
        warnings.simplefilter("ignore")
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
