"""PEFT's adapters on packed layers: LoRAs are fused without re-quantising, unsupported adapters are refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from ..errors import NFQError
from ..layers.low_rank import LowRank
from ..layers.packed_layers import PackedConv2d, PackedLayer, needs_dense
from .patches import wrap_adapter_creation

SUPPORTED_METHODS = ("lora", "ia3", "oft", "boft")
"""PEFT's methods that can work without the dense weight; `convert_adapters` tries whether they do on each layer."""

_VARIANTS = {"use_dora": "DoRA", "kasa_config": "KaSA"}
"""Settings of LoRAs that read the dense weight."""

_INITIALISATIONS = (True, False, "gaussian", "eva")
"""Values of `init_lora_weights` that do not read the dense weight."""

_READING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Prefixes of values of `init_lora_weights` that read it."""


class _Merging:
    """Fuses plain LoRAs into a packed layer as low-rank factors, see `PackedLayer.low_rank`."""

    fused: tuple[tuple[str | None, int], ...] = ()
    """Name and rank of each fused adapter, in the order of `low_rank`'s last columns; name None: deleted since."""

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """See PEFT. The factors get the layer's compute dtype."""
        layer = self.get_base_layer()
        added = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        _check_plain(self, added)
        if not added:
            return
        parts = [] if layer.low_rank is None else [(layer.low_rank.up, layer.low_rank.down, 1.0)]
        for name in added:
            parts.append((self.lora_B[name].weight.detach(), self.lora_A[name].weight.detach(), self.scaling[name]))
        change = LowRank.sum(parts, device=layer.weight.device, dtype=layer.compute_dtype)
        if safe_merge and not (change.up.isfinite().all() and change.down.isfinite().all()):
            raise NFQError(f"adapters {', '.join(added)} hold NaN or Inf, or numbers beyond {layer.compute_dtype}")
        layer.low_rank = change
        self.merged_adapters.extend(added)
        self.fused += tuple((name, self.lora_A[name].weight.shape[0]) for name in added)

    def unmerge(self) -> None:
        """See PEFT. Factors fused before these adapters stay, and so do those of adapters that were deleted since."""
        layer = self.get_base_layer()
        if layer.low_rank is not None:
            start = layer.low_rank.up.shape[1] - sum(rank for _, rank in self.fused)
            kept = [*range(start)]
            for name, rank in self.fused:
                if name is None:
                    kept += range(start, start + rank)
                start += rank
            up, down = layer.low_rank.up[:, kept], layer.low_rank.down[kept]
            layer.low_rank = LowRank(up.contiguous(), down.contiguous()) if kept else None
        self.fused = ()
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT. If the adapter is fused, its factors stay."""
        self.fused = tuple((None if name == adapter_name else name, rank) for name, rank in self.fused)
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
        super().delete_adapter(adapter_name)


class MergingLinear(_Merging, Linear):
    """PEFT's LoRA on a `PackedLinear`."""


class MergingConv2d(_Merging, Conv2d):
    """PEFT's LoRA on a `PackedConv2d`."""


class _Unmergeable:
    """An adapter that works on a packed layer but cannot be merged into it."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise NFQError: only plain LoRAs can be merged."""
        raise NFQError(
            f"adapters of kind {_method(self).upper()} cannot be merged into packed weights; leave them unmerged, or "
            "dequantize() the model first"
        )


MERGING = {Linear: MergingLinear, Conv2d: MergingConv2d}


def convert_adapters(model: nn.Module) -> None:
    """Change the classes of the adapters on packed layers so that merging leaves packed weights unchanged.

    Args:
        model: the model; the classes of its adapters are changed.

    Raises:
        NFQError: an adapter needs the dense weights; it is then removed from the whole model.
    """
    wrap_adapter_creation(adapter_error)
    added = [pair for pair in _adapters_on_packed(model) if not isinstance(pair[1], (_Merging, _Unmergeable))]
    works: dict[tuple, bool] = {}
    for name, module in added:
        key = (type(module), type(module.get_base_layer()), getattr(module, "is_feedforward", False))
        if key not in works:
            works[key] = _method(module) in SUPPORTED_METHODS and (type(module) in MERGING or _runs(module))
        if not works[key]:
            _remove_adapters(model, module._get_available_adapters())
            raise needs_dense(f"{_method(module).upper()} on {name!r}")
    for _, module in added:
        module.__class__ = MERGING.get(type(module)) or _unmergeable_class(type(module))


def restore_adapters(model: nn.Module) -> None:
    """Undo `convert_adapters` for a model whose layers were dequantised, so that PEFT merges into their weights."""
    for module in model.modules():
        if isinstance(module, (_Merging, _Unmergeable)):
            module.__class__ = type(module).__mro__[2]


def check_mergeable(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Check that the adapters on a model's packed layers can be merged.

    Args:
        model: the model.
        adapter_names: the adapters to merge; by default the active ones.

    Raises:
        NFQError: an adapter is not a plain LoRA.
    """
    convert_adapters(model)
    for _, module in _adapters_on_packed(model):
        if isinstance(module, _Unmergeable):
            module.merge()
        _check_plain(module, adapter_names or module.active_adapters)


def adapter_error(config: Any) -> NFQError | None:
    """The error for a PEFT configuration whose adapters cannot work on any packed layer; None if they may."""
    kind = str(getattr(getattr(config, "peft_type", ""), "value", ""))
    variant = next((name for setting, name in _VARIANTS.items() if getattr(config, setting, None)), None)
    if variant is not None or (kind and kind.lower() not in SUPPORTED_METHODS):
        return needs_dense(variant or kind)
    start = getattr(config, "init_lora_weights", True)
    lower = start.lower() if isinstance(start, str) else start
    if lower in _INITIALISATIONS:
        return None
    if str(lower).startswith(_READING_INITIALISATIONS):
        return needs_dense(f"init_lora_weights={start!r}")
    reason = "is not known to work with packed weights"
    if lower == "orthogonal":
        reason = "takes its dtype from the weights, and packed weights are uint8"
    return NFQError(f"init_lora_weights={start!r} {reason}; choose True, False, 'gaussian' or 'eva'")


def _adapters_on_packed(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Name and module of every adapter on a packed layer."""
    for name, module in nn.Module.named_modules(model):
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLayer):
            yield name, module


def _runs(module: BaseTunerLayer) -> bool:
    """Whether an adapter's forward pass works on its packed layer, tried on the meta device without memory."""
    # Whether PEFT reads the weight depends on its version, the method and the layer. Offload hooks are left out.
    layer, module = copy.copy(module.get_base_layer()), copy.copy(module)
    layer.__dict__.pop("forward", None)
    module._modules = {**module._modules, "base_layer": layer}
    tensors = {name: t.to("meta") for name, t in chain(module.named_parameters(), module.named_buffers())}
    convolution = isinstance(layer, PackedConv2d)
    shape = (1, layer.in_channels, 64, 64) if convolution else (1, layer.in_features)
    x = torch.empty(shape, dtype=layer.compute_dtype, device="meta")
    try:
        with torch.no_grad():
            result = functional_call(module, tensors, (x,))
        return result.dtype == x.dtype and result.shape[1] == layer.weight_shape[0]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def _remove_adapters(model: nn.Module, adapters: Sequence[str]) -> None:
    """Remove adapters, and PEFT's layers that have no other adapter."""
    for name, module in list(nn.Module.named_modules(model)):
        if not isinstance(module, BaseTunerLayer):
            continue
        for adapter in set(adapters).intersection(module._get_available_adapters()):
            module.delete_adapter(adapter)
        if not module._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def _check_plain(module: BaseTunerLayer, adapters: Sequence[str]) -> None:
    for adapter in adapters:
        if adapter in getattr(module, "lora_variant", {}) or getattr(module, "lora_bias", {}).get(adapter):
            raise NFQError(
                f"adapter {adapter!r} is not a plain LoRA (it has DoRA or a bias), so it cannot be fused into packed "
                "weights; leave it unfused"
            )


def _method(module: BaseTunerLayer) -> str:
    """PEFT's name of an adapter's method, which is the package of its class, such as "lora"."""
    classes = (kind.__module__.split(".") for kind in type(module).__mro__)
    return next((parts[2] for parts in classes if parts[:2] == ["peft", "tuners"] and len(parts) > 2), "unknown")


@lru_cache
def _unmergeable_class(kind: type) -> type:
    return type(kind.__name__, (_Unmergeable, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
