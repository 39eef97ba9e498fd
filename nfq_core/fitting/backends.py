"""Which code searches for trellis codes: loops compiled by numba on a CPU, else plain torch."""

from __future__ import annotations

import os

import torch

from ..packed.layout import BlockFormat
from . import trellis_numba
from .trellis import TrellisCoder


def search_backend(device: torch.device) -> tuple[str, str]:
    """The name of the search on a device, "numba" or "torch", and the reason."""
    if device.type != "cpu":
        return "torch", f"numba compiles for CPUs, not for {device.type} devices"
    if os.environ.get("NFQ_BACKEND") == "torch":
        return "torch", "requested by NFQ_BACKEND=torch"
    obstacle = trellis_numba.obstacle()
    return ("torch", obstacle) if obstacle else ("numba", "loops compiled for this processor")


def trellis_coder(
    levels: torch.Tensor, fmt: BlockFormat, device: torch.device
) -> TrellisCoder | trellis_numba.CompiledCoder:
    """The coder for a device; arguments as for `TrellisCoder`."""
    if search_backend(device)[0] == "numba":
        return trellis_numba.CompiledCoder(levels, fmt)
    return TrellisCoder(levels, fmt, device)


def tries_other_scales(device: torch.device) -> bool:
    """Whether a device is fast enough to try several scales for each block; plain torch on a CPU is not."""
    return device.type != "cpu" or search_backend(device)[0] == "numba"
