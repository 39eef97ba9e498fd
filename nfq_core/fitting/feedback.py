"""Rounding a weight so that its layer's output changes least: error feedback, after GPTQ (arXiv 2210.17323).

Columns are rounded one after the other, those with the strongest inputs first; what a column loses is made up for by
the columns still to come, as far as their inputs are correlated with its own: by the Cholesky factor of the inverse
second moment of the inputs. Levels and scales are chosen before and do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

COLUMN_BATCH = 128
"""Columns whose error reaches the columns behind them in one matrix product."""

DAMPING = 0.01
"""What is added to the diagonal at first, as a share of its mean: keeps the inverse from following noise."""

MAX_COLUMNS = 2048
"""Columns that feed one another: the factor takes their cube in time.

Of layers with 512 to 2,304 columns, those cut into 1,024 lost 0.2 dB of their output at 16 levels in the mean.
"""


@dataclass(frozen=True)
class SecondMoment:
    """E[x xᵀ] of a layer's inputs, most often as a diagonal and a factor of low rank.

    Args:
        diagonal: E[x²] of each column of the flattened weight, floating of shape (columns,).
        correlation: floating of shape (columns, rank): its product with its transpose is the columns' correlation, but
            for the diagonal, which is 1; or, of shape (columns, columns), the correlation itself.
    """

    diagonal: torch.Tensor
    correlation: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> SecondMoment:
        """A whole second moment of shape (columns, columns); ValueError for another shape."""
        if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
            raise ValueError(f"the Hessian must have shape (columns, columns), got {tuple(hessian.shape)}")
        diagonal = hessian.diagonal().float()
        inverse = inverse_root(diagonal)
        return cls(diagonal, hessian.float() * inverse[:, None] * inverse)

    def part(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """The matrix of the columns `first` … `last` - 1, fp32."""
        factor = self.correlation[first:last].to(device).float()
        matrix = factor[:, first:last].clone() if self.is_whole else factor @ factor.T
        matrix.fill_diagonal_(1)
        root = self.diagonal[first:last].to(device).float().clamp_min(0).sqrt()
        return matrix.mul_(root).mul_(root[:, None])

    @property
    def is_whole(self) -> bool:
        """Whether the correlation is given itself."""
        return self.correlation.shape[0] == self.correlation.shape[1]


def check_inputs(shape: torch.Size, importance: torch.Tensor | None, moment: SecondMoment | None) -> None:
    """ValueError where statistics do not fit a weight's shape or are no second moments."""
    if importance is None and moment is None:
        return
    if len(shape) < 2:
        raise ValueError(f"only weights of two and more dimensions have input channels, this one has {len(shape)}")
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
    """1 / sqrt of a diagonal, 0 where it is not above 0."""
    return torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(torch.float32).tiny).rsqrt(), 0.0)


def low_rank(sketch: torch.Tensor, probe: torch.Tensor, diagonal: torch.Tensor, rank: int) -> torch.Tensor:
    """The correlation's factor of low rank, from a sketch of the second moment H (Nyström's method).

    Args:
        sketch: ``H @ probe``, floating of shape (columns, probes).
        probe: random, of the same shape.
        diagonal: that of H, of shape (columns,).
        rank: columns of the factor, at most `probes`.

    Returns:
        fp16 of shape (columns, rank); no row is longer than 1.
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


def relative_moment(moment: SecondMoment, first: int, last: int, device: torch.device) -> torch.Tensor:
    """The second moment of the columns `first` … `last` - 1 as feedback takes it, fp32; its unit does not matter."""
    matrix = moment.part(first, last, device)
    diagonal = matrix.diagonal()
    # In this unit no sum overflows.
    matrix /= diagonal.amax().clamp_min(torch.finfo(torch.float32).tiny)
    # A column without input has nothing to give to others, nor to take.
    diagonal.masked_fill_(diagonal <= 0, float(diagonal.mean()) or 1.0)
    return matrix


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped second moment.

    Args:
        hessian: E[x xᵀ] of the inputs, of shape (columns, columns), symmetric, finite; its diagonal above 0.

    Returns:
        fp32 of the same shape, ``U.T @ U`` being the inverse. Damping grows tenfold until the factor is finite.

    Raises:
        ValueError: the moment holds NaN or Inf, which no damping mends.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian must be finite, and so must the products of its diagonal's roots")
    mean = hessian.diagonal().mean()
    damping = DAMPING
    while True:
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(damping * mean)
            # With rows and columns in reverse, the lower factor of the matrix is the upper one's inverse.
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                eye = torch.eye(len(lower), dtype=dtype, device=lower.device)
                factor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
                if torch.isfinite(factor).all():
                    return factor
        damping *= 10


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, boundaries: torch.Tensor, moment: SecondMoment
) -> torch.Tensor:
    """The code of every weight, rounded with error feedback.

    Args:
        weight: fp32 of shape (rows, columns).
        scales: the scale of each weight's block, fp32 of the same shape; 0 where the block is all zero.
        levels: ascending, fp32 of shape (n,).
        boundaries: between which multiples of its scale a weight takes each level, ascending, fp32 of shape (n - 1,).
        moment: that of the inputs.

    Returns:
        uint8 of the weight's shape.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, weight.shape[1], MAX_COLUMNS):
        part = slice(first, min(first + MAX_COLUMNS, weight.shape[1]))
        hessian = relative_moment(moment, part.start, part.stop, weight.device)
        codes[:, part] = _round(weight[:, part], scales[:, part], levels, boundaries, hessian)
    return codes


def _round(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, boundaries: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """`round_columns` for columns that all feed one another, under the matrix `hessian`."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order])
    # Columns as rows: each is then contiguous.
    columns, scales = weight.T[order], scales.T[order]
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for first in range(0, len(columns), COLUMN_BATCH):
        last = min(first + COLUMN_BATCH, len(columns))
        errors = torch.empty_like(columns[first:last])
        for i in range(first, last):
            nearest = torch.bucketize(columns[i] * inverse[i], boundaries)
            codes[i] = nearest
            errors[i - first] = (columns[i] - levels[nearest] * scales[i]) / factor[i, i]
            columns[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i - first], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T
