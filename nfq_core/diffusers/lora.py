"""PEFT's adapters beside packed layers: LoRAs are fused without changing the weight, what cannot work is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..errors import NFQError
from ..layers import PackedLayer
from ..low_rank import LowRank

WORKING = ("lora", "ia3", "oft", "boft")
"""PEFT's methods that need no more of a layer than its output; the others read the dense weight or its shape."""

_INITIALISATIONS = (True, False, "gaussian", "eva")
"""What `init_lora_weights` may be without reading the dense weight."""


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
        NFQError: one of them needs the dense weights; those that do are taken away.
    """
    found = list(_beside_packed(model))
    unfit = [(name, module) for name, module in found if _method(module) not in WORKING]
    for name, module in unfit:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base_layer)
    if unfit:
        kind = _method(unfit[0][1]).upper()
        raise NFQError(f"adapters of kind {kind} need the dense weights; dequantize() the model first, or use a LoRA")
    for _, module in found:
        if not isinstance(module, (_Merging, _Separate)):
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


def check_config(config: Any) -> None:
    """Refuse a PEFT configuration whose adapters need the dense weights.

    Raises:
        NFQError: they do.
    """
    kind = str(getattr(getattr(config, "peft_type", ""), "value", ""))
    start = getattr(config, "init_lora_weights", True)
    if getattr(config, "use_dora", False):
        kind = "DoRA"
    elif kind.lower() in WORKING and start not in _INITIALISATIONS:
        raise NFQError(f"init_lora_weights={start!r} needs the dense weights; choose True, False or 'gaussian'")
    if kind and kind.lower() not in WORKING:
        raise NFQError(f"adapters of kind {kind} need the dense weights; dequantize() the model first, or use a LoRA")


def _beside_packed(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in nn.Module.named_modules(model):
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLayer):
            yield name, module


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
