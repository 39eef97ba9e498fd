"""Whether a tensor gets levels of its own, or the common levels of its format."""

from __future__ import annotations

from math import log10

from ..packed.layout import BlockFormat

DB_PER_BIT = 20 * log10(2)
"""What one bit per weight is worth."""

SMALL_TENSOR_MARGIN_DB = 3.0
"""Gain, beyond its cost, for which a small tensor gets levels of its own although its size was planned without them.

Ordinary weights gain at most 1 dB; sparse or ternary ones 5 to 20 dB.
"""


def own_levels_pay(own_error: float, common_error: float, fmt: BlockFormat, weights: int) -> bool:
    """Whether levels of its own gain a tensor more than the bits that their table takes.

    Args:
        own_error: squared error of a sample with levels fitted to it.
        common_error: the same with the common levels.
        fmt: a format with common levels.
        weights: number of weights of the tensor.
    """
    if own_error <= 0:
        return common_error > 0
    gain = 10 * log10(max(common_error, 1e-300) / own_error)
    cost = DB_PER_BIT * 16 * fmt.levels / weights
    return gain > cost + (0 if fmt.expects_own_levels(weights) else SMALL_TENSOR_MARGIN_DB)
