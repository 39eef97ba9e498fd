"""Rounding with error feedback, which minimises the error of the layer's output (GPTQ, arXiv 2210.17323).

Columns are rounded one by one, those with the strongest inputs first. Later columns compensate the error of each column
as far as their inputs correlate with its own. Levels and scales are chosen before and do not change.

The second moment of the inputs is a diagonal plus a product of low rank, ``diag(own) + shared @ shared.T``. What later
columns can compensate then depends on the earlier errors through ``errors @ shared`` alone, a few numbers per row. This
makes the result of GPTQ's Cholesky factor cheap for any number of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from ..packed.layout import BLOCK
from . import feedback_numba
from .backends import search_backend
from .search import NearestLevel

DAMPING = 0.01
"""Added to the diagonal, relative to its mean, so that the inverse does not amplify noise; raised if needed."""

FEW_COLUMNS = 16
"""Columns whose error is propagated to all later columns of a batch in one matrix product."""

ROWS = 1024
"""Rows rounded at once: a batch of their columns stays in a processor's cache."""


@dataclass(frozen=True)
class SecondMoment:
    """E[x xᵀ] of a layer's inputs, usually as a diagonal and a low-rank factor.

    Args:
        diagonal: E[x²] of each column of the flattened weight, floating, shape (columns,).
        correlation: floating. Shape (columns, rank): a factor F with F Fᵀ equal to the correlation of the columns off
            the diagonal, which is 1. Shape (columns, columns): the correlation itself.
    """

    diagonal: torch.Tensor
    correlation: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> SecondMoment:
        """From a full second moment of shape (columns, columns); ValueError for another shape."""
        if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
            raise ValueError(f"the Hessian must have shape (columns, columns), got {tuple(hessian.shape)}")
        diagonal = hessian.diagonal().float()
        inverse = inverse_root(diagonal)
        return cls(diagonal, hessian.float() * inverse[:, None] * inverse)

    def factors(self, device: torch.device) -> Factors:
        """The damped second moment of the columns in an arbitrary unit, on `device`."""
        correlation = self.correlation.to(device).float()
        shared = _root(correlation) if self.is_whole else correlation
        diagonal = self.diagonal.to(device).float().clamp_min(0)
        # Avoids overflow in later sums.
        diagonal = diagonal / diagonal.amax().clamp_min(torch.finfo(torch.float32).tiny)
        own = diagonal * (1 - shared.square().sum(dim=1)).clamp_min(0)
        shared = shared * diagonal.sqrt()[:, None]
        # Columns without input neither give nor take feedback; any positive diagonal will do.
        mean = float(diagonal.mean()) or 1.0
        own = torch.where(diagonal > 0, own + DAMPING * mean, mean)
        return Factors(own, shared)

    @property
    def is_whole(self) -> bool:
        """Whether `correlation` is the full matrix, not a factor."""
        return self.correlation.shape[0] == self.correlation.shape[1]


@dataclass(frozen=True)
class Factors:
    """The second moment ``diag(own) + shared @ shared.T`` of some columns.

    Args:
        own: fp32, shape (columns,), positive.
        shared: fp32, shape (columns, rank).
    """

    own: torch.Tensor
    shared: torch.Tensor

    def ordered(self, order: torch.Tensor) -> Factors:
        """The same for the columns in another order."""
        return Factors(self.own[order], self.shared[order])

    def diagonal(self) -> torch.Tensor:
        """E[x²] of each column."""
        return self.own + self.shared.square().sum(dim=1)


@dataclass(frozen=True)
class Batch:
    """Consecutive columns that are rounded together, after the columns before them and before those behind.

    The state of a row is ``errors @ shared`` over its columns so far, where an error is weight - rounded weight.

    Args:
        columns: which columns.
        own: see `Factors`, of these columns.
        shared: see `Factors`, of these columns, shape (batch, rank).
        response: fp32 of shape (rank, batch): adding ``state @ response`` to the weights best compensates the errors.
        moment: their second moment once all later columns compensate as well as they can, fp32, (batch, batch).
    """

    columns: slice
    own: torch.Tensor
    shared: torch.Tensor
    response: torch.Tensor
    moment: torch.Tensor


def batches(factors: Factors, first: int = BLOCK) -> list[Batch]:
    """Split columns into batches, in order: `first` columns, then BLOCK each.

    Backwards, ``future`` holds by how much the columns behind a batch can reduce the effect of a state: the error of
    the output is ``state @ future @ state.T`` once they compensate.
    """
    starts = [0, *range(first, len(factors.own), BLOCK)]
    own, shared = factors.own.double(), factors.shared.double()
    future = torch.eye(shared.shape[1], dtype=torch.float64, device=shared.device)
    result = []
    for start, stop in reversed(list(pairwise([*starts, len(own)]))):
        part = slice(start, stop)
        seen = shared[part] @ future
        moment = seen @ shared[part].T
        moment.diagonal().add_(own[part])
        response = torch.linalg.solve(moment, seen)
        result.append(Batch(part, factors.own[part], factors.shared[part], response.T.float(), moment.float()))
        future = future - seen.T @ response
    return result[::-1]


def _root(correlation: torch.Tensor) -> torch.Tensor:
    """A square root of a symmetric matrix, fp32; negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(correlation.double())
    return (vectors * values.clamp_min(0).sqrt()).float()


def check_inputs(shape: torch.Size, importance: torch.Tensor | None, moment: SecondMoment | None) -> None:
    """ValueError if statistics do not match a weight's shape or hold invalid values."""
    if importance is None and moment is None:
        return
    if len(shape) < 2:
        raise ValueError(f"importance and Hessian need a weight of two or more dimensions, got {len(shape)}")
    columns = prod(shape[1:])
    if importance is not None and importance.shape != shape[1:2]:
        raise ValueError(f"importance must have shape ({shape[1]},), got {tuple(importance.shape)}")
    if moment is not None and not (moment.diagonal.shape == (columns,) == moment.correlation.shape[:1]):
        raise ValueError(f"the Hessian must have {columns} columns, got {len(moment.diagonal)}")
    diagonals = [part for part in (importance, moment and moment.diagonal) if part is not None]
    if not all((torch.isfinite(part) & (part >= 0)).all() for part in diagonals):
        raise ValueError("importance and the Hessian's diagonal must be finite and not negative")
    if moment is not None and not torch.isfinite(moment.correlation).all():
        raise ValueError("the Hessian must be finite")


def inverse_root(diagonal: torch.Tensor) -> torch.Tensor:
    """``1 / sqrt(diagonal)``; 0 where the diagonal is not positive."""
    return torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(torch.float32).tiny).rsqrt(), 0.0)


def low_rank(sketch: torch.Tensor, probe: torch.Tensor, diagonal: torch.Tensor, rank: int) -> torch.Tensor:
    """Low-rank factor of the correlation, from a sketch of the second moment H (Nyström's method).

    Args:
        sketch: ``H @ probe``, floating, shape (columns, probes).
        probe: random, same shape.
        diagonal: diagonal of H, shape (columns,).
        rank: columns of the factor, at most `probes`.

    Returns:
        fp16 of shape (columns, rank); no row has a norm above 1.
    """
    sketch, probe = sketch.double(), probe.double()
    core = probe.T @ sketch
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > values[-1] * 1e-9
    factor = sketch @ (vectors[:, kept] * values[kept].rsqrt())
    left, sizes, _ = torch.linalg.svd(factor, full_matrices=False)
    factor = torch.nn.functional.pad((left * sizes)[:, :rank], (0, max(0, rank - len(sizes))))
    factor = factor * inverse_root(diagonal.double())[:, None]
    return (factor / factor.norm(dim=1, keepdim=True).clamp_min(1)).half()


def expected_gain(moment: SecondMoment) -> float:
    """Noise power of a layer's output with error feedback ÷ that without, in theory.

    At fine steps, every column's error has the same power, but later columns compensate all but what its inputs do not
    share with theirs. So the products of the columns' shares count: the geometric mean of the eigenvalues of the second
    moment instead of the mean of its diagonal.
    """
    factors = moment.factors(torch.device("cpu"))
    scaled = (factors.shared * factors.own.rsqrt()[:, None]).double()
    eye = torch.eye(scaled.shape[1], dtype=scaled.dtype)
    log_product = factors.own.double().log().sum() + torch.logdet(eye + scaled.T @ scaled)
    return (torch.exp(log_product / len(scaled)) / factors.diagonal().double().mean()).item()


def feedback_gains(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How columns compensate one another's errors, in their order.

    Args:
        moment: second moment of the columns, fp32 of shape (n, n), symmetric, finite, with a positive diagonal.

    Returns:
        Gains, fp32 of shape (n, n), strictly upper triangular: entry (i, j) is subtracted from column j for an error
        of 1 in column i. Importance, fp32 of shape (n,): the error of the output for a squared error of 1 in a column
        whose later columns compensate it. The diagonal is damped, tenfold each time, until both are finite.

    Raises:
        ValueError: the moment holds NaN or Inf.
    """
    if not torch.isfinite(moment).all():
        raise ValueError("the Hessian must be finite")
    moment = moment.double()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    damping, mean = 0.0, moment.diagonal().mean()
    while True:
        # moment = upper @ upper.T: the first column is the one that all others compensate.
        lower, failed = torch.linalg.cholesky_ex((moment + damping * mean * eye).flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)
            diagonal = upper.diagonal()
            gains = torch.linalg.solve_triangular(upper / diagonal, eye, upper=True)
            if torch.isfinite(gains).all():
                return gains.triu(1).float(), diagonal.square().float()
        damping = 10 * damping or DAMPING


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, nearest: NearestLevel, moment: SecondMoment
) -> torch.Tensor:
    """Round every weight with error feedback.

    Args:
        weight: fp32 of shape (rows, columns).
        scales: scale of each block of 64 consecutive weights, fp32 of shape (blocks,); 0 for an all-zero block.
        nearest: the levels.
        moment: second moment of the inputs.

    Returns:
        Each weight's code, uint8 of the weight's shape.
    """
    rows, columns = weight.shape
    factors = moment.factors(weight.device)
    order = factors.diagonal().argsort(descending=True, stable=True)
    parts = [(batch, feedback_gains(batch.moment)[0].neg_()) for batch in batches(factors.ordered(order))]
    compiled = search_backend(weight.device)[0] == "numba"
    round_one = feedback_numba.round_batch if compiled else round_batch
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, rows, ROWS):
        # Transposed, so that each column is contiguous.
        values = weight[first : first + ROWS].T.contiguous().index_select(0, order)
        starts = torch.arange(first, first + values.shape[1], device=weight.device) * columns
        found = torch.empty(values.shape, dtype=torch.uint8, device=weight.device)
        state = torch.zeros(factors.shared.shape[1], values.shape[1], dtype=torch.float32, device=weight.device)
        for batch, gains in parts:
            targets = torch.addmm(values[batch.columns], batch.response.T, state)
            blocks = (order[batch.columns, None] + starts).bitwise_right_shift_(BLOCK.bit_length() - 1)
            sizes = scales.index_select(0, blocks.view(-1)).view(targets.shape)
            found[batch.columns], rounded = round_one(targets, sizes, nearest, gains)
            state.addmm_(batch.shared.T, values[batch.columns] - rounded)
        codes[first : first + ROWS] = torch.empty_like(found).index_copy_(0, order, found).T
    return codes


def round_batch(
    targets: torch.Tensor, sizes: torch.Tensor, nearest: NearestLevel, gains: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a batch's columns one after the other; `targets` may change.

    Args:
        targets: fp32 of shape (columns, rows).
        sizes: scale of each weight, fp32, same shape.
        nearest: the levels.
        gains: see `feedback_gains`, but added to later columns.

    Returns:
        The codes, uint8, and the rounded weights, fp32, of the targets' shape.
    """
    cells = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    rounded, errors = torch.empty_like(targets), torch.empty_like(targets)
    per_unit = nearest.cells_per_unit(sizes)
    for first in range(0, len(targets), FEW_COLUMNS):
        last = min(first + FEW_COLUMNS, len(targets))
        for i in range(first, last):
            cells[i] = nearest.cells(targets[i], per_unit[i])
            torch.mul(nearest.levels.index_select(0, cells[i]), sizes[i], out=rounded[i])
            torch.sub(targets[i], rounded[i], out=errors[i])
            targets[i + 1 : last].addr_(gains[i, i + 1 : last], errors[i])
        targets[last:].addmm_(gains[first:last, last:].T, errors[first:last])
    return nearest.codes.index_select(0, cells.view(-1)).view(cells.shape), rounded
