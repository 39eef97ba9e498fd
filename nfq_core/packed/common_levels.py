"""The levels that small tensors share, because a large table of their own would cost too many bits.

They are Lloyd levels for Gaussian blocks, literal in `docs/FORMAT.md`, and made by `benchmarks.quality.common_levels`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.numpy import load_file
from torch.utils._python_dispatch import _disable_current_modes

from .scales import cached_tensor

PATH = Path(__file__).with_name("common_levels.safetensors")
"""For each format with common levels, by id: fp16 of shape (levels,)."""


@cached_tensor
def common_levels(format_id: str, device: torch.device) -> torch.Tensor:
    """The common levels of a format by level number, fp16 of shape (levels,); cached, do not modify."""
    return _all_levels()[format_id].to(device)


@lru_cache(1)
def _all_levels() -> dict[str, torch.Tensor]:
    """All tables, as real tensors on the CPU whatever torch's default device or dispatch mode is."""
    tables = {name: levels.copy() for name, levels in load_file(PATH).items()}
    with _disable_current_modes(), torch.device("cpu"):
        return {name: torch.from_numpy(levels) for name, levels in tables.items()}
