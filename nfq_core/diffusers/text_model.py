"""transformers' text encoders with packed layers: what differs from the stock models, and how a model becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..layers.packed_layers import PackedLayer
from ..layers.packing import packed_layers
from .packed_base import (
    PackedBase,
    SavedFiles,
    lora_error,
    mark_quantized,
    packed_class,
    restore_layers,
    stock_class,
)
from .patches import wrap_textual_inversion
from .saving import refuse_adapters, refuse_offloaded
from .text_names import name_in_file, tied_names

CLASSES = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}
"""The model classes that can be packed, by name."""


class PackedTextEncoder(PackedBase):
    """Base class of packed text encoders; see `packed_class`."""

    @property
    def _files(self) -> SavedFiles:
        return SavedFiles(CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)

    def _config_and_tensors(self) -> tuple[str, dict[str, Any]]:
        refuse_offloaded(self)
        state, layers = self.state_dict(), packed_layers(self)
        refuse_adapters(state, self)
        state |= {f"{name}.weight": layer.packed for name, layer in layers.items()}
        for name in tied_names(state):
            state.pop(name)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        return self.config.to_json_string(), {name_in_file(name): tensor for name, tensor in state.items()}

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            NFQError: the adapter needs the dense weights.
        """
        if kwargs.get("peft_config") is not None:
            self.check_adapter(kwargs["peft_config"])
        error = lora_error(kwargs.get("adapter_state_dict") or ())
        if error is not None:
            raise error
        with self._records_of_adapters():
            return super().load_adapter(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As transformers'; the table of tokens is dequantised."""
        self.unpack_tokens()
        return super().resize_token_embeddings(*args, **kwargs)

    def unpack_tokens(self) -> None:
        """Dequantise the table of token embeddings, so that rows can be added and changed."""
        layer = self.get_input_embeddings()
        if isinstance(layer, PackedLayer):
            self.set_input_embeddings(layer.dense(layer.compute_dtype))
            self.tie_weights()


class _FeedForward:
    """T5's feed-forward layer, which casts to the dtype in which `wo` computes.

    The stock one casts to the dtype of `wo.weight`, which is uint8 if it is packed.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As transformers', shape (…, width)."""
        if isinstance(self, T5DenseGatedActDense):
            hidden_states = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            hidden_states = self.act(self.wi(hidden_states))
        # A LoRA wraps the packed layer.
        layer = getattr(self.wo, "base_layer", self.wo)
        return self.wo(self.dropout(hidden_states).to(layer.compute_dtype))


class PackedT5DenseActDense(_FeedForward, T5DenseActDense):
    """The feed-forward layer of T5 1.0."""


class PackedT5DenseGatedActDense(_FeedForward, T5DenseGatedActDense):
    """The feed-forward layer of T5 1.1."""


_FEED_FORWARD = {T5DenseActDense: PackedT5DenseActDense, T5DenseGatedActDense: PackedT5DenseGatedActDense}


def make_packed_text_encoder(model: nn.Module, quantizer: Any) -> nn.Module:
    """Finish a text encoder whose layers were packed: set its class, and transformers' attributes of a quantised model.

    Args:
        model: the model, which is changed.
        quantizer: an `NFQTextQuantizer`; the settings in its `facts` go into the model's config.

    Returns:
        The same model.
    """
    wrap_textual_inversion()
    # Before the class changes, for tying may go through all modules.
    model.tie_weights()
    model.__class__ = packed_class(type(model), PackedTextEncoder)
    for module in list(model.modules()):
        if isinstance(getattr(module, "wo", None), PackedLayer):
            module.__class__ = _FEED_FORWARD.get(type(module), type(module))
    model.config.quantization_config = mark_quantized(model, quantizer)
    return model


def make_stock_text_encoder(model: nn.Module) -> nn.Module:
    """Restore stock layers and the stock class, with weights and fused LoRAs dequantised to the dtype they compute in.

    Returns:
        The same model; transformers removes its quantiser.

    Raises:
        NFQError: weights are offloaded.
    """
    restore_layers(model, None)
    for module in list(model.modules()):
        if isinstance(module, _FeedForward):
            module.__class__ = type(module).__mro__[2]
    model.__class__ = stock_class(type(model))
    model.tie_weights()
    return model


def shapes_of(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a stock model's tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor or layer in a stock model that is loaded in `dtype`: T5's `wo` stays in fp32 in fp16."""
    in_fp32 = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    return torch.float32 if in_fp32.intersection(name.split(".")) else dtype
