"""Layers with a packed weight in the host's own tensor type for quantised weights.

The host casts, moves, pins and counts comfy-kitchen's `QuantizedTensor`. `NFLayout` adds our block formats to it. The
packed buffer, which includes the scales, is the tensor's only data, so the host counts every byte.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from ..nfq_core import NFTensor
from ..nfq_core.packed.layout import BlockFormat
from ..nfq_core.packed.op import dequantize, dequantize_for_one_use

LAYOUT = f"{__name__}.NFLayout"
"""The name of `NFLayout` in comfy-kitchen's registry; each copy of the plugin has its own."""


@dataclass(frozen=True)
class NFParams(BaseLayoutParams):
    """Everything about a packed weight except its buffer.

    `orig_dtype` is the dtype that the host sees; `source_dtype` is the dtype before quantising.
    """

    scale: None
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    format: BlockFormat
    source_dtype: torch.dtype

    def _tensor_fields(self) -> list[str]:
        return []


class NFLayout(QuantizedLayout):
    """Our block formats as a layout of comfy-kitchen."""

    Params = NFParams

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, NFParams]:
        """Not supported: a patched weight would lose its patch if it were quantised again."""
        raise NotImplementedError("NFQ weights are never quantised again by the host")

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: NFParams) -> torch.Tensor:
        """Dequantise to `params.orig_dtype` and `params.orig_shape`."""
        return dequantize(qdata, params.format.id, params.orig_shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """The packed buffer."""
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: NFParams) -> dict[str, torch.Tensor]:
        """The packed buffer under the weight's own name."""
        return {"": qdata}


register_layout_class(LAYOUT, NFLayout)


def wrap(packed: NFTensor, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """Wrap a packed weight in the host's tensor type.

    Args:
        packed: the packed weight.
        dtype: the dtype that the host sees; by default, and instead of fp8, the dtype before quantising.
    """
    shown = packed.dtype if dtype is None or dtype.itemsize == 1 else dtype
    params = NFParams(None, shown, tuple(packed.shape), packed.format, packed.dtype)
    return QuantizedTensor(packed.data, LAYOUT, params)


def is_packed(weight: object) -> bool:
    """Whether a weight is packed by this plugin."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


def unwrap(weight: QuantizedTensor) -> NFTensor:
    """Undo `wrap`; the result shares the buffer."""
    params = weight._params
    return NFTensor(weight._qdata, params.format, params.orig_shape, params.source_dtype)


class NFLayer:
    """Base of our Linear and Conv2d, whose weight may be packed.

    The weight is created without memory. `load_state_dict` assigns a packed weight directly and allocates memory only
    for a dense one.
    """

    comfy_cast_weights = True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "weight")
        shown = self.weight.dtype
        if is_packed(loaded) and loaded.shape == self.weight.shape:
            others = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
            super()._load_from_state_dict(others, prefix, *args)
            missing_keys = args[2]
            missing_keys.remove(prefix + "weight")
            self.weight = _parameter(wrap(unwrap(loaded), shown))
            return
        if loaded is not None and self.weight.is_meta:
            self.weight = _parameter(torch.empty(self.weight.shape, dtype=shown, device=self.dense_device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable, recurse: bool = True) -> NFLayer:
        """Move or cast the parameters by replacing them: torch would assign to `data`, which keeps a packed weight."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is not None and not parameter.is_meta:
                self._parameters[name] = _parameter(fn(parameter))
        return self

    def __deepcopy__(self, memo: dict) -> NFLayer:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        if is_packed(self.weight):
            memo[id(self.weight)] = _parameter(self.weight.clone())
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Return a dense weight for the host's own arithmetic, such as merging models."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Dequantise the weight, apply its patches, and compute as the stock layer does."""
        comfy.ops.run_every_op()
        if self._is_on_device_of(x):
            return self.compute(x, *self._dense(x.dtype))
        weight, bias, offloaded = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        result = self.compute(x, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, offloaded)
        return result

    def _is_on_device_of(self, x: torch.Tensor) -> bool:
        """Whether the packed weight and the bias are on the device of `x`, so the host has nothing to move."""
        bias = self.bias
        return (
            is_packed(self.weight)
            and self.weight._qdata.device == x.device
            and (bias is None or bias.device == x.device)
            and not isinstance(x, QuantizedTensor)
        )

    def _dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Patched weight and bias for one use."""
        params = self.weight._params
        weight = dequantize_for_one_use(self.weight._qdata, params.format.id, params.orig_shape, dtype)
        for function in self.weight_function:
            weight = function(weight)
        bias = self.bias
        if bias is not None:
            bias = bias.to(dtype=dtype, copy=bool(self.bias_function))
            for function in self.bias_function:
                bias = function(bias)
        return weight, bias


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _without_weight(layer: NFLayer, device: torch.device | str | None) -> None:
    layer.dense_device = device
    if layer.bias is not None:
        layer.bias = _parameter(torch.empty(layer.bias.shape, dtype=layer.bias.dtype, device=device))


class NFOps(comfy.ops.manual_cast):
    """The host's set of operations, with a Linear and a Conv2d that accept packed weights."""

    class Linear(NFLayer, comfy.ops.manual_cast.Linear):
        """`torch.nn.Linear` whose weight may be packed."""

        def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
            torch.nn.Linear.__init__(self, in_features, out_features, bias, device="meta", dtype=dtype)
            _without_weight(self, device)

        def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            """Compute the layer with a dense weight."""
            return torch.nn.functional.linear(x, weight, bias)

    class Conv2d(NFLayer, comfy.ops.manual_cast.Conv2d):
        """`torch.nn.Conv2d` whose weight may be packed."""

        def __init__(self, *args: Any, device=None, **kwargs: Any) -> None:
            torch.nn.Conv2d.__init__(self, *args, device="meta", **kwargs)
            _without_weight(self, device)

        def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            """Compute the layer with a dense weight."""
            return self._conv_forward(x, weight, bias)
