"""Codes for a trellis format with error feedback: block after block, then each block again in view of all others.

As in GPTQ, what a weight loses is made up for by the weights of its row still to come. Between blocks that is a matrix
product (block LDLQ, QTIP, arXiv 2406.11235); within a block every survivor of the Viterbi search has lost something
else, and is given targets of its own (per-survivor processing, Raheli, Polydoros and Tzou 1995). The trellis fixes the
order in which that happens. So each block is then searched again, starting elsewhere on its circle, while the others
stand; what lowers the error of the layer's output is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..packed.formats import BLOCK, BlockFormat
from .feedback import DAMPING, MAX_COLUMNS, SecondMoment, inverse_factor, relative_moment
from .search import store_index_in_low_bits
from .trellis import CACHED_BYTES, DEVICE_BYTES, lead_steps
from .trellis_fit import TrellisQuantizer, level_numbers

GROUP = 8
"""Steps between two times when a survivor's whole history is put in order; in between, only the last ones are."""

TURNS = {"fast": (16,), "best": (16, 32, 48, 0)}
"""By effort, how often blocks are searched again, and by how many places each is turned on its circle for it."""


class FeedbackCoder:
    """Chooses the codes of blocks whose weights feed one another, on one device.

    Args:
        levels: in the order of their numbers, fp32 of shape (fmt.levels,).
        fmt: a trellis format.
        device: where the blocks are.
    """

    def __init__(self, levels: torch.Tensor, fmt: BlockFormat, device: torch.device) -> None:
        self._format = fmt
        self._levels = levels.to(device)
        self._states = fmt.states
        self._lead = lead_steps(fmt)
        self._next = torch.arange(self._states, dtype=torch.int32, device=device).view(-1, 1)
        self._leaving = torch.arange(fmt.codes, dtype=torch.int32, device=device).view(-1, 1, 1)
        if device.type == "cpu":
            self._chunk = CACHED_BYTES // (4 * fmt.levels)
        else:
            self._chunk = DEVICE_BYTES // (4 * (fmt.levels + 2 * BLOCK * self._states))

    def encode(
        self, values: torch.Tensor, importance: torch.Tensor, gains: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of least squared error, by importance, under feedback, nearly.

        Args:
            values: weights divided by their blocks' scales, fp32 of shape (blocks, 64).
            importance: what a squared error counts at each place of a block, fp32 of shape (64,), above 0.
            gains: what is taken off the later value j for an error of 1 at i, fp32 of shape (64, 64), above the
                diagonal.

        Returns:
            The codes, uint8 of shape (blocks, 64), and the errors, fp32 of the same shape: of each value, less what was
            taken off it, to its level.
        """
        roots = importance.sqrt()
        parts = [self._encode(part.t().contiguous(), roots, gains) for part in values.split(self._chunk)]
        codes, errors = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        return codes.t().contiguous(), errors.t()

    def _encode(
        self, steps: torch.Tensor, roots: torch.Tensor, gains: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` for one chunk, values and results by steps; `roots` are those of the importance.

        A search around the start without feedback finds the state there, as in `TrellisCoder`.
        """
        lead = self._lead
        around = torch.cat([steps[-lead:], steps[:lead]])
        free = torch.zeros(self._states, steps.shape[1], dtype=torch.float32, device=steps.device)
        costs, leaving, _ = self._forward(around, torch.cat([roots[-lead:], roots[:lead]]), None, free)
        start = self._back(leaving[lead:], costs.argmin(dim=0))
        only_start = torch.full_like(free, math.inf).scatter_(0, start.unsqueeze(0), 0.0)
        _, leaving, history = self._forward(steps, roots, gains, only_start)
        codes = torch.empty(steps.shape, dtype=torch.uint8, device=steps.device)
        self._back(leaving, start, codes)
        return codes, history.gather(1, start.expand(BLOCK, 1, -1)).squeeze(1)

    def _forward(
        self, steps: torch.Tensor, roots: torch.Tensor, gains: torch.Tensor | None, costs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The Viterbi algorithm with a history of errors for every survivor.

        Args:
            steps: the values, fp32 of shape (steps, blocks).
            roots: square roots of the importance, fp32 of shape (steps,).
            gains: see `encode`; None: there is no feedback, and the histories are not put in order.
            costs: those before the first step, fp32 of shape (states, blocks).

        Returns:
            The costs after the last step; of the survivor in each state after each step, the bits that left the window,
            uint8 of shape (steps, states, blocks); and the errors on its way, fp32 of the same shape.
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
                ways = ((numbers >> fmt.code_bits) * blocks + columns).view(-1)
                reached = self._levels.index_select(0, numbers.view(-1))
                if i:
                    recent[:i] = recent[:i].view(i, -1).index_select(1, ways).view(i, states, blocks)
                recent[i] = (target.reshape(-1).index_select(0, ways) - reached).view(states, blocks)
                origin = ways if origin is None else origin.index_select(0, ways)
            if gains is not None and first:
                history[:first] = history[:first].view(first, -1).index_select(1, origin).view(first, states, blocks)
        return costs, leaving, history

    def _back(self, leaving: torch.Tensor, state: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        """The state before the first step of the survivor in a last state; its codes are written to `codes`."""
        for step in reversed(range(len(leaving))):
            number = leaving[step].gather(0, state.unsqueeze(0)).squeeze(0).long() * self._states + state
            if codes is not None:
                codes[step] = number & (self._format.codes - 1)
            state = number >> self._format.code_bits
        return state


@dataclass(frozen=True)
class _Stretch:
    """Weights of a row that feed one another.

    Args:
        start: the first one's place in a line.
        stop: the place after the last one.
        moment: second moment of their inputs, in any unit, damped, fp32.
        gains: see `FeedbackCoder.encode`.
        importance: likewise.
    """

    start: int
    stop: int
    moment: torch.Tensor
    gains: torch.Tensor
    importance: torch.Tensor


def _feedback(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gains and importance by a second moment, see `FeedbackCoder.encode`."""
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
    """Scales and codes of a weight's blocks, chosen for the least error of its layer's output.

    Rows are taken together in *lines*, as many in each as make whole blocks.

    Args:
        weight: fp32 of shape (rows, columns).
        moment: that of the inputs.
        quantizer: chooses a block's scale, by the values that feedback has left it.
        levels: its levels.
        table: the scale of each scale code, floating of shape (256,).
        fmt: its format.
        turns: by how many places a block is turned, each time that it is searched again.

    Returns:
        The scale codes, uint8 of shape (blocks,), and the codes, uint8 of shape (blocks, 64).
    """
    rows, columns = weight.shape
    together = BLOCK // math.gcd(columns, BLOCK)
    lines = torch.nn.functional.pad(weight, (0, 0, 0, -rows % together)).reshape(-1, together * columns)
    coder = FeedbackCoder(levels, fmt, weight.device)
    table = table.to(weight.device).float()
    scale_codes, codes = [], []
    for stretches in _stretches(columns, together, moment, weight.device):
        part = lines[:, stretches[0].start : stretches[-1].stop]
        found = _Lines(part, stretches, coder, table, fmt, levels)
        found.first_pass(quantizer)
        for turn in turns:
            found.search_again(turn)
        scale_codes.append(found.scale_codes)
        codes.append(found.codes)
    blocks = -(-weight.numel() // BLOCK)
    return torch.cat(scale_codes, dim=1).view(-1)[:blocks], torch.cat(codes, dim=1).view(-1, BLOCK)[:blocks]


def _stretches(columns: int, together: int, moment: SecondMoment, device: torch.device) -> Iterator[list[_Stretch]]:
    """The stretches of a line, those at a time that share no block with later ones."""
    waiting = []
    kept: dict[int, tuple[torch.Tensor, ...]] = {}
    for row in range(together):
        for first in range(0, columns, MAX_COLUMNS):
            last = min(first + MAX_COLUMNS, columns)
            if first not in kept:
                matrix = relative_moment(moment, first, last, device)
                gains, importance = _feedback(matrix)
                matrix.diagonal().add_(DAMPING * matrix.diagonal().mean())
                kept[first] = matrix, gains, importance
            waiting.append(_Stretch(row * columns + first, row * columns + last, *kept[first]))
            if together == 1:
                # No other row follows that would need them.
                kept.clear()
            if not waiting[-1].stop % BLOCK:
                yield waiting
                waiting = []


class _Lines:
    """Lines of blocks while their codes are chosen; places are counted from the first stretch's start.

    Args:
        values: fp32 of shape (lines, places).
        stretches: of which a line consists.
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
        """Choose scale and codes of one block after the other."""
        left = self._values.clone()
        for block in range(self.codes.shape[1]):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            values = left[:, place].contiguous()
            gains, importance = left.new_zeros(BLOCK, BLOCK), left.new_empty(BLOCK)
            for stretch, inside, own in self._pieces(block):
                gains[inside, inside] = stretch.gains[own, own]
                importance[inside] = stretch.importance[own]
            self.scale_codes[:, block] = quantizer.encode(values, values.abs().amax(dim=1))[0]
            scales = self._scales(block)
            codes, errors = self._coder.encode(_divided(values, scales), importance, gains)
            errors = torch.where(scales == 0, values, errors * scales)
            self._take(block, codes, torch.ones_like(scales[:, 0], dtype=torch.bool))
            for stretch, inside, own in self._pieces(block):
                behind = slice(place.start + inside.stop, stretch.stop - self._offset)
                left[:, behind] -= errors[:, inside] @ stretch.gains[own, own.stop :]

    def search_again(self, turn: int) -> None:
        """Choose the codes of each block again, all others being as they are, and take those that do better."""
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
            # The error that the others' would want of this block, were it free; where there is none, nothing is taken.
            wanted = torch.linalg.solve_ex(moment, pull.T).result.T
            values = _divided(self._values[:, place] + wanted, scales)
            codes = self._coder.encode(values[:, order], importance, gains)[0].roll(turn, dims=1)
            after = self._values[:, place] - self._decoded(codes, scales)
            gain = ((before @ moment + 2 * pull) * before - (after @ moment + 2 * pull) * after).sum(dim=1)
            self._take(block, codes, gain > 0)

    def _pieces(self, block: int) -> Iterator[tuple[_Stretch, slice, slice]]:
        """The stretches that a block shares places with, and where these are in the block and in the stretch."""
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

    def _take(self, block: int, codes: torch.Tensor, better: torch.Tensor) -> None:
        """Let a block have these codes in the lines where they are better."""
        place = slice(block * BLOCK, (block + 1) * BLOCK)
        errors = self._values[:, place] - self._decoded(codes, self._scales(block))
        self._errors[:, place] = torch.where(better[:, None], errors, self._errors[:, place])
        self.codes[:, block] = torch.where(better[:, None], codes, self.codes[:, block])


def _divided(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values in terms of their scales; 0 where the scale is."""
    return values * torch.where(scales == 0, 0.0, 1 / scales)
