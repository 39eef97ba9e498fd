"""Linear and Conv2d layers with packed weights, which are dequantised on each forward call.

The packed buffer is the layer's parameter `weight`, uint8, so that moving, copying and saving a model include it. Casts
to another dtype do not change it. It has as many dimensions as the stock layer's weight, by which PEFT distinguishes
layers; all but the last have size 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import NFQError
from ..packed.formats import format_by_id
from ..packed.op import dequantize, dequantize_for_one_use
from ..packed.tensor import NFTensor
from .low_rank import LowRank

CANNOT_TRAIN = "packed weights cannot be trained; train a LoRA instead, or dequantize the model first"
CANNOT_SCRIPT = (
    "torch.jit cannot record packed layers; use torch.export or torch.compile, or dequantize the model first"
)


def needs_dense(what: str) -> NFQError:
    """The error for a feature that needs dense weights.

    Args:
        what: the feature, as the subject of the message.
    """
    return NFQError(
        f"{what} needs dense weights, and these are packed; dequantize the model first, or use a plain LoRA"
    )


class _LayerState(dict):
    """A packed layer's entry in a state dict's metadata, which stops other kinds of layers from loading its weight.

    `torch.nn.Module._load_from_state_dict` reads `assign_to_params_buffers` from the entry before any tensor.
    """

    def __init__(self, name: str, entry: Mapping[str, Any]) -> None:
        super().__init__(entry)
        self._name = name

    def get(self, key: str, default: Any = None) -> Any:
        if key == "assign_to_params_buffers":
            raise NFQError(
                f"the packed weight {self._name!r} cannot be copied into a layer that is not packed; copy from a "
                "dequantized copy of the model"
            )
        return super().get(key, default)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # torch.load(weights_only=True) accepts only known classes.
        return OrderedDict, (), None, None, iter(self.items())


class PackedLayer:
    """Base of all kinds of layers: a packed weight, and low-rank changes that are added after dequantising.

    State dicts do not include the changes.
    """

    def _set_packed_weight(self, tensor: NFTensor, layer: nn.Linear | nn.Conv2d | nn.Embedding) -> None:
        self.compute_dtype = tensor.dtype if layer.weight.is_meta else layer.weight.dtype
        """The dtype in which the layer computes, as far as known; PEFT creates its factors in it."""
        self.format_id = tensor.format.id
        self.weight_shape = tuple(tensor.shape)
        self.weight_dtype = tensor.dtype
        data = tensor.data.view(*[1] * (len(tensor.shape) - 1), -1)
        self.weight = nn.Parameter(data, requires_grad=False)
        if not isinstance(layer, nn.Embedding):
            self.bias = layer.bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """As in torch, but casts change only `compute_dtype`, not the packed weight's bytes."""

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if tensor.dtype == torch.uint8 and result.dtype != torch.uint8:
                return tensor.to(result.device)
            return result

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(apply, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """As in torch, but packed weights cannot be trained.

        Raises:
            NFQError: `requires_grad` is true.
        """
        if requires_grad:
            raise NFQError(CANNOT_TRAIN)
        return super().requires_grad_(False)

    @property
    def W_q(self) -> nn.Parameter:
        """The packed weight, under the name (from HQQ) by which PEFT recognises that it must call `dequantize`."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """Always raises NFQError: PEFT calls it for adapters that need dense weights; see `dense_weight`."""
        raise needs_dense(f"what calls {type(self).__name__}.dequantize(), such as DoRA,")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            path = prefix.removesuffix(".")
            metadata[path] = _LayerState(f"{prefix}weight", metadata.get(path, {}))

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, local_metadata: Mapping, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, dict(local_metadata), *others)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NFQError(CANNOT_SCRIPT)

    @property
    def buffer(self) -> torch.Tensor:
        """The packed buffer, uint8, 1-D."""
        return self.weight.view(-1)

    @property
    def packed(self) -> NFTensor:
        """The packed weight, sharing its buffer."""
        return NFTensor(self.buffer.data, format_by_id(self.format_id), self.weight_shape, self.weight_dtype)

    @property
    def low_rank(self) -> LowRank | None:
        """The change that is added to the weight, in the dtype and on the device of the layer's input; None: none."""
        up = getattr(self, "up", None)
        return None if up is None else LowRank(up, self.down)

    @low_rank.setter
    def low_rank(self, change: LowRank | None) -> None:
        rows, columns = self.weight_shape[0], prod(self.weight_shape[1:])
        if change is not None and (change.up.shape[0], change.down.shape[1]) != (rows, columns):
            raise NFQError(
                f"a low-rank change of {change.up.shape[0]} × {change.down.shape[1]} does not fit a weight of shape "
                f"{self.weight_shape}, which is {rows} × {columns}"
            )
        # Buffers set to None would still exist, and accelerate would try to move them.
        for name in ("up", "down"):
            if change is not None:
                self.register_buffer(name, getattr(change, name), persistent=False)
            elif hasattr(self, name):
                delattr(self, name)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight in `dtype`, low-rank changes included, as a new tensor."""
        weight = dequantize(self.buffer, self.format_id, self.weight_shape, dtype)
        return self._with_low_rank(weight, self.low_rank)

    def _forward_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """`dense_weight` in memory that later forward calls may reuse."""
        change = self.low_rank
        if change is not None and change.up.dtype != dtype and _is_autocast(change.up.device.type):
            # autocast then casts the sum, as it casts a stock layer's weight.
            dtype = change.up.dtype
        if torch.jit.is_tracing():
            raise NFQError(CANNOT_SCRIPT)
        weight = dequantize_for_one_use(self.buffer, self.format_id, self.weight_shape, dtype)
        return self._with_low_rank(weight, change)

    def _with_low_rank(self, weight: torch.Tensor, change: LowRank | None) -> torch.Tensor:
        """Add a change to a weight in place, if there is one; NFQError if their dtypes or devices do not match."""
        if change is None:
            return weight
        other_device, other_dtype = change.up.device != weight.device, change.up.dtype != weight.dtype
        if other_device or (other_dtype and not _is_autocast(weight.device.type)):
            raise NFQError(
                f"the low-rank change is {change.up.dtype} on {change.up.device}, the layer computes in "
                f"{weight.dtype} on {weight.device}; create it again for these"
            )
        return change.add_to(weight)

    def extra_repr(self) -> str:
        """The stock layer's text, and the format."""
        return f"{super().extra_repr()}, format={self.format_id}"


class PackedLinear(PackedLayer, nn.Linear):
    """`torch.nn.Linear` with a packed weight; replaces `layer` and shares its bias."""

    def __init__(self, layer: nn.Linear, tensor: NFTensor) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self._set_packed_weight(tensor, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, with the weight dequantised to the dtype of `x`."""
        return nn.functional.linear(x, self._forward_weight(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The stock layer with the weight in `dtype`, changes included."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return with_dense_weight(layer, self, dtype)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """`torch.nn.Conv2d` with a packed weight; replaces `layer` and shares its bias."""

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Conv2d:
        """Return a stock layer if called with a stock layer's arguments.

        PEFT creates the two factors of a LoRA by calling the class of the convolution to which it adds them.
        """
        if args and isinstance(args[0], int):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, layer: nn.Conv2d, tensor: NFTensor) -> None:
        super().__init__(**_settings(layer))
        self._set_packed_weight(tensor, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the convolution, with the weight dequantised to the dtype of `x`."""
        return self._conv_forward(x, self._forward_weight(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Conv2d:
        """The stock layer with the weight in `dtype`, changes included."""
        return with_dense_weight(nn.Conv2d(**_settings(self)), self, dtype)


def _is_autocast(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def _settings(layer: nn.Conv2d) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": False, "device": "meta"}


def with_dense_weight(layer: nn.Module, packed: PackedLayer, dtype: torch.dtype) -> nn.Module:
    """Give a stock layer the dequantised weight and the bias of a packed one, and return it."""
    layer.weight = nn.Parameter(packed.dense_weight(dtype), requires_grad=False)
    if not isinstance(layer, nn.Embedding):
        layer.bias = packed.bias
    return layer.train(packed.training)
