"""Low-rank changes of a weight (LoRA), any number of them combined into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """The sum of low-rank changes of one weight: ``up @ down``.

    Args:
        up: shape (rows, rank), coefficients included.
        down: shape (rank, columns), same dtype and device.
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
        """Combine several changes into one, so that adding them costs one matrix product.

        The factors of each change are scaled by powers of two to similar magnitudes, because small numbers lose digits
        in fp16.

        Args:
            parts: for each change: up of shape (rows, rank, …), down of shape (rank, …), and the coefficient of their
                product. Further dimensions, as in convolutions, are flattened.
            device: device of the result, on which it is also computed.
            dtype: dtype of the result: that of the weights to which it will be added.
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
        """Add the change in place to a contiguous weight of rows · columns elements; returns the weight."""
        weight.view(self.up.shape[0], -1).addmm_(self.up, self.down)
        return weight


def _magnitude(factor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude; 1 for an all-zero factor."""
    largest = factor.abs().amax()
    return torch.where(largest > 0, largest, 1.0)
