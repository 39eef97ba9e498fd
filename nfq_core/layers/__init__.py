"""Linear, Conv2d and Embedding layers with packed weights and LoRA, for any PyTorch model."""

from .low_rank import LowRank
from .packed_embedding import PackedEmbedding
from .packed_layers import PackedConv2d, PackedLayer, PackedLinear
from .packing import assign_state, dense_layers, pack_layers, packed_layers

__all__ = [
    "LowRank",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "assign_state",
    "dense_layers",
    "pack_layers",
    "packed_layers",
]
