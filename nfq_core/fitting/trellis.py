"""Codes for a trellis format, given levels: the Viterbi algorithm over many blocks at once.

The *state* before a weight is the last ``window - code_bits`` bits of the block's stream. For every state, the search
keeps the smallest squared error of any codes so far. Each weight adds its error for every level number, and among the
states that lead to the same next state the best one survives. Bitshift trellises are from QTIP (arXiv 2406.11235).
"""

from __future__ import annotations

import math

import torch

from ..packed.layout import BLOCK, BlockFormat
from .search import store_index_in_low_bits

LEAD_BITS = 96
"""Bits of the stream before and after a block's start that determine the state there; twice as many gain ≤ 0.02 dB."""

CACHED_BYTES = 512 * 1024
"""On a CPU, bytes of the errors of one step for a chunk of blocks: half the usual cache per core."""

KEPT_BYTES = 16 << 20
"""On a CPU, bytes of the errors of all steps for a batch: many chunks, because backtracking costs the same for all."""

DEVICE_BYTES = 256 << 20
"""On other devices, bytes of all errors of a batch of blocks."""


def lead_steps(fmt: BlockFormat) -> int:
    """Number of weights before and after a block's start that are searched for the state there."""
    return min(BLOCK, -(-LEAD_BITS // fmt.code_bits))


class TrellisCoder:
    """Chooses the codes of blocks, on one device.

    Args:
        levels: by level number, fp32 of shape (fmt.levels,).
        fmt: a trellis format.
        device: device of the blocks.
    """

    def __init__(self, levels: torch.Tensor, fmt: BlockFormat, device: torch.device) -> None:
        self._format = fmt
        self._levels = levels.to(device).view(-1, 1)
        self._lead = lead_steps(fmt)
        self._states = fmt.states
        # The highest `code_bits` bits of a level number leave the window next; the others are the next state.
        self._by_next = self._levels.view(fmt.codes, self._states)
        self._leaving = torch.arange(fmt.codes, dtype=torch.int32, device=device).view(-1, 1)
        self._shared_bits = fmt.window - 2 * fmt.code_bits
        kept = 4 * (max(2 * self._lead, BLOCK) + 1) * self._states
        if device.type == "cpu":
            self.chunk = CACHED_BYTES // (4 * fmt.levels)
            self.batch = -(-KEPT_BYTES // kept // self.chunk) * self.chunk
        else:
            self.chunk = self.batch = DEVICE_BYTES // (4 * fmt.levels + kept)

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose codes with nearly the smallest squared error.

        Args:
            values: weights divided by their blocks' scales, fp32 of shape (blocks, 64).

        Returns:
            The codes, uint8 of shape (blocks, 64), and each block's squared error, fp32 of shape (blocks,).
        """
        parts = [self._encode(part) for part in values.split(self.batch)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([errors for _, errors in parts])

    def _encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` for one batch: find the state at the start by a search around it, then search from it back to it."""
        steps = values.t().contiguous()
        around = torch.cat([steps[-self._lead :], steps[: self._lead]])
        errors = self._forward(around, torch.zeros_like(steps[:1]).expand(self._states, -1))
        last = errors[-1].argmin(dim=0).int()
        start = self._backtrack(around, errors, last, self._lead)
        only_start = torch.full_like(errors[0], math.inf).scatter_(0, start.long().unsqueeze(0), 0.0)
        errors = self._forward(steps, only_start)
        codes = torch.empty(steps.shape, dtype=torch.uint8, device=steps.device)
        self._backtrack(steps, errors, start, 0, codes)
        return codes.t().contiguous(), errors[-1].gather(0, start.long().unsqueeze(0)).squeeze(0)

    def _forward(self, steps: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The smallest error that leads to each state, before and after each step: fp32 (steps + 1, states, blocks).

        Args:
            steps: the values, fp32 of shape (steps, blocks).
            first: errors before the first step, fp32 of shape (states, blocks).
        """
        fmt = self._format
        errors = torch.empty(len(steps) + 1, *first.shape, dtype=torch.float32, device=steps.device)
        errors[0] = first
        parts = zip(steps.split(self.chunk, dim=1), errors.split(self.chunk, dim=2), strict=True)
        for values_of, errors_of in parts:
            added = torch.empty(fmt.levels, values_of.shape[1], dtype=torch.float32, device=steps.device)
            by_last = added.view(self._states, fmt.codes, -1)
            by_next = added.view(fmt.codes, self._states, -1)
            for step, values in enumerate(values_of):
                torch.sub(values, self._levels, out=added)
                torch.addcmul(errors_of[step].unsqueeze(1), by_last, by_last, out=by_last)
                torch.amin(by_next, dim=0, out=errors_of[step + 1])
        return errors

    def _backtrack(
        self,
        steps: torch.Tensor,
        errors: torch.Tensor,
        state: torch.Tensor,
        stop: int,
        codes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The state before step `stop` on the best path to a final state, int32; writes the path's codes to `codes`.

        Recomputes the survivors along one path per block, which is cheaper than storing all of them.
        """
        fmt = self._format
        for step in reversed(range(stop, len(steps))):
            own = steps[step] - self._by_next.index_select(1, state)
            own = torch.addcmul(self._predecessor_errors(errors[step], state), own, own, out=own)
            best = store_index_in_low_bits(own, self._leaving, fmt.codes - 1).amin(dim=0).bitwise_and_(fmt.codes - 1)
            number = torch.add(state, best, alpha=self._states)
            if codes is not None:
                codes[step] = number & (fmt.codes - 1)
            state = number >> fmt.code_bits
        return state

    def _predecessor_errors(self, errors: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Errors of the states that lead to `state`, one for each code that leaves the window."""
        codes = self._format.codes
        if self._shared_bits <= 0:
            return errors.repeat_interleave(1 << -self._shared_bits, dim=0) if self._shared_bits else errors
        shared = (state >> self._format.code_bits).long().expand(codes, 1, -1)
        return errors.view(codes, 1 << self._shared_bits, -1).gather(1, shared).squeeze(1)
