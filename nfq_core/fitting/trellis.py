"""Codes for a trellis format, given levels: the wrap-around Viterbi algorithm over many blocks at once.

The *state* before a weight is the last ``window - code_bits`` bits of the block's stream. For every state, the search
keeps the smallest squared error of any codes so far. Each weight adds its error for every level number, and among the
states that lead to the same next state the best one survives. A block's stream is circular: the state after the last
weight must be the state before the first one. So the search passes over the block twice, the second time from the
errors at the end of the first, and the best path then starts where it ends in nearly all blocks. Bitshift trellises are
from QTIP (arXiv 2406.11235), the search from Shao, Lin and Fossorier (IEEE Transactions on Communications, 2003).
"""

from __future__ import annotations

import torch

from ..packed.layout import BLOCK, BlockFormat
from .search import store_index_in_low_bits

CACHED_BYTES = 1 << 20
"""On a CPU, bytes of the errors of one step for a chunk of blocks: the usual cache per core."""

KEPT_BYTES = 16 << 20
"""On a CPU, bytes of the errors of all steps for a batch: many chunks, because backtracking costs the same for all."""

DEVICE_BYTES = 256 << 20
"""On other devices, bytes of all errors of a batch of blocks."""

NEVER = 1e30
"""Error of a state that no path may start from; finite, so that differences stay numbers."""


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
        # The highest `code_bits` bits of a level number leave the window next; the others are the next state.
        self._by_next = self._levels.view(fmt.codes, fmt.states)
        self._leaving = torch.arange(fmt.codes, dtype=torch.int32, device=device).view(-1, 1)
        self._shared_bits = fmt.window - 2 * fmt.code_bits
        kept = 4 * (BLOCK + 1) * fmt.states
        if device.type == "cpu":
            self._chunk = CACHED_BYTES // (4 * fmt.levels)
            self._batch = -(-KEPT_BYTES // kept // self._chunk) * self._chunk
        else:
            self._chunk = self._batch = DEVICE_BYTES // (4 * fmt.levels + kept)

    def state_errors(self, values: torch.Tensor) -> torch.Tensor:
        """The smallest squared error of each block by the state after it, from any state before it.

        The smallest of a block estimates the error after `encode`: it is 4 to 10 % less, about alike for any scale.

        Args:
            values: weights divided by their blocks' scales, fp32 of shape (blocks, 64).

        Returns:
            fp32 of shape (blocks, states).
        """
        found = []
        for part in values.split(self._chunk):
            added = torch.empty(self._format.levels, len(part), dtype=torch.float32, device=part.device)
            errors = torch.zeros(self._format.states, len(part), dtype=torch.float32, device=part.device)
            for step in part.t().contiguous():
                self._advance(step, errors, errors, added)
            found.append(errors.t())
        return torch.cat(found)

    def encode(
        self, values: torch.Tensor, state_errors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose codes with nearly the smallest squared error.

        Args:
            values: weights divided by their blocks' scales, fp32 of shape (blocks, 64).
            state_errors: their `state_errors`, if known.

        Returns:
            The codes, uint8 of shape (blocks, 64), and each block's squared error, fp32 of shape (blocks,).
        """
        first = self.state_errors(values) if state_errors is None else state_errors
        codes, errors, starts, ends = self._search(values, first, None)
        astray = (starts != ends).nonzero().view(-1)
        if len(astray):
            ends = ends.index_select(0, astray)
            only = torch.full((len(astray), first.shape[1]), NEVER, dtype=torch.float32, device=values.device)
            only.scatter_(1, ends.long().unsqueeze(1), 0.0)
            codes[astray], errors[astray], _, _ = self._search(values.index_select(0, astray), only, ends)
        return codes, errors

    def _search(
        self, values: torch.Tensor, first: torch.Tensor, ends: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best path of each block that ends in a given state, or in a state that the best of all paths starts from.

        Args:
            values: as for `encode`.
            first: errors before the first step, fp32 of shape (blocks, states).
            ends: the given states, int32 of shape (blocks,); None: chosen here.

        Returns:
            The codes and squared errors as `encode`, and the states where the paths start and end, int32 of shape
            (blocks,).
        """
        batches = values.split(self._batch)
        given = [None] * len(batches) if ends is None else ends.split(self._batch)
        parts = [self._search_batch(*part) for part in zip(batches, first.split(self._batch), given, strict=True)]
        codes, errors, starts, ends = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return codes, errors, starts, ends

    def _search_batch(
        self, values: torch.Tensor, first: torch.Tensor, ends: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        steps = values.t().contiguous()
        errors = self._forward(steps, first.t())
        if ends is None:
            ends = self._backtrack(steps, errors, errors[-1].argmin(dim=0).int())
        codes = torch.empty(steps.shape, dtype=torch.uint8, device=steps.device)
        starts = self._backtrack(steps, errors, ends, codes)
        before, after = (
            errors[step].gather(0, states.long().unsqueeze(0)).squeeze(0) for step, states in ((0, starts), (-1, ends))
        )
        return codes.t().contiguous(), after - before, starts, ends

    def _forward(self, steps: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The smallest error that leads to each state, before and after each step: fp32 (steps + 1, states, blocks).

        Args:
            steps: the values, fp32 of shape (steps, blocks).
            first: errors before the first step, fp32 of shape (states, blocks).
        """
        errors = torch.empty(len(steps) + 1, *first.shape, dtype=torch.float32, device=steps.device)
        errors[0] = first
        parts = zip(steps.split(self._chunk, dim=1), errors.split(self._chunk, dim=2), strict=True)
        for values_of, errors_of in parts:
            added = torch.empty(self._format.levels, values_of.shape[1], dtype=torch.float32, device=steps.device)
            for step, values in enumerate(values_of):
                self._advance(values, errors_of[step], errors_of[step + 1], added)
        return errors

    def _advance(self, values: torch.Tensor, before: torch.Tensor, after: torch.Tensor, added: torch.Tensor) -> None:
        """One step: set `after`, which may be `before`; `added`, fp32 of shape (levels, blocks), is for this work."""
        fmt = self._format
        by_last = added.view(fmt.states, fmt.codes, -1)
        torch.sub(values, self._levels, out=added)
        torch.addcmul(before.unsqueeze(1), by_last, by_last, out=by_last)
        torch.amin(added.view(fmt.codes, fmt.states, -1), dim=0, out=after)

    def _backtrack(
        self, steps: torch.Tensor, errors: torch.Tensor, state: torch.Tensor, codes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state before the first step on the best path to a final state, int32; writes the path's codes to `codes`.

        Recomputes the survivors along one path per block, which is cheaper than storing all of them.
        """
        fmt = self._format
        for step in reversed(range(len(steps))):
            own = steps[step] - self._by_next.index_select(1, state)
            own = torch.addcmul(self._predecessor_errors(errors[step], state), own, own, out=own)
            best = store_index_in_low_bits(own, self._leaving, fmt.codes - 1).amin(dim=0).bitwise_and_(fmt.codes - 1)
            number = torch.add(state, best, alpha=fmt.states)
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
