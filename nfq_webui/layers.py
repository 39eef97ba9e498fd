"""Which of Forge's layers for GGUF files can hold our packed weights: each kind is tried once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from backend import memory_management, operations

from ..nfq_core import quantize
from .packed import kept_parameter, packed_parameter

LAYERS: dict[int, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    2: ("Linear", (64, 16), (2, 64)),
    4: ("Conv2d", (16, 8, 3), (1, 16, 4, 4)),
}
"""By a weight's number of dimensions: the layer, its sizes, and the shape of an input for it."""

TOLERANCE = 1e-2
"""Largest difference, relative to the largest output, that a GPU's order of additions may make in TF32."""


def packable_dimensions() -> tuple[tuple[int, ...], str]:
    """Try the program's layers with packed weights.

    Returns:
        The numbers of dimensions of weights that can stay packed, and why Linear weights cannot; empty if they can.
        Forge's convolutions cannot, Forge Neo's can.
    """
    faults = {dimensions: _fault(*layer) for dimensions, layer in LAYERS.items()}
    # Without Linear layers, 87 % of SDXL's weights, packing saves too little.
    return (() if faults[2] else tuple(key for key, fault in faults.items() if not fault)), faults[2]


def _fault(name: str, sizes: tuple[int, ...], input_shape: tuple[int, ...]) -> str:
    """What is wrong with a layer that holds a packed weight; empty if nothing is."""
    apply: Callable = torch.nn.functional.linear if name == "Linear" else torch.nn.functional.conv2d
    device = memory_management.get_torch_device()
    generator = torch.Generator().manual_seed(0)
    try:
        layer = getattr(operations.ForgeOperationsGGUF, name)(*sizes)
        weight = quantize(torch.randn(sizes[1], sizes[0], *sizes[2:] * 2, generator=generator))
        bias = torch.randn(sizes[1], generator=generator)
        state = {"weight": packed_parameter(weight), "bias": kept_parameter(bias)}
        values = torch.randn(input_shape, generator=generator).to(device)
        with torch.inference_mode():
            layer.load_state_dict(state)
            found = layer.to(device)(values)
            wanted = apply(values, weight.dequantize(torch.float32).to(device), bias.to(device))
        difference = float((found - wanted).abs().amax() / wanted.abs().amax())
    except Exception as error:
        return f"ForgeOperationsGGUF.{name} fails with a packed weight ({error})".replace("\n", " ")
    return "" if difference <= TOLERANCE else f"ForgeOperationsGGUF.{name} computes something else"
