"""Codes for a trellis format, given levels: the Viterbi algorithm over many blocks at once.

What a block's stream says before a weight matters to it through ``window - code_bits`` bits, the *state*. Going through
a block, the least squared error of any codes so far is kept for every state; a weight adds its own error for each of
the window's numbers, and of the states that lead to the same new one the best survives. Bitshift trellises are QTIP's
(arXiv 2406.11235).
"""

from __future__ import annotations

import math

import torch

from ..packed.formats import BLOCK, BlockFormat
from .search import store_index_in_low_bits

LEAD_BITS = 96
"""So much of the stream before and after a block's start decides its state there; twice that gains 0.02 dB at most."""

CACHED_BYTES = 512 * 1024
"""A CPU's chunk of blocks is such that the errors of one step take this: half a core's usual cache of its own."""

KEPT_BYTES = 16 << 20
"""What a CPU's errors of all steps may take: many chunks, for going back costs the same for one and for several."""

DEVICE_BYTES = 256 << 20
"""What all errors of a batch of blocks may take on other devices."""


def lead_steps(fmt: BlockFormat) -> int:
    """Over how many weights before a block's start, and after it, the state there is looked for."""
    return min(BLOCK, -(-LEAD_BITS // fmt.code_bits))


class TrellisCoder:
    """Chooses the codes of blocks, on one device.

    Args:
        levels: in the order of their numbers, fp32 of shape (fmt.levels,).
        fmt: a trellis format.
        device: where the blocks are.
    """

    def __init__(self, levels: torch.Tensor, fmt: BlockFormat, device: torch.device) -> None:
        self._format = fmt
        self._levels = levels.to(device).view(-1, 1)
        self._lead = lead_steps(fmt)
        self._states = fmt.states
        # A number is, from the top, `code_bits` bits that leave the window next, then the state after it.
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
        """The codes of least squared error, nearly.

        Args:
            values: weights divided by their blocks' scales, fp32 of shape (blocks, 64).

        Returns:
            The codes, uint8 of shape (blocks, 64), and each block's squared error, fp32 of shape (blocks,).
        """
        parts = [self._encode(part) for part in values.split(self.batch)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([errors for _, errors in parts])

    def _encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` for one batch: a search around the start finds the state there, then one goes from it back to it."""
        steps = values.t().contiguous()
        around = torch.cat([steps[-self._lead :], steps[: self._lead]])
        errors = self._forward(around, torch.zeros_like(steps[:1]).expand(self._states, -1))
        last = errors[-1].argmin(dim=0).int()
        start = self._back(around, errors, last, self._lead)
        only_start = torch.full_like(errors[0], math.inf).scatter_(0, start.long().unsqueeze(0), 0.0)
        errors = self._forward(steps, only_start)
        codes = torch.empty(steps.shape, dtype=torch.uint8, device=steps.device)
        self._back(steps, errors, start, 0, codes)
        return codes.t().contiguous(), errors[-1].gather(0, start.long().unsqueeze(0)).squeeze(0)

    def _forward(self, steps: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The least error that leads to each state before and after each step, fp32 (steps + 1, states, blocks).

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

    def _back(
        self,
        steps: torch.Tensor,
        errors: torch.Tensor,
        state: torch.Tensor,
        stop: int,
        codes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The state before step `stop` of the best way to a last state, int32; its codes are written to `codes`.

        The survivors are found again from the errors, along one way per block: cheaper than remembering all of them.
        """
        fmt = self._format
        for step in reversed(range(stop, len(steps))):
            own = steps[step] - self._by_next.index_select(1, state)
            own = torch.addcmul(self._before(errors[step], state), own, own, out=own)
            best = store_index_in_low_bits(own, self._leaving, fmt.codes - 1).amin(dim=0).bitwise_and_(fmt.codes - 1)
            number = torch.add(state, best, alpha=self._states)
            if codes is not None:
                codes[step] = number & (fmt.codes - 1)
            state = number >> fmt.code_bits
        return state

    def _before(self, errors: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Of errors by state, those of the states that lead to `state`, one for each leaving code."""
        codes = self._format.codes
        if self._shared_bits <= 0:
            return errors.repeat_interleave(1 << -self._shared_bits, dim=0) if self._shared_bits else errors
        shared = (state >> self._format.code_bits).long().expand(codes, 1, -1)
        return errors.view(codes, 1 << self._shared_bits, -1).gather(1, shared).squeeze(1)
