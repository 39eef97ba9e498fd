"""The host's model patcher for models with packed weights.

Packed weights are never changed. Patches (LoRA, merges, scheduled hooks) are attached to their layers and applied in
`forward` after dequantising. The host does everything else.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any

import comfy.hooks
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from .lora import HookPatch, WeightPatch
from .misfits import Misfits, apply_patches
from .ops import NFLayer
from .packed_tensor import is_packed, unwrap


def nf_layers(model: torch.nn.Module) -> Iterator[tuple[str, NFLayer]]:
    """Weight name and layer of every packed weight in a model."""
    for name, module in model.named_modules():
        if isinstance(module, NFLayer) and is_packed(module.weight):
            yield f"{name}.weight", module


def _nf_layer(model: torch.nn.Module, key: str) -> NFLayer | None:
    """The layer with the packed weight named `key`; None for any other parameter."""
    name, _, parameter = key.rpartition(".")
    if parameter != "weight":
        return None
    layer = comfy.utils.get_attr(model, name) if name else model
    return layer if isinstance(layer, NFLayer) and is_packed(layer.weight) else None


def _is_patch(function: object) -> bool:
    return isinstance(function, (WeightPatch, comfy.model_patcher.LowVramPatch))


def _is_hook(function: object) -> bool:
    return isinstance(function, HookPatch)


def _attach(layer: NFLayer, patch: WeightPatch | None) -> None:
    """Make `patch` the layer's only patch, before hooks and other functions; the host's own would apply it twice."""
    others = [function for function in layer.weight_function if _is_hook(function) or not _is_patch(function)]
    layer.weight_function = [patch, *others] if patch else others


def _attach_hook(layer: NFLayer, hook: HookPatch | None) -> None:
    """Make `hook` the layer's only hook patch, after its own patch and before other functions."""
    others = [function for function in layer.weight_function if not _is_hook(function)]
    patches = [function for function in others if _is_patch(function)]
    rest = [function for function in others if not _is_patch(function)]
    layer.weight_function = [*patches, hook, *rest] if hook else others


def _attached(layer: NFLayer) -> WeightPatch | None:
    """The layer's own patch, not a hook's."""
    patches = (function for function in layer.weight_function if isinstance(function, WeightPatch))
    return next((patch for patch in patches if not _is_hook(patch)), None)


def _is_loaded(layer: NFLayer) -> bool:
    """Whether the host put the layer on the compute device, instead of copying it there for each use."""
    return getattr(layer, "comfy_patched_weights", False)


def dense_weight(layer: NFLayer, patches: list | None = None, key: str = "") -> torch.Tensor:
    """Dequantise a weight with its patches, on its device, rounded once to its dtype before quantising.

    Args:
        layer: the layer.
        patches: the patches to apply; by default those attached to the layer.
        key: the weight's name in the model, for messages.
    """
    packed = unwrap(layer.weight)
    if patches is None:
        patches = [patch for function in layer.weight_function if _is_patch(function) for patch in _patches(function)]
    weight = packed.dequantize(torch.float32 if patches else packed.dtype)
    if patches:
        weight = apply_patches(patches, weight, key)
    return weight.to(packed.dtype)


def _patches(function: WeightPatch | comfy.model_patcher.LowVramPatch) -> list:
    return function.patches if isinstance(function, WeightPatch) else function.patches[function.key]


class _DenseOnAccess(UserDict):
    """A model's state dict that dequantises a packed weight, with its patches, only on access."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor], layers: Mapping[str, NFLayer]) -> None:
        super().__init__(state_dict)
        self._layers = layers

    def __getitem__(self, key: str) -> torch.Tensor:
        layer = self._layers.get(key)
        return super().__getitem__(key) if layer is None else dense_weight(layer, key=key)


class NFModelPatcher(comfy.model_patcher.ModelPatcher):
    """A static `ModelPatcher` that never changes packed weights.

    The host's dynamic patcher (DynamicVRAM) would quantise patched weights again and so lose the patch.
    """

    def model_size(self) -> int:
        """Bytes of the model plus the LoRA factors of its packed layers, for the host's memory planning.

        The host's cached size is not used: clones share it, although their patches may differ.
        """
        if getattr(self.model, "nf_bytes", None) is None:
            self.model.nf_bytes = comfy.model_management.module_size(self.model)
        return self.model.nf_bytes + sum(self._factor_bytes().values())

    def _load_list(self, *args: Any, **kwargs: Any) -> list[tuple]:
        """The list by which the host loads and unloads layers; sizes include the LoRA factors."""
        factors = self._factor_bytes()
        return [
            (offloaded, nbytes + factors.get(f"{name}.weight", 0), name, *rest)
            for offloaded, nbytes, name, *rest in super()._load_list(*args, **kwargs)
        ]

    def _factor_bytes(self) -> dict[str, int]:
        """Bytes of the LoRA factors on a device, by name of the packed weight."""
        if getattr(self, "_factors_of", None) != self.patches_uuid:
            patches = ((key, self._patch(key, layer)) for key, layer in nf_layers(self.model))
            self._factors = {key: patch.factor_bytes(self._compute_dtype()) for key, patch in patches if patch}
            self._factors_of = self.patches_uuid
        return self._factors

    def _compute_dtype(self) -> torch.dtype:
        return self.get_model_object("manual_cast_dtype") or self.model.get_dtype()

    @cached_property
    def _misfits(self) -> Misfits:
        return Misfits()

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> Any:
        """Load as the host does, then attach the patches of packed weights to their layers.

        The host's load ends by applying its forced hooks, whose patches stay. Factors are combined now, those of loaded
        layers on the device, while the host has memory reserved for them.
        """
        self._misfits.start()
        result = super().load(device_to, *args, **kwargs)
        for key, layer in nf_layers(self.model):
            patch = self._patch(key, layer, _is_loaded(layer))
            _attach(layer, patch)
            if patch:
                patch.prepare(device_to or self.load_device, self._compute_dtype())
        self._misfits.report()
        return result

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Unload as the host does, and replace the patches that the host adds to unloaded layers.

        Hooks are removed first. The sampler applies scheduled hooks again at its next step; forced hooks are applied
        again here.
        """
        if getattr(self.model, "nf_hooked", None):
            self.unpatch_hooks()
        freed = super().partially_unload(*args, **kwargs)
        for layer in self._nf_layers():
            patch = _attached(layer)
            if patch and not _is_loaded(layer):
                patch.release()
            _attach(layer, patch)
        if self.forced_hooks is not None:
            self.apply_hooks(self.forced_hooks, force_apply=True)
        return freed

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True, **kwargs: Any) -> Any:
        """Restore as the host does, and remove the patches from the layers."""
        result = super().unpatch_model(device_to, unpatch_weights=unpatch_weights, **kwargs)
        if unpatch_weights:
            for layer in self._nf_layers():
                _attach(layer, None)
        return result

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, inplace_update: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Patch a dense parameter as the host does; a packed weight is left alone, and the host moves it later."""
        layer = _nf_layer(self.model, key)
        if layer is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, *args, **kwargs)
        if kwargs.get("return_weight", bool(args and args[0])):
            return dense_weight(layer, self.patches.get(key, []), key)
        return layer.weight

    def _nf_layers(self) -> Iterator[NFLayer]:
        return (layer for _, layer in nf_layers(self.model))

    def _patch(self, key: str, layer: NFLayer, resident: bool = False) -> WeightPatch | None:
        patches = self.patches.get(key)
        return WeightPatch(key, patches, layer.weight.shape, self._misfits, resident=resident) if patches else None

    def patch_hooks(self, hooks: comfy.hooks.HookGroup) -> Any:
        """Apply hooks without the host's cache of patched weights, which would be dense."""
        self.hook_mode = comfy.hooks.EnumHookMode.MinVram
        result = super().patch_hooks(hooks)
        self._misfits.report()
        return result

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict, key: str, original_weights: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """Attach a hook's patches to a packed layer; their factors change too often to stay on a device."""
        layer = _nf_layer(self.model, key)
        if layer is None or key not in combined_patches:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, *args, **kwargs)
        patches, shape = combined_patches[key], layer.weight.shape
        _attach_hook(layer, HookPatch(key, patches, shape, self._misfits, original_weights=original_weights))
        self.model.nf_hooked = getattr(self.model, "nf_hooked", set()) | {key}
        return None

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Remove hooks from packed layers, and restore the rest as the host does."""
        for key in getattr(self.model, "nf_hooked", ()):
            layer = _nf_layer(self.model, key)
            if layer is not None:
                _attach_hook(layer, None)
        self.model.nf_hooked = set()
        return super().unpatch_hooks(*args, **kwargs)

    def model_state_dict(self, filter_prefix: str | None = None) -> Mapping[str, torch.Tensor]:
        """The model's state dict, which dequantises packed weights on access; LoraSave reads it."""
        return _DenseOnAccess(super().model_state_dict(filter_prefix), dict(nf_layers(self.model)))

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict:
        """The state dict that stock nodes save: packed weights are dequantised and patched."""
        saved = super().model_state_dict_for_saving(model, prefix)
        for key, layer in nf_layers(self.model if model is None else model):
            saved[key] = dense_weight(layer, self.patches.get(prefix + key, []), prefix + key).cpu()
        return saved


class _SavesDense:
    """Mixin for a model's class on hosts whose stock nodes do not save through the patcher (0.8)."""

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict:
        """The host's state dict for saving, with packed weights dequantised and patched."""
        unet = self.diffusion_model
        saved = super().state_dict_for_saving(*args, **kwargs)
        dense = {key: dense_weight(layer, key=key).cpu() for key, layer in nf_layers(unet)}
        return saved | self.model_config.process_unet_state_dict_for_saving(dense)


def _host_saves_through_patcher() -> bool:
    return hasattr(comfy.model_patcher.ModelPatcher, "model_state_dict_for_saving")


@cache
def _saving_dense(model_class: type) -> type:
    return type(model_class.__name__, (_SavesDense, model_class), {})


def adopt(patcher: comfy.model_patcher.ModelPatcher) -> NFModelPatcher:
    """Turn the patcher of a new model with packed weights into an `NFModelPatcher`; clones keep that class."""
    patcher.__class__ = NFModelPatcher
    if not _host_saves_through_patcher() and not isinstance(patcher.model, _SavesDense):
        patcher.model.__class__ = _saving_dense(type(patcher.model))
    return patcher
