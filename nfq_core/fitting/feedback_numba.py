"""Rounding with error feedback as a loop that numba compiles for this processor; needs the extra `fast`.

As in `trellis_numba`, the innermost loops run over LANES rows, whose columns stay in the nearest cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from .search import ASSIGN_BINS, ASSIGN_RANGE, NearestLevel

LANES = 64
"""Rows that are rounded together."""

_compiling = threading.Lock()


def round_batch(
    targets: torch.Tensor, sizes: torch.Tensor, nearest: NearestLevel, gains: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`feedback.round_batch` on a CPU; results differ where fp32 rounding decides."""
    codes = torch.empty(targets.shape, dtype=torch.uint8, device="cpu")
    rounded = torch.empty_like(targets)
    tensors = (targets, sizes, nearest.codes, nearest.levels, gains.contiguous(), codes, rounded)
    with _compiling:
        kernel = _kernel()
    kernel(*(tensor.numpy() for tensor in tensors))
    return codes, rounded


@lru_cache
def _kernel() -> Callable:
    from numba import njit

    per_scale, middle, last = np.float32(ASSIGN_BINS / (2 * ASSIGN_RANGE)), np.float32(ASSIGN_BINS / 2), ASSIGN_BINS - 1

    @njit(
        "(float32[:,::1], float32[:,::1], uint8[::1], float32[::1], float32[:,::1], uint8[:,::1], float32[:,::1])",
        nogil=True,
        fastmath={"contract", "nsz"},
    )
    def kernel(targets, sizes, code_of_cell, level_of_cell, gains, codes, rounded):
        columns, rows = targets.shape
        values, errors = np.empty((columns, LANES), np.float32), np.empty(LANES, np.float32)
        for first in range(0, rows, LANES):
            count = min(LANES, rows - first)
            for i in range(columns):
                for lane in range(count):
                    values[i, lane] = targets[i, first + lane]
            for i in range(columns):
                for lane in range(count):
                    value, size = values[i, lane], sizes[i, first + lane]
                    cell = value * (per_scale / size) + middle if size != 0 else middle
                    cell = min(max(cell, np.float32(0)), np.float32(last))
                    index = np.int32(cell)
                    level = level_of_cell[index] * size
                    codes[i, first + lane] = code_of_cell[index]
                    rounded[i, first + lane] = level
                    errors[lane] = value - level
                for j in range(i + 1, columns):
                    gain = gains[i, j]
                    for lane in range(LANES):
                        values[j, lane] += gain * errors[lane]

    return kernel
