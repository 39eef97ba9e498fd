"""Codes for a trellis format with error feedback: a first pass over the blocks, then each block is searched again.

As in GPTQ, later weights of a row compensate the errors of earlier ones. Between blocks, this is a matrix product
(block LDLQ, QTIP, arXiv 2406.11235). Within a block, every survivor of the Viterbi search has different errors and gets
its own targets (per-survivor processing, Raheli, Polydoros and Tzou 1995). The trellis fixes the order of weights, so
each block is then searched again from another start on its circle, with all other blocks fixed. The new codes are kept
if they lower the error of the layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..packed.layout import BLOCK, BlockFormat
from .feedback import DAMPING, MAX_COLUMNS, SecondMoment, inverse_factor, relative_moment
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
class _Stretch:
    """Consecutive weights of a row that exchange feedback.

    Args:
        start: position of the first one in its line.
        stop: position after the last one.
        moment: damped second moment of their inputs in an arbitrary unit, fp32.
        gains: see `FeedbackCoder.encode`.
        importance: see `FeedbackCoder.encode`.
    """

    start: int
    stop: int
    moment: torch.Tensor
    gains: torch.Tensor
    importance: torch.Tensor


def _feedback(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gains and importance for `FeedbackCoder.encode`, from a second moment."""
    factor = inverse_factor(moment)
    diagonal = factor.diagonal().clone()
    return (factor / diagonal[:, None]).triu_(1), diagonal.square().reciprocal()


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
    table = table.to(weight.device).float()
    scale_codes, codes = [], []
    for stretches in _stretches(columns, rows_per_line, moment, weight.device):
        part = lines[:, stretches[0].start : stretches[-1].stop]
        search = _Lines(part, stretches, coder, table, fmt, levels)
        search.first_pass(quantizer)
        for turn in turns:
            search.search_again(turn)
        scale_codes.append(search.scale_codes)
        codes.append(search.codes)
    blocks = -(-weight.numel() // BLOCK)
    return torch.cat(scale_codes, dim=1).view(-1)[:blocks], torch.cat(codes, dim=1).view(-1, BLOCK)[:blocks]


def _stretches(
    columns: int, rows_per_line: int, moment: SecondMoment, device: torch.device
) -> Iterator[list[_Stretch]]:
    """The stretches of a line, in groups that share no block with later groups."""
    group = []
    cache: dict[int, tuple[torch.Tensor, ...]] = {}
    for row in range(rows_per_line):
        for first in range(0, columns, MAX_COLUMNS):
            last = min(first + MAX_COLUMNS, columns)
            if first not in cache:
                matrix = relative_moment(moment, first, last, device)
                gains, importance = _feedback(matrix)
                matrix.diagonal().add_(DAMPING * matrix.diagonal().mean())
                cache[first] = matrix, gains, importance
            group.append(_Stretch(row * columns + first, row * columns + last, *cache[first]))
            if rows_per_line == 1:
                # No further row needs them.
                cache.clear()
            if not group[-1].stop % BLOCK:
                yield group
                group = []


class _Lines:
    """The search state of some blocks in all lines; positions count from the first stretch's start.

    Args:
        values: the weights, fp32 of shape (lines, positions).
        stretches: a group of stretches that covers these positions.
    """

    def __init__(
        self,
        values: torch.Tensor,
        stretches: list[_Stretch],
        coder: FeedbackCoder,
        table: torch.Tensor,
        fmt: BlockFormat,
        levels: torch.Tensor,
    ) -> None:
        self._values = values
        self._stretches = stretches
        self._offset = stretches[0].start
        self._coder = coder
        self._table = table
        self._format = fmt
        self._levels = levels.to(values.device)
        blocks = values.shape[1] // BLOCK
        self.scale_codes = torch.empty(len(values), blocks, dtype=torch.uint8, device=values.device)
        self.codes = torch.empty(len(values), blocks, BLOCK, dtype=torch.uint8, device=values.device)
        self._errors = torch.empty_like(values)

    def first_pass(self, quantizer: TrellisQuantizer) -> None:
        """Choose scale and codes of one block after another."""
        targets = self._values.clone()
        for block in range(self.codes.shape[1]):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            values = targets[:, place].contiguous()
            gains, importance = targets.new_zeros(BLOCK, BLOCK), targets.new_empty(BLOCK)
            for stretch, inside, own in self._pieces(block):
                gains[inside, inside] = stretch.gains[own, own]
                importance[inside] = stretch.importance[own]
            self.scale_codes[:, block] = quantizer.encode(values, values.abs().amax(dim=1))[0]
            scales = self._scales(block)
            codes, errors = self._coder.encode(_divided(values, scales), importance, gains)
            errors = torch.where(scales == 0, values, errors * scales)
            self._accept(block, codes, torch.ones_like(scales[:, 0], dtype=torch.bool))
            for stretch, inside, own in self._pieces(block):
                behind = slice(place.start + inside.stop, stretch.stop - self._offset)
                targets[:, behind] -= errors[:, inside] @ stretch.gains[own, own.stop :]

    def search_again(self, turn: int) -> None:
        """Choose each block's codes again, rotated by `turn`, and keep them where the output's error decreases."""
        order = torch.arange(BLOCK, device=self._values.device).roll(-turn)
        for block in range(self.codes.shape[1]):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            moment = torch.zeros(BLOCK, BLOCK, dtype=torch.float32, device=order.device)
            pull = torch.empty_like(self._errors[:, place])
            for stretch, inside, own in self._pieces(block):
                moment[inside, inside] = stretch.moment[own, own]
                whole = slice(stretch.start - self._offset, stretch.stop - self._offset)
                pull[:, inside] = self._errors[:, whole] @ stretch.moment[:, own]
            before, scales = self._errors[:, place], self._scales(block)
            pull = pull - before @ moment
            turned = moment[order][:, order]
            gains, importance = _feedback(turned)
            # The real-valued error of this block that best compensates the others; if unsolvable, NaN makes `gain` NaN.
            wanted = torch.linalg.solve_ex(moment, pull.T).result.T
            values = _divided(self._values[:, place] + wanted, scales)
            codes = self._coder.encode(values[:, order], importance, gains)[0].roll(turn, dims=1)
            after = self._values[:, place] - self._decoded(codes, scales)
            gain = ((before @ moment + 2 * pull) * before - (after @ moment + 2 * pull) * after).sum(dim=1)
            self._accept(block, codes, gain > 0)

    def _pieces(self, block: int) -> Iterator[tuple[_Stretch, slice, slice]]:
        """Each stretch that overlaps a block, and the overlap as slices of the block and of the stretch."""
        first = block * BLOCK + self._offset
        for stretch in self._stretches:
            start, stop = max(first, stretch.start), min(first + BLOCK, stretch.stop)
            if start < stop:
                yield (
                    stretch,
                    slice(start - first, stop - first),
                    slice(start - stretch.start, stop - stretch.start),
                )

    def _scales(self, block: int) -> torch.Tensor:
        """The scales of a block in all lines, fp32 of shape (lines, 1)."""
        return self._table.index_select(0, self.scale_codes[:, block].int()).unsqueeze(1)

    def _decoded(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        numbers = level_numbers(codes, self._format)
        return self._levels.index_select(0, numbers).view(codes.shape) * scales

    def _accept(self, block: int, codes: torch.Tensor, better: torch.Tensor) -> None:
        """Set a block's codes in the lines where `better` is true."""
        place = slice(block * BLOCK, (block + 1) * BLOCK)
        errors = self._values[:, place] - self._decoded(codes, self._scales(block))
        self._errors[:, place] = torch.where(better[:, None], errors, self._errors[:, place])
        self.codes[:, block] = torch.where(better[:, None], codes, self.codes[:, block])


def _divided(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``values / scales``; 0 where the scale is 0."""
    return values * torch.where(scales == 0, 0.0, 1 / scales)
