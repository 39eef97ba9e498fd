"""Codes for a trellis format with error feedback: a first pass over the blocks, then each block is searched again.

As in GPTQ, later weights of a row compensate the errors of earlier ones. Between blocks, this is a matrix product
(block LDLQ, QTIP, arXiv 2406.11235). Within a block, every survivor of the Viterbi search has different errors and gets
its own targets (per-survivor processing, Raheli, Polydoros and Tzou 1995). The trellis fixes the order of weights, so
each block is then searched again from another start on its circle, with all other blocks fixed. The new codes are kept
if they lower the error of the layer's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..packed.layout import BLOCK, BlockFormat
from . import trellis_feedback_numba
from .backends import search_backend
from .feedback import Batch, Factors, SecondMoment, batches, feedback_gains
from .search import store_index_in_low_bits
from .trellis import CACHED_BYTES, DEVICE_BYTES
from .trellis_fit import TrellisQuantizer, level_numbers

GROUP = 8
"""Steps after which each survivor's whole history is reordered; in between, only the steps since then are."""

LEAD_BITS = 96
"""Bits of the stream before and after a block's start that determine the state there; twice as many gain ≤ 0.02 dB."""

TURNS = {"fast": (16,), "best": (16, 32, 48, 0)}
"""By effort, the rotation of a block on its circle, in weights, for each further search."""


class FeedbackCoder:
    """Chooses the codes of blocks under error feedback, on one device.

    Args:
        levels: by level number, fp32 of shape (fmt.levels,).
        fmt: a trellis format.
        device: device of the blocks.
    """

    def __init__(self, levels: torch.Tensor, fmt: BlockFormat, device: torch.device) -> None:
        self._format = fmt
        self._levels = levels.to(device)
        self._states = fmt.states
        self._lead = min(BLOCK, -(-LEAD_BITS // fmt.code_bits))
        self._next = torch.arange(self._states, dtype=torch.int32, device=device).view(-1, 1)
        self._leaving = torch.arange(fmt.codes, dtype=torch.int32, device=device).view(-1, 1, 1)
        if device.type == "cpu":
            self._chunk = CACHED_BYTES // (8 * fmt.levels)  # The histories need the other half.
        else:
            self._chunk = DEVICE_BYTES // (4 * (fmt.levels + 2 * BLOCK * self._states))

    def encode(
        self, values: torch.Tensor, importance: torch.Tensor, gains: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose codes with nearly the smallest sum of weighted squared errors under feedback.

        Args:
            values: weights divided by their blocks' scales, fp32 of shape (blocks, 64).
            importance: factor of the squared error at each position of a block, fp32 of shape (64,), positive.
            gains: entry (i, j) is subtracted from value j for an error of 1 at position i < j; fp32 of shape (64, 64),
                strictly upper triangular.

        Returns:
            The codes, uint8 of shape (blocks, 64), and the errors after subtraction (value - level), fp32, same shape.
        """
        if search_backend(values.device)[0] == "numba":
            levels = self._levels.view(-1)
            return trellis_feedback_numba.encode(levels, self._format, self._lead, values, importance, gains)
        roots = importance.sqrt()
        parts = [self._encode(part.t().contiguous(), roots, gains) for part in values.split(self._chunk)]
        codes, errors = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        return codes.t().contiguous(), errors.t()

    def _encode(
        self, steps: torch.Tensor, roots: torch.Tensor, gains: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` for one chunk, transposed; `roots` are the square roots of the importance.

        A search around the start, without feedback, finds the state there.
        """
        lead = self._lead
        around = torch.cat([steps[-lead:], steps[:lead]])
        free = torch.zeros(self._states, steps.shape[1], dtype=torch.float32, device=steps.device)
        costs, leaving, _ = self._forward(around, torch.cat([roots[-lead:], roots[:lead]]), None, free)
        start = self._backtrack(leaving[lead:], costs.argmin(dim=0))
        only_start = torch.full_like(free, math.inf).scatter_(0, start.unsqueeze(0), 0.0)
        _, leaving, history = self._forward(steps, roots, gains, only_start)
        codes = torch.empty(steps.shape, dtype=torch.uint8, device=steps.device)
        self._backtrack(leaving, start, codes)
        return codes, history.gather(1, start.expand(BLOCK, 1, -1)).squeeze(1)

    def _forward(
        self, steps: torch.Tensor, roots: torch.Tensor, gains: torch.Tensor | None, costs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The Viterbi algorithm with a history of errors for every survivor.

        Args:
            steps: the values, fp32 of shape (steps, blocks).
            roots: square roots of the importance, fp32 of shape (steps,).
            gains: see `encode`; None: no feedback, and no valid history.
            costs: costs before the first step, fp32 of shape (states, blocks).

        Returns:
            The costs after the last step; the code that left the window, for the survivor in each state after each
            step, uint8 of shape (steps, states, blocks); the errors on each final survivor's path, fp32, same shape.
        """
        fmt, states, (count, blocks) = self._format, self._states, steps.shape
        leaving = torch.empty(count, states, blocks, dtype=torch.uint8, device=steps.device)
        history = torch.empty(count, states, blocks, dtype=torch.float32, device=steps.device)
        added = torch.empty(fmt.levels, blocks, dtype=torch.float32, device=steps.device)
        by_last = added.view(states, fmt.codes, blocks)
        by_next = added.view(fmt.codes, states, blocks)
        mask = fmt.codes - 1
        columns = torch.arange(blocks, dtype=torch.int32, device=steps.device)
        for first in range(0, count, GROUP):
            last = min(first + GROUP, count)
            targets = steps[first:last].unsqueeze(1).expand(-1, states, -1)
            if gains is not None and first:
                taken = gains[:first, first:last].T @ history[:first].view(first, -1)
                targets = targets - taken.view(targets.shape)
            recent, origin = history[first:last], None
            for i, step in enumerate(range(first, last)):
                target = targets[i]
                if origin is not None:
                    target = target.reshape(-1).index_select(0, origin).view(states, blocks)
                    target -= torch.tensordot(gains[first:step, step], recent[:i], 1)
                levels = (self._levels * roots[step]).view(states, fmt.codes, 1)
                torch.sub((target * roots[step]).unsqueeze(1), levels, out=by_last)
                torch.addcmul(costs.unsqueeze(1), by_last, by_last, out=by_last)
                best = store_index_in_low_bits(by_next, self._leaving, mask).amin(dim=0)
                costs = (best & ~mask).view(torch.float32)
                best &= mask
                leaving[step] = best
                if gains is None:
                    continue
                numbers = best * states + self._next
                predecessors = ((numbers >> fmt.code_bits) * blocks + columns).view(-1)
                reached = self._levels.index_select(0, numbers.view(-1))
                if i:
                    recent[:i] = recent[:i].view(i, -1).index_select(1, predecessors).view(i, states, blocks)
                recent[i] = (target.reshape(-1).index_select(0, predecessors) - reached).view(states, blocks)
                origin = predecessors if origin is None else origin.index_select(0, predecessors)
            if gains is not None and first:
                history[:first] = history[:first].view(first, -1).index_select(1, origin).view(first, states, blocks)
        return costs, leaving, history

    def _backtrack(self, leaving: torch.Tensor, state: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        """The state before the first step on the path to a final state; writes the path's codes to `codes`."""
        for step in reversed(range(len(leaving))):
            number = leaving[step].gather(0, state.unsqueeze(0)).squeeze(0).long() * self._states + state
            if codes is not None:
                codes[step] = number & (self._format.codes - 1)
            state = number >> self._format.code_bits
        return state


@dataclass(frozen=True)
class _Piece:
    """The columns of one row that lie in one block.

    Args:
        row: index of the row in its line.
        inside: their positions in the block.
        batch: the columns, and how they exchange feedback.
        gains: see `FeedbackCoder.encode`, for these positions; also for `importance`.
    """

    row: int
    inside: slice
    batch: Batch
    gains: torch.Tensor
    importance: torch.Tensor


def code_with_feedback(
    weight: torch.Tensor,
    moment: SecondMoment,
    quantizer: TrellisQuantizer,
    levels: torch.Tensor,
    table: torch.Tensor,
    fmt: BlockFormat,
    turns: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scales and codes that minimise the error of the layer's output.

    A *line* is the smallest number of consecutive rows that consists of whole blocks.

    Args:
        weight: fp32 of shape (rows, columns).
        moment: second moment of the inputs.
        quantizer: chooses the scale of a block after feedback.
        levels: by level number, fp32 of shape (fmt.levels,).
        table: the scale of each scale code, floating, shape (256,).
        fmt: a trellis format.
        turns: see TURNS.

    Returns:
        The scale codes, uint8 of shape (blocks,), and the codes, uint8 of shape (blocks, 64).
    """
    rows, columns = weight.shape
    rows_per_line = BLOCK // math.gcd(columns, BLOCK)
    lines = torch.nn.functional.pad(weight, (0, 0, 0, -rows % rows_per_line)).reshape(-1, rows_per_line * columns)
    coder = FeedbackCoder(levels, fmt, weight.device)
    pieces = _pieces(moment.factors(weight.device), rows_per_line)
    search = _Lines(lines, pieces, coder, table.to(weight.device).float(), fmt, levels)
    search.first_pass(quantizer)
    for turn in turns:
        search.search_again(turn)
    blocks = -(-weight.numel() // BLOCK)
    return search.scale_codes.view(-1)[:blocks], search.codes.view(-1, BLOCK)[:blocks]


def _pieces(factors: Factors, rows_per_line: int) -> list[list[_Piece]]:
    """The pieces of each block of a line."""
    columns = len(factors.own)
    result: list[list[_Piece]] = [[] for _ in range(rows_per_line * columns // BLOCK)]
    for row in range(rows_per_line):
        for batch in batches(factors, BLOCK - row * columns % BLOCK):
            block, start = divmod(row * columns + batch.columns.start, BLOCK)
            inside = slice(start, start + len(batch.own))
            result[block].append(_Piece(row, inside, batch, *feedback_gains(batch.moment)))
    return result


class _Lines:
    """The search state of all lines.

    Args:
        values: the weights, fp32 of shape (lines, positions).
        pieces: the pieces of each block.
    """

    def __init__(
        self,
        values: torch.Tensor,
        pieces: list[list[_Piece]],
        coder: FeedbackCoder,
        table: torch.Tensor,
        fmt: BlockFormat,
        levels: torch.Tensor,
    ) -> None:
        self._values = values
        self._pieces = pieces
        self._coder = coder
        self._table = table
        self._format = fmt
        self._levels = levels.to(values.device)
        lines, device = len(values), values.device
        self.scale_codes = torch.empty(lines, len(pieces), dtype=torch.uint8, device=device)
        self.codes = torch.empty(lines, len(pieces), BLOCK, dtype=torch.uint8, device=device)
        self._errors = torch.zeros_like(values)
        rank = pieces[0][0].batch.shared.shape[1]
        self._states = torch.zeros(pieces[-1][-1].row + 1, lines, rank, dtype=torch.float32, device=device)
        """See `feedback.Batch`, for each row of a line."""

    def first_pass(self, quantizer: TrellisQuantizer) -> None:
        """Choose scale and codes of one block after another."""
        for block, pieces in enumerate(self._pieces):
            values = self._values[:, _place(block)].clone()
            gains, importance = values.new_zeros(BLOCK, BLOCK), values.new_empty(BLOCK)
            for piece in pieces:
                values[:, piece.inside].addmm_(self._states[piece.row], piece.batch.response)
                gains[piece.inside, piece.inside] = piece.gains
                importance[piece.inside] = piece.importance
            self.scale_codes[:, block] = quantizer.encode(values, values.abs().amax(dim=1))[0]
            scales = self._scales(block)
            codes, _ = self._coder.encode(_divided(values, scales), importance, gains)
            self._accept(block, codes, torch.ones_like(scales[:, 0], dtype=torch.bool))

    def search_again(self, turn: int) -> None:
        """Choose each block's codes again, rotated by `turn`, and keep them where the output's error decreases."""
        order = torch.arange(BLOCK, device=self._values.device).roll(-turn)
        for block, pieces in enumerate(self._pieces):
            before, scales = self._errors[:, _place(block)], self._scales(block)
            moment = torch.zeros(BLOCK, BLOCK, dtype=torch.float32, device=order.device)
            pull = torch.empty_like(before)
            for piece in pieces:
                shared = piece.batch.shared
                moment[piece.inside, piece.inside] = shared @ shared.T
                pull[:, piece.inside] = self._states[piece.row] @ shared.T
            # Of the errors outside the block alone.
            pull -= before @ moment
            moment.diagonal().add_(torch.cat([piece.batch.own for piece in pieces]))
            turned = moment[order][:, order]
            gains, importance = feedback_gains(turned)
            # What to add to the block's weights so that they best compensate the errors outside it.
            compensation = torch.linalg.solve(moment, pull.T).T
            values = _divided(self._values[:, _place(block)] + compensation, scales)
            codes = self._coder.encode(values[:, order], importance, gains)[0].roll(turn, dims=1)
            after = self._values[:, _place(block)] - self._decoded(codes, scales)
            gain = ((before @ moment + 2 * pull) * before - (after @ moment + 2 * pull) * after).sum(dim=1)
            self._accept(block, codes, gain > 0)

    def _scales(self, block: int) -> torch.Tensor:
        """The scales of a block in all lines, fp32 of shape (lines, 1)."""
        return self._table.index_select(0, self.scale_codes[:, block].int()).unsqueeze(1)

    def _decoded(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        numbers = level_numbers(codes, self._format)
        return self._levels.index_select(0, numbers).view(codes.shape) * scales

    def _accept(self, block: int, codes: torch.Tensor, better: torch.Tensor) -> None:
        """Set a block's codes in the lines where `better` is true."""
        before = self._errors[:, _place(block)]
        errors = self._values[:, _place(block)] - self._decoded(codes, self._scales(block))
        change = torch.where(better[:, None], errors - before, 0.0)
        for piece in self._pieces[block]:
            self._states[piece.row].addmm_(change[:, piece.inside], piece.batch.shared)
        before += change
        self.codes[:, block] = torch.where(better[:, None], codes, self.codes[:, block])


def _place(block: int) -> slice:
    """The positions of a block in its line."""
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _divided(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``values / scales``; 0 where the scale is 0."""
    return values * torch.where(scales == 0, 0.0, 1 / scales)
