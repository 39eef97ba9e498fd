"""An Embedding layer with a packed weight, of which each forward call dequantises only the rows that it needs."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import NFQError
from ..packed.op import dequantize_rows
from ..packed.tensor import NFTensor
from .low_rank import LowRank
from .packed_layers import CANNOT_SCRIPT, PackedLayer, with_dense_weight


class PackedEmbedding(PackedLayer, nn.Embedding):
    """`torch.nn.Embedding` with a packed weight; replaces `layer`.

    Its output has the dtype of `layer`'s weight; casts of the model, such as `model.half()`, change it.

    Raises:
        NFQError: `layer` rescales its rows in place (`max_norm`), which packed weights cannot do.
    """

    def __init__(self, layer: nn.Embedding, tensor: NFTensor) -> None:
        if layer.max_norm is not None:
            raise NFQError("an Embedding layer with max_norm changes its weight, and packed weights cannot be changed")
        super().__init__(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        self._set_packed_weight(tensor, layer)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows.

        Args:
            ids: int32 or int64, any shape.

        Returns:
            The rows in `compute_dtype`, shape (*ids.shape, embedding_dim).

        Raises:
            IndexError: an id is negative or too large, as in the stock layer.
        """
        if torch.jit.is_tracing():
            raise NFQError(CANNOT_SCRIPT)
        rows, change = ids.reshape(-1), self.low_rank
        found = dequantize_rows(self.buffer, self.format_id, self.weight_shape, rows, self.compute_dtype)
        if change is not None:
            change = LowRank(change.up.index_select(0, rows), change.down)
        return self._with_low_rank(found, change).view(*ids.shape, self.embedding_dim)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The stock layer with the weight in `dtype`, changes included."""
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return with_dense_weight(layer, self, dtype)
