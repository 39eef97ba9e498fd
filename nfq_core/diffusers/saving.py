"""What `save_pretrained` of a packed model writes, and when it refuses to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.utils import is_accelerate_available
from torch import nn

from ..errors import NFQError
from ..layers.packed_layers import PackedLayer, packed_layers


def saved_tensors(model: nn.Module, stock: type) -> dict[str, Any]:
    """What a packed model's file holds, by name.

    Args:
        model: is left as it is.
        stock: its stock class.

    Raises:
        NFQError: the file would lose something, or `from_pretrained` could not load it.
    """
    refuse_offloaded(model)
    state, layers = model.state_dict(), packed_layers(model)
    if any(".base_layer." in name for name in state):
        fused = any(getattr(module, "merged_adapters", None) for module in model.modules())
        raise NFQError(
            f"LoRAs are attached, which a packed model's file cannot hold; {'unfuse_lora() and ' if fused else ''}"
            f"unload_lora_weights() {'take' if fused else 'takes'} them away, save_lora_adapter() keeps them"
        )
    fused = next((name for name, layer in layers.items() if layer.low_rank is not None), None)
    if fused is not None:
        raise NFQError(
            f"a LoRA is fused into {fused!r} for good, which a packed model's file cannot hold; dequantize() makes a "
            "stock model of both, or load the model again and leave the LoRA out"
        )
    _check_described(model, stock, {name: tuple(tensor.shape) for name, tensor in state.items()}, layers)
    return state | {f"{name}.weight": layer.packed for name, layer in layers.items()}


def _check_described(
    model: nn.Module, stock: type, shapes: dict[str, tuple[int, ...]], layers: Mapping[str, PackedLayer]
) -> None:
    """NFQError where the model that `from_pretrained` would build from the config is another."""
    shapes |= {f"{name}.weight": layer.weight_shape for name, layer in layers.items()}
    if any("image_projection_layers" in name or "_ip." in name for name in shapes):
        raise NFQError(
            "an IP-Adapter is loaded, which a packed model's file cannot hold; the pipeline's unload_ip_adapter() "
            "takes it away"
        )
    config = dict(model.config)
    config.pop("quantization_config")
    with _without_memory():
        try:
            described = {name: tuple(tensor.shape) for name, tensor in stock.from_config(config).state_dict().items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise NFQError(f"from_pretrained could not build this model by its config: {reason}") from None
    unlike = next((name for name in {**shapes, **described} if shapes.get(name) != described.get(name)), None)
    if unlike is not None:
        has, wants = (each.get(unlike, "nothing") for each in (shapes, described))
        raise NFQError(
            f"from_pretrained could not load this model: by its config, {unlike!r} is {wants}, the model has {has}; "
            "undo what was changed since it was loaded"
        )


def _without_memory() -> AbstractContextManager:
    """What is built in it has no weights."""
    if not is_accelerate_available():
        return torch.device("meta")
    from accelerate import init_empty_weights

    return init_empty_weights()


def refuse_offloaded(model: nn.Module) -> None:
    """NFQError where weights of a model are offloaded."""
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise NFQError(f"{away!r} is offloaded; the pipeline's remove_all_hooks() brings it back")
