"""Checks of the host's DynamicVRAM beside packed MODELs: its own code, on a card that this module pretends to have.

Real are the host's loading, freeing and casting, and its dynamic patcher. A stand-in is what needs an NVIDIA GPU: the
library's address ranges and pinned buffers, and the card's free memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from .checks import _difference, _module

CARD = torch.device("cpu", 0)
"""The pretended card; torch keeps its tensors in RAM, and the host's own CPU has no index."""

CPU = torch.device("cpu")

LAYER_BYTES = 4 << 20
"""Bytes of a layer of `_dynamic`."""


class _AddressRange:
    """Stand-in for the library's memory of one model; the host asks for it, fills it and frees it."""

    def __init__(self, size: int, device: int) -> None:
        self.parts: list[torch.Tensor] = []
        self.resident = 0

    def prioritize(self) -> None:
        pass

    def alloc(self, nbytes: int) -> tuple[_AddressRange, int, int]:
        self.parts.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self, len(self.parts) - 1, nbytes

    def use(self) -> None:
        """What a model's forward does: all that it was promised is on the card."""
        self.resident = sum(part.numel() for part in self.parts)

    def loaded_size(self) -> int:
        return self.resident

    def free_memory(self, wanted: float) -> int:
        freed = min(math.ceil(min(wanted, 1e18)), self.resident)
        self.resident -= freed
        return freed


class _HostBuffer:
    """Stand-in for pinned memory, of which none is used."""

    size = 0

    def __init__(self, *sizes: int) -> None:
        pass


def _supported() -> bool:
    return hasattr(comfy.model_patcher, "ModelPatcherDynamic")


@contextmanager
def _card(nbytes: float) -> Iterator[None]:
    """Let the host believe in a card with so much memory, and nothing on it."""
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    management = comfy.model_management

    def free(device: torch.device | None = None, torch_free_too: bool = False) -> float | tuple[float, float]:
        left = nbytes - sum(loaded.model_loaded_memory() for loaded in management.current_loaded_models)
        return (left, 0) if torch_free_too else left

    replaced = [
        (management, "get_free_memory", free),
        (management, "is_device_cpu", lambda device: device == CPU),
        (management, "vram_state", management.VRAMState.NORMAL_VRAM),
        (management, "minimum_inference_memory", lambda: 0),
        (management, "extra_reserved_memory", lambda: 0),
        (management, "soft_empty_cache", lambda *_: None),
        (comfy.ops.args, "disable_pinned_memory", True),
        (comfy_aimdo.host_buffer, "HostBuffer", _HostBuffer),
        (comfy_aimdo.model_vbar, "ModelVBAR", _AddressRange),
        (comfy_aimdo.model_vbar, "vbar_fault", lambda part: b"on the card"),
        (comfy_aimdo.model_vbar, "vbar_unpin", lambda part: None),
        (comfy_aimdo.torch, "aimdo_to_tensor", lambda part, device: part[0].parts[part[1]]),
    ]
    management.unload_all_models()
    with ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(patch.object(where, name, value))
        try:
            yield
        finally:
            management.free_memory(1e32, CARD)


def _dynamic(layers: int) -> comfy.model_patcher.ModelPatcher:
    """A dense model with the host's dynamic patcher."""
    model = torch.nn.Sequential(*(comfy.ops.manual_cast.Linear(1024, 1024, bias=False) for _ in range(layers)))
    return comfy.model_patcher.ModelPatcherDynamic(model, CARD, CPU)


def _use(patcher: comfy.model_patcher.ModelPatcher, memory_required: float = 0) -> None:
    comfy.model_management.load_models_gpu([patcher], memory_required=memory_required)
    if patcher.is_dynamic():
        patcher._vbar_get().use()


def neighbours(package: str, model, other) -> dict:
    """Bytes that a packed MODEL beside a dynamic CLIP and VAE displaces and gives back, by how many are missing."""
    if not _supported():
        return {"supported": False}
    packed = model.clone()
    packed.load_device = CARD
    clip_layers, vae_layers = 6, 1
    dense_bytes = (clip_layers + vae_layers) * LAYER_BYTES
    facts = {"supported": True, "size": packed.model_size(), "vae": vae_layers * LAYER_BYTES, "cases": {}}
    for missing in (0, LAYER_BYTES // 2, vae_layers * LAYER_BYTES + LAYER_BYTES // 2):
        # The host asks for a tenth more than the weights.
        with _card(dense_bytes + math.ceil(1.1 * packed.model_size()) - missing):
            clip, vae = _dynamic(clip_layers), _dynamic(vae_layers)
            for patcher in (clip, vae, packed):
                _use(patcher)
            displaced = dense_bytes - clip.loaded_size() - vae.loaded_size()
            loaded = [one.model for one in comfy.model_management.current_loaded_models]
            case = {"model": packed.loaded_size(), "displaced": displaced, "vae stays": vae in loaded}
            _use(vae, memory_required=packed.model_size() // 2)
            case["given back"] = case["model"] - packed.loaded_size()
            _use(packed)
            case["again"] = packed.loaded_size()
            facts["cases"][missing] = case
    return facts


def carried(package: str, model, other) -> dict:
    """How a packed weight differs under the host's dynamic patcher, or the error, by how a LoRA is attached."""
    if not _supported():
        return {"supported": False}
    patcher = _module(package, "patcher")
    load, arguments = model.cached_patcher_init
    found: dict = {"supported": True}
    for name in ("no LoRA", "by the host", "as a function of the layer"):
        fresh = load(*arguments)
        with _card(1 << 40):
            dynamic = comfy.model_patcher.ModelPatcherDynamic(fresh.model, CARD, CPU)
            if name == "by the host":
                dynamic.patches = dict(model.patches)
            comfy.model_management.load_models_gpu([dynamic])
            key, layer = next((key, layer) for key, layer in patcher.nf_layers(fresh.model) if key in model.patches)
            patches = [] if name == "no LoRA" else model.patches[key]
            if name == "as a function of the layer":
                layer.weight_function = [patcher.WeightPatch(key, patches, layer.weight.shape, patcher.Misfits())]
            weight = _cast(layer)
            wanted = patcher.dense_weight(layer, patches, key)
            found[name] = weight if isinstance(weight, str) else _difference(weight, wanted)
    return found


def _cast(layer) -> torch.Tensor | str:
    """The layer's weight as the host makes it for a forward on the card, or the error."""
    try:
        comfy.ops.cast_modules_with_vbar([layer], torch.float32, CPU, torch.float32, False)
        weight, _ = comfy.ops.resolve_cast_module_with_vbar(layer, torch.float32, CPU, torch.float32, None, False)
    except (NotImplementedError, AttributeError) as error:
        # 0.22 asks the layer for the name of its format before it asks the format to quantise.
        return str(error)
    return weight.dequantize() if isinstance(weight, comfy.ops.QuantizedTensor) else weight
