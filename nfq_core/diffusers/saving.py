"""The tensors that `save_pretrained` of a packed model writes, and when it refuses to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.utils import is_accelerate_available
from torch import nn

from ..errors import NFQError
from ..layers.packed_layers import PackedLayer
from ..layers.packing import packed_layers


def saved_tensors(model: nn.Module, stock: type) -> dict[str, Any]:
    """The tensors of a packed model's file, by name.

    Args:
        model: the packed model.
        stock: its stock class.

    Raises:
        NFQError: the file would lose something, or `from_pretrained` could not load it.
    """
    refuse_offloaded(model)
    state, layers = model.state_dict(), packed_layers(model)
    refuse_adapters(state, model)
    _check_config(model, stock, {name: tuple(tensor.shape) for name, tensor in state.items()}, layers)
    return state | {f"{name}.weight": layer.packed for name, layer in layers.items()}


def _check_config(
    model: nn.Module, stock: type, shapes: dict[str, tuple[int, ...]], layers: Mapping[str, PackedLayer]
) -> None:
    """Raise NFQError if `from_pretrained` would build another model from the config."""
    shapes |= {f"{name}.weight": layer.weight_shape for name, layer in layers.items()}
    if any("image_projection_layers" in name or "_ip." in name for name in shapes):
        raise NFQError(
            "an IP-Adapter is loaded, which a packed model's file cannot store; the pipeline's unload_ip_adapter() "
            "removes it"
        )
    config = dict(model.config)
    config.pop("quantization_config")
    with without_allocation():
        try:
            described = {name: tuple(tensor.shape) for name, tensor in stock.from_config(config).state_dict().items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise NFQError(f"from_pretrained could not build this model from its config: {reason}") from None
    different = next((name for name in {**shapes, **described} if shapes.get(name) != described.get(name)), None)
    if different is not None:
        has, wants = (each.get(different, "nothing") for each in (shapes, described))
        raise NFQError(
            f"from_pretrained could not load this model: {different!r} is {wants} in its config, {has} in the model; "
            "undo the changes made since it was loaded"
        )


def without_allocation() -> AbstractContextManager:
    """Models built inside this `with` block allocate no weights; with accelerate, what they compute is on the CPU."""
    if not is_accelerate_available():
        return torch.device("meta")
    from accelerate import init_empty_weights

    return init_empty_weights()


def refuse_adapters(state: Iterable[str], model: nn.Module) -> None:
    """Raise NFQError if a model has LoRAs, attached or fused.

    Args:
        state: names in its state dict.
        model: the model.
    """
    if any(".base_layer." in name for name in state):
        fused = any(getattr(module, "merged_adapters", None) for module in model.modules())
        raise NFQError(
            f"LoRAs are attached, which a packed model's file cannot store; {'unfuse_lora() and ' if fused else ''}"
            f"unload_lora_weights() {'remove' if fused else 'removes'} them, save_lora_adapter() saves them"
        )
    fused = next((name for name, layer in packed_layers(model).items() if layer.low_rank is not None), None)
    if fused is not None:
        raise NFQError(
            f"a LoRA is fused into {fused!r} permanently, which a packed model's file cannot store; dequantize() makes "
            "a stock model of both, or load the model again without the LoRA"
        )


def refuse_offloaded(model: nn.Module) -> None:
    """Raise NFQError if weights of a model are offloaded."""
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise NFQError(f"{offloaded!r} is offloaded; call the pipeline's remove_all_hooks() first")
