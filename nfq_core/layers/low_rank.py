"""Low-rank changes of a weight (LoRA), any number of them added in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """The sum of low-rank changes of one weight: ``up @ down``.

    Args:
        up: shape (rows, rank); the coefficients are in it.
        down: shape (rank, columns), of the same dtype and on the same device.
    """

    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def sum(
        cls,
        parts: Iterable[tuple[torch.Tensor, torch.Tensor, float]],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LowRank:
        """Put several changes together, so that all of them are added at the price of one.

        A factor and its partner are brought to about the same magnitude, by a power of two: small numbers would lose
        digits in fp16.

        Args:
            parts: up of shape (rows, rank, …), down of shape (rank, …), and what their product is multiplied by.
                Further dimensions, as convolutions have them, are flattened.
            device: where the factors are to lie; they are prepared there.
            dtype: of the factors, that of the weights they will be added to.
        """
        ups, downs = [], []
        for up, down, coefficient in parts:
            up = up.to(device).flatten(1).float() * coefficient
            down = down.to(device).flatten(1).float()
            ratio = (_magnitude(down) / _magnitude(up)).sqrt().log2().round().exp2()
            ups.append((up * ratio).to(dtype))
            downs.append((down / ratio).to(dtype))
        return cls(torch.cat(ups, dim=1), torch.cat(downs, dim=0))

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Add the change to a contiguous weight of (rows · columns) elements in place, in one operation; returns it."""
        weight.view(self.up.shape[0], -1).addmm_(self.up, self.down)
        return weight


def _magnitude(factor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, and 1 for an all-zero factor."""
    largest = factor.abs().amax()
    return torch.where(largest > 0, largest, 1.0)
