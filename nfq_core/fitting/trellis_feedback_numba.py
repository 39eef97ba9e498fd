"""`FeedbackCoder` as loops that numba compiles for this processor; needs the extra `fast`.

As in `trellis_numba`, LANES blocks advance together. Every survivor keeps the targets of the weights to come, already
changed by its errors, instead of the errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from ..packed.layout import BLOCK, BlockFormat
from .trellis_numba import FASTMATH, UNROLLED_CODES

LANES = 16
"""Blocks that advance together: one or two vector registers. Their targets take 128 to 512 kB."""


def encode(
    levels: torch.Tensor,
    fmt: BlockFormat,
    lead: int,
    values: torch.Tensor,
    importance: torch.Tensor,
    gains: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FeedbackCoder.encode` on a CPU; a few choices between almost equal paths differ.

    Args:
        levels: by level number, fp32 of shape (fmt.levels,).
        fmt: a trellis format.
        lead: weights before and after a block's start that determine the state there.
        values: see `FeedbackCoder.encode`, also for `importance` and `gains`.
    """
    codes = torch.empty(values.shape, dtype=torch.uint8, device="cpu")
    errors = torch.empty(values.shape, dtype=torch.float32, device="cpu")
    kernel = _kernel(fmt.code_bits, fmt.window)
    arrays = [tensor.contiguous().numpy() for tensor in (values, levels, importance, gains, codes, errors)]
    kernel(lead, *arrays)
    return codes, errors


@lru_cache
def _kernel(code_bits: int, window: int) -> Callable:
    """The compiled `encode` of the formats with these properties."""
    from numba import njit

    compiled = njit(nogil=True, fastmath=FASTMATH)
    codes, states = 1 << code_bits, 1 << window - code_bits
    unrolled = min(codes, UNROLLED_CODES)

    @compiled
    def advance(targets, importance, levels, before, after, leaving):
        """One weight: `after[state, lane]` is the smallest cost that leads to the state, `leaving` the code by which.

        `targets[state, lane]` is the weight as the survivor in that state wants it.
        """
        for state in range(states):
            for lane in range(LANES):
                after[state, lane] = np.inf
                leaving[state, lane] = 0
            for first in range(0, codes, unrolled):
                for lane in range(LANES):
                    least, best = after[state, lane], leaving[state, lane]
                    for code in range(unrolled):
                        number = (first + code) * states + state
                        difference = targets[number >> code_bits, lane] - levels[number]
                        cost = before[number >> code_bits, lane] + importance * difference * difference
                        if cost < least:
                            least = cost
                            best = np.int32(first + code)
                    after[state, lane], leaving[state, lane] = least, best

    @compiled
    def starts_of(steps, lead, importance, levels, targets, one, other, leaving, starts):
        """The state at the start of each block, by a search around it without feedback."""
        one[:] = 0
        for i in range(2 * lead):
            step = (i - lead) % BLOCK
            for state in range(states):
                targets[state] = steps[step]
            advance(targets, importance[step], levels, one, other, leaving[i % lead])
            one, other = other, one
        for lane in range(LANES):
            state = one[:, lane].argmin()
            for i in range(lead - 1, -1, -1):
                state = (np.int64(leaving[i, state, lane]) * states + state) >> code_bits
            starts[lane] = state

    @compiled
    def move(wanted, moved, targets, leaving, levels, gains):
        """Targets of the weights to come, of the survivor in each state: those of its origin, changed by its error."""
        for lane in range(LANES):
            for state in range(states):
                number = leaving[state, lane] * states + state
                origin = number >> code_bits
                error = targets[origin, lane] - levels[number]
                source, target = wanted[lane, origin], moved[lane, state]
                for later in range(BLOCK):
                    target[later] = source[later] - gains[later] * error

    @compiled
    def encode(lead, blocks, levels, importance, gains, chosen, errors):
        steps, targets = np.empty((BLOCK, LANES), np.float32), np.empty((states, LANES), np.float32)
        wanted, moved = np.empty((LANES, states, BLOCK), np.float32), np.empty((LANES, states, BLOCK), np.float32)
        one, other = np.empty((states, LANES), np.float32), np.empty((states, LANES), np.float32)
        leaving, starts = np.empty((BLOCK, states, LANES), np.int32), np.empty(LANES, np.int64)
        path = np.empty(BLOCK, np.float32)
        for first in range(0, len(blocks), LANES):
            count = min(LANES, len(blocks) - first)
            for lane in range(LANES):
                # The last block fills what is left.
                block = blocks[first + min(lane, count - 1)]
                steps[:, lane] = block
                for state in range(states):
                    wanted[lane, state] = block
            starts_of(steps, lead, importance, levels, targets, one, other, leaving, starts)
            one[:] = np.inf
            for lane in range(LANES):
                one[starts[lane], lane] = 0
            for step in range(BLOCK):
                for lane in range(LANES):
                    for state in range(states):
                        targets[state, lane] = wanted[lane, state, step]
                advance(targets, importance[step], levels, one, other, leaving[step])
                one, other = other, one
                move(wanted, moved, targets, leaving[step], levels, gains[step])
                wanted, moved = moved, wanted
            for lane in range(count):
                index, state = first + lane, starts[lane]
                for step in range(BLOCK - 1, -1, -1):
                    number = np.int64(leaving[step, state, lane]) * states + state
                    chosen[index, step] = number & codes - 1
                    path[step] = levels[number]
                    state = number >> code_bits
                errors[index] = blocks[index]
                for step in range(BLOCK):
                    errors[index, step] -= path[step]
                    for later in range(step + 1, BLOCK):
                        errors[index, later] -= gains[step, later] * errors[index, step]

    return encode
