"""`TrellisCoder` as loops that numba compiles for this processor; needs the extra `fast`.

A batch of LANES blocks advances together: the innermost loop runs over blocks, which fills the processor's vector
registers, and the errors of a step stay in the nearest cache. Errors are those of `TrellisCoder` but for fp32 rounding,
so a few choices between almost equal paths differ. A format's loops are compiled at its first use, in about two
seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from ..errors import pip_command
from ..packed.layout import BLOCK, BlockFormat
from .trellis import TrellisCoder

LANES = 128
"""Blocks that advance together: several vector registers, so that the innermost loop outweighs what surrounds it."""

UNROLLED_CODES = 8
"""Codes per innermost loop, unrolled by the compiler; a constant, so that the loop over lanes is the one vectorised."""

FASTMATH = {"contract", "nnan", "nsz"}
"""Allows fused multiply-add, and minima without a check for NaN."""

_compiling = threading.Lock()


class CompiledCoder(TrellisCoder):
    """Chooses the codes of blocks on a CPU; see `TrellisCoder`."""

    def __init__(self, levels: torch.Tensor, fmt: BlockFormat) -> None:
        super().__init__(levels, fmt, torch.device("cpu"))
        with _compiling:
            self._state_errors_into, self._search_into = _kernels(fmt.code_bits, fmt.window)

    def state_errors(self, values: torch.Tensor) -> torch.Tensor:
        """`TrellisCoder.state_errors`."""
        errors = torch.empty(len(values), self._format.states, dtype=torch.float32, device="cpu")
        self._state_errors_into(*_arrays(values, self._levels.view(-1), errors))
        return errors

    def _search(
        self, values: torch.Tensor, first: torch.Tensor, ends: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.empty(values.shape, dtype=torch.uint8, device="cpu")
        errors = torch.empty(len(values), dtype=torch.float32, device="cpu")
        starts = torch.empty(len(values), dtype=torch.int32, device="cpu")
        ends = torch.full_like(starts, -1) if ends is None else ends
        self._search_into(*_arrays(values, self._levels.view(-1), first, ends, starts, codes, errors))
        return codes, errors, starts, ends


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    """The memory of contiguous tensors, or of copies of others."""
    return [tensor.contiguous().numpy() for tensor in tensors]


@lru_cache
def obstacle() -> str:
    """Why the compiled search cannot be used on this machine; empty if it can."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return f"numba is not installed ({pip_command('numba')})"
    except Exception as error:
        # numba refuses versions of numpy that it does not know, and its compiler may be missing or broken.
        return f"numba cannot be used: {' '.join(str(error).split())}"
    return ""


@lru_cache
def _kernels(code_bits: int, window: int) -> tuple[Callable, Callable]:
    """The compiled `state_errors` and `_search` of the formats with these properties."""
    from numba import njit

    # Not in numba's cache on disk: its entries import this module by name, which is another in each host.
    compiled = njit(nogil=True, fastmath=FASTMATH)
    codes = 1 << code_bits
    states = 1 << window - code_bits
    unrolled = min(codes, UNROLLED_CODES)

    def stepper(notes: bool) -> Callable:
        """One weight: `after[state, lane]` becomes the smallest error that leads to the state, from `before`.

        With `notes`, `leaving[state, lane]` becomes the code that leaves the window on the best path to the state. It
        is a constant for the compiler, which leaves the notes out otherwise.
        """

        @compiled
        def advance(values, levels, before, after, leaving):
            for state in range(states):
                for lane in range(LANES):
                    after[state, lane] = np.inf
                for first in range(0, codes, unrolled):
                    for lane in range(LANES):
                        least = after[state, lane]
                        best = np.int32(leaving[state, lane]) if notes else np.int32(0)
                        for code in range(unrolled):
                            number = (first + code) * states + state
                            difference = values[lane] - levels[number]
                            error = before[number >> code_bits, lane] + difference * difference
                            if error < least:
                                least = error
                                best = np.int32(first + code)
                        after[state, lane] = least
                        if notes:
                            leaving[state, lane] = np.uint8(best)

        return advance

    advance, advance_and_note = stepper(False), stepper(True)

    @compiled
    def backtrack(leaving, final, path, lane):
        """The state before the first weight on the best path to state `final`; `path` becomes its codes."""
        state = final
        for step in range(BLOCK - 1, -1, -1):
            number = np.int64(leaving[step, state, lane]) * states + state
            path[step] = number & codes - 1
            state = number >> code_bits
        return state

    @compiled
    def transpose(blocks, first, steps):
        """Fill `steps`, of shape (64, LANES), with the next blocks; the last one fills what is left."""
        for lane in range(LANES):
            block = min(first + lane, len(blocks) - 1)
            for step in range(BLOCK):
                steps[step, lane] = blocks[block, step]

    @compiled
    def state_errors(blocks, levels, errors):
        steps, unused = np.empty((BLOCK, LANES), np.float32), np.empty((states, LANES), np.uint8)
        one, other = np.empty((states, LANES), np.float32), np.empty((states, LANES), np.float32)
        for first in range(0, len(blocks), LANES):
            transpose(blocks, first, steps)
            one[:] = 0
            for step in range(0, BLOCK, 2):
                advance(steps[step], levels, one, other, unused)
                advance(steps[step + 1], levels, other, one, unused)
            for lane in range(min(LANES, len(blocks) - first)):
                errors[first + lane] = one[:, lane]

    @compiled
    def search(blocks, levels, before, ends, starts, chosen, errors):
        """`ends` that are negative are chosen."""
        steps = np.empty((BLOCK, LANES), np.float32)
        one, other = np.empty((states, LANES), np.float32), np.empty((states, LANES), np.float32)
        leaving = np.zeros((BLOCK, states, LANES), np.uint8)
        path = np.empty(BLOCK, np.uint8)
        for first in range(0, len(blocks), LANES):
            count = min(LANES, len(blocks) - first)
            transpose(blocks, first, steps)
            for lane in range(LANES):
                one[:, lane] = before[first + min(lane, count - 1)]
            for step in range(0, BLOCK, 2):
                advance_and_note(steps[step], levels, one, other, leaving[step])
                advance_and_note(steps[step + 1], levels, other, one, leaving[step + 1])
            for lane in range(count):
                block = first + lane
                if ends[block] < 0:
                    ends[block] = backtrack(leaving, one[:, lane].argmin(), path, lane)
                end = ends[block]
                start = backtrack(leaving, end, path, lane)
                starts[block] = start
                chosen[block] = path
                errors[block] = one[end, lane] - before[block, start]

    return state_errors, search
