"""Pack the layers of a whole model, and replace them by stock layers again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import NFQError
from ..packed.tensor import NFTensor
from .packed_embedding import PackedEmbedding
from .packed_layers import PackedConv2d, PackedLayer, PackedLinear

PACKED_KINDS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, nn.Embedding: PackedEmbedding}
"""The packed layer that replaces each stock layer."""


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers inside a model, by name."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, PackedLayer)}


def pack_layers(model: nn.Module, tensors: Mapping[str, NFTensor]) -> None:
    """Replace Linear, Conv2d and Embedding layers of a model by packed layers.

    Biases are kept; hooks on the replaced layers are lost. The model may be on torch's meta device.

    Args:
        model: changed in place, unless an error is raised.
        tensors: packed weights by their names in the model's state dict; their buffers are shared.

    Raises:
        NFQError: a layer is missing, has another shape or type, or cannot be packed.
    """
    modules = dict(model.named_modules())
    replacements = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        layer = modules.get(path)
        if layer is None or path == name:
            raise NFQError(f"the model has no layer for the packed weight {name!r}")
        kind = next((packed for stock, packed in PACKED_KINDS.items() if isinstance(layer, stock)), None)
        if kind is None or isinstance(layer, PackedLayer):
            raise NFQError(
                f"the packed weight {name!r} needs a Linear, Conv2d or Embedding layer, the model has "
                f"{type(layer).__name__}"
            )
        if layer.weight.shape != tensor.shape:
            raise NFQError(
                f"the packed weight {name!r} has shape {tuple(tensor.shape)}, the model's layer wants "
                f"{tuple(layer.weight.shape)}"
            )
        replacements[path] = kind(layer, tensor).train(layer.training)
    for path, layer in replacements.items():
        _replace(model, path, layer)


def assign_state(model: nn.Module, state: Mapping[str, NFTensor | torch.Tensor]) -> None:
    """Set all tensors of a model: packed weights as packed layers, see `pack_layers`, others as parameters and buffers.

    Tensors are shared, not copied or converted. The model may be on torch's meta device.

    Args:
        model: changed in place, unless an error is raised.
        state: every tensor by its name in the model's state dict.

    Raises:
        NFQError: a tensor is missing, unexpected or of another shape, or a packed one has no layer of these kinds.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in {**shapes, **given}:
        if given.get(name) != shapes.get(name):
            has, wants = (each.get(name, "nothing") for each in (given, shapes))
            raise NFQError(f"tensor {name!r}: the model wants {wants}, the state has {has}")
    pack_layers(model, {name: tensor for name, tensor in state.items() if isinstance(tensor, NFTensor)})
    kept = {name: tensor for name, tensor in state.items() if not isinstance(tensor, NFTensor)}
    model.load_state_dict(kept, strict=False, assign=True)


def dense_layers(model: nn.Module, dtype: torch.dtype | None = torch.float16) -> None:
    """Replace a model's packed layers by stock layers, with their low-rank changes merged.

    Args:
        model: changed in place.
        dtype: dtype of the dequantised weights; None: each layer's `compute_dtype`.
    """
    for path, layer in packed_layers(model).items():
        _replace(model, path, layer.dense(dtype or layer.compute_dtype))


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
