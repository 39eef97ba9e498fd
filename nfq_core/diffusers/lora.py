"""Fusing LoRAs into packed layers: PEFT's layers, taught to hand their factors on instead of changing the weight."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..errors import NFQError
from ..layers import PackedLayer
from ..low_rank import LowRank


class _Merging:
    """Adds plain LoRAs to what a packed layer dequantises, see `PackedLayer.low_rank`."""

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """See PEFT. The factors take the dtype that the layer computes in."""
        layer = self.get_base_layer()
        added = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
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

    def unmerge(self) -> None:
        """See PEFT: the layer is as it was, what was fused before these adapters stays."""
        layer = self.get_base_layer()
        rank = sum(self.lora_A[name].weight.shape[0] for name in self.merged_adapters)
        if rank:
            up, down = layer.low_rank.up[:, :-rank], layer.low_rank.down[:-rank]
            layer.low_rank = LowRank(up.contiguous(), down.contiguous()) if up.shape[1] else None
        self.merged_adapters.clear()


class MergingLinear(_Merging, Linear):
    """PEFT's LoRA beside a `PackedLinear`."""


class MergingConv2d(_Merging, Conv2d):
    """PEFT's LoRA beside a `PackedConv2d`."""


MERGING = {Linear: MergingLinear, Conv2d: MergingConv2d}


def let_merge(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Have the adapters beside a model's packed layers merge and unmerge without touching packed weights.

    Args:
        model: is changed.
        adapter_names: those that are going to be merged; by default the active ones.

    Raises:
        NFQError: one of them is no plain LoRA; nothing is changed then.
    """
    beside_packed = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLayer)
    ]
    for name, module in beside_packed:
        kind = type(module).__name__
        if not isinstance(module, (*MERGING, _Merging)):
            raise NFQError(f"{name!r} has an adapter of kind {kind}, which cannot be fused into packed weights")
        for adapter in adapter_names or module.active_adapters:
            if adapter in getattr(module, "lora_variant", {}) or getattr(module, "lora_bias", {}).get(adapter):
                raise NFQError(f"adapter {adapter!r} is no plain LoRA (DoRA, or a bias), which cannot be fused here")
    for _, module in beside_packed:
        module.__class__ = MERGING.get(type(module), type(module))
