"""Linear and Conv2d layers with packed weights for any PyTorch model, and low-rank changes (LoRA) on top of them."""

from .low_rank import LowRank
from .packed_layers import (
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    assign_state,
    dense_layers,
    pack_layers,
    packed_layers,
)

__all__ = [
    "LowRank",
    "PackedConv2d",
    "PackedLayer",
    "PackedLinear",
    "assign_state",
    "dense_layers",
    "pack_layers",
    "packed_layers",
]
