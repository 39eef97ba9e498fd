"""PEFT's adapters beside packed layers: LoRAs are fused without changing the weight, what cannot work is refused."""

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
from .patches import watch_adapters

WORKING = ("lora", "ia3", "oft", "boft")
"""PEFT's methods that can do without the dense weight; whether they do beside a given layer is tried (`adopt`)."""

_VARIANTS = {"use_dora": "DoRA", "kasa_config": "KaSA"}
"""Settings of LoRAs that read the dense weight."""

_INITIALISATIONS = (True, False, "gaussian", "eva")
"""What `init_lora_weights` may be without reading the dense weight."""

_READING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""How those begin that read it."""


class _Merging:
    """Adds plain LoRAs to what a packed layer dequantises, see `PackedLayer.low_rank`."""

    fused: tuple[tuple[str | None, int], ...] = ()
    """Name and rank of each fused adapter, as they end `low_rank`; the name is None once the adapter was deleted."""

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """See PEFT. The factors take the dtype that the layer computes in."""
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
        """See PEFT: what was fused before these adapters stays, and so does an adapter that was deleted since."""
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
        """See PEFT: where the adapter is fused, it stays so for good."""
        self.fused = tuple((None if name == adapter_name else name, rank) for name, rank in self.fused)
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
        super().delete_adapter(adapter_name)


class MergingLinear(_Merging, Linear):
    """PEFT's LoRA beside a `PackedLinear`."""


class MergingConv2d(_Merging, Conv2d):
    """PEFT's LoRA beside a `PackedConv2d`."""


class _Separate:
    """An adapter that works beside a packed layer and cannot be merged into it."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """NFQError: only plain LoRAs can be merged."""
        raise NFQError(
            f"adapters of kind {_method(self).upper()} cannot be merged into packed weights; leave them unmerged, or "
            "dequantize() the model first"
        )


MERGING = {Linear: MergingLinear, Conv2d: MergingConv2d}


def adopt(model: nn.Module) -> None:
    """Have the adapters beside a model's packed layers merge and unmerge without touching packed weights.

    Args:
        model: is changed: the classes of its adapters.

    Raises:
        NFQError: one of them needs the dense weights; its adapter is taken away from the whole model.
    """
    watch_adapters(refusal)
    added = [found for found in _beside_packed(model) if not isinstance(found[1], (_Merging, _Separate))]
    tried: dict[tuple, bool] = {}
    for name, module in added:
        key = (type(module), type(module.get_base_layer()), getattr(module, "is_feedforward", False))
        if key not in tried:
            tried[key] = _method(module) in WORKING and (type(module) in MERGING or _runs(module))
        if not tried[key]:
            _take_away(model, module._get_available_adapters())
            raise needs_dense(f"{_method(module).upper()} beside {name!r}")
    for _, module in added:
        module.__class__ = MERGING.get(type(module)) or _separate(type(module))


def abandon(model: nn.Module) -> None:
    """Undo `adopt`, for a model whose layers were dequantised: from now on PEFT merges into their weights."""
    for module in model.modules():
        if isinstance(module, (_Merging, _Separate)):
            module.__class__ = type(module).__mro__[2]


def let_merge(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """See that the adapters beside a model's packed layers can be merged.

    Args:
        model: is left as it is.
        adapter_names: those that are going to be merged; by default the active ones.

    Raises:
        NFQError: one of them is no plain LoRA.
    """
    adopt(model)
    for _, module in _beside_packed(model):
        if isinstance(module, _Separate):
            module.merge()
        _check_plain(module, adapter_names or module.active_adapters)


def refusal(config: Any) -> NFQError | None:
    """Why adapters of a PEFT configuration cannot be put beside any packed layer; None where they may."""
    kind = str(getattr(getattr(config, "peft_type", ""), "value", ""))
    variant = next((name for setting, name in _VARIANTS.items() if getattr(config, setting, None)), None)
    if variant is not None or (kind and kind.lower() not in WORKING):
        return needs_dense(variant or kind)
    start = getattr(config, "init_lora_weights", True)
    lower = start.lower() if isinstance(start, str) else start
    if lower in _INITIALISATIONS:
        return None
    if str(lower).startswith(_READING):
        return needs_dense(f"init_lora_weights={start!r}")
    reason = "is not known to work beside packed weights"
    if lower == "orthogonal":
        reason = "takes its dtype from the weights, and packed weights are uint8"
    return NFQError(f"init_lora_weights={start!r} {reason}; choose True, False, 'gaussian' or 'eva'")


def _beside_packed(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in nn.Module.named_modules(model):
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLayer):
            yield name, module


def _runs(module: BaseTunerLayer) -> bool:
    """Whether an adapter computes something beside its packed layer; it is tried without memory, on the meta device."""
    # Which versions of PEFT read the weight differs by method and kind of layer. Hooks of offloading are left out.
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


def _take_away(model: nn.Module, adapters: Sequence[str]) -> None:
    """Remove adapters, and their layers where no other adapter is left."""
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
            raise NFQError(f"adapter {adapter!r} is no plain LoRA (DoRA, or a bias), which cannot be fused here")


def _method(module: BaseTunerLayer) -> str:
    """PEFT's name of an adapter's method: the package, such as "lora", that its class is of."""
    classes = (kind.__module__.split(".") for kind in type(module).__mro__)
    return next((parts[2] for parts in classes if parts[:2] == ["peft", "tuners"] and len(parts) > 2), "unknown")


@lru_cache
def _separate(kind: type) -> type:
    return type(kind.__name__, (_Separate, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
