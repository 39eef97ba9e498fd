"""Layers of the host whose weight may be packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..nfq_core.packed.op import dequantize_for_one_use, dequantize_rows
from .packed_tensor import is_packed, unwrap, wrap


class NFLayer:
    """Base of our Linear, Conv2d and Embedding, whose weight may be packed.

    The weight is created without memory. `load_state_dict` assigns a packed weight directly and allocates memory only
    for a dense one.
    """

    comfy_cast_weights = True
    is_filled = False
    """Whether a state dict had the weight."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "weight")
        shown = self.weight.dtype
        self.is_filled = self.is_filled or loaded is not None
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

    def fill_missing(self) -> None:
        """Make a weight that no state dict had zero."""
        if self.weight.is_meta:
            self.weight = _parameter(torch.zeros(self.weight.shape, dtype=self.weight.dtype, device=self.dense_device))

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
    if getattr(layer, "bias", None) is not None:
        layer.bias = _parameter(torch.empty(layer.bias.shape, dtype=layer.bias.dtype, device=device))


class NFOps(comfy.ops.manual_cast):
    """The host's set of operations, with a Linear, a Conv2d and an Embedding that accept packed weights."""

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

    class Embedding(NFLayer, comfy.ops.manual_cast.Embedding):
        """`torch.nn.Embedding` whose weight may be packed; a call decodes only its rows, on the weight's device."""

        bias = None

        def __init__(
            self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device=None, dtype=None
        ) -> None:
            torch.nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, device="meta", dtype=dtype)
            _without_weight(self, device)

        def forward(self, ids: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            """Look up rows as the stock layer does; patches are applied to the whole dequantised weight."""
            if not is_packed(self.weight):
                return comfy.ops.manual_cast.Embedding.forward(self, ids, out_dtype=out_dtype)
            comfy.ops.run_every_op()
            data, params = self.weight._qdata, self.weight._params
            rows = ids.reshape(-1).to(data.device)
            if self.weight_function:
                found = self._dense(torch.float32)[0].index_select(0, rows)
            else:
                found = dequantize_rows(data, params.format.id, params.orig_shape, rows, params.orig_dtype)
            dtype = out_dtype or params.orig_dtype
            return found.view(*ids.shape, self.embedding_dim).to(device=ids.device, dtype=dtype)
