"""Loading a model in Forge Neo with its own loader, layers, LoRA, memory management and refiner."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tiny_sdxl
import torch
from backend import memory_management, utils
from backend.args import dynamic_args
from backend.patcher.lora import load_lora
from huggingface_guess import guess
from modules import shared
from tiny_sdxl import LORA_KEYS, broken, close, load, prepare

EVERYTHING = 1e32
"""A device memory that holds any model."""


class Engine(tiny_sdxl.Engine):
    """With Forge Neo's way to load a model and to apply LoRAs."""

    def output(self, memory: float = EVERYTHING) -> torch.Tensor:
        """The output with all layers on the device, or with so many bytes of them."""
        with torch.inference_mode():
            self.unet.partially_load(self.unet.load_device, memory)
            return self.run()

    def lora(self, online: bool) -> None:
        """Add a LoRA."""
        names = {key.removesuffix(".weight"): key for key in LORA_KEYS}
        factors = {key.removesuffix(".weight"): pair for key, pair in self.lora_factors().items()}
        file = {f"{name}.lora_up.weight": up for name, (up, _) in factors.items()}
        file |= {f"{name}.lora_down.weight": down for name, (_, down) in factors.items()}
        patches, unknown = load_lora(file, names)
        assert not unknown
        self.unet = self.unet.clone()
        assert set(self.unet.add_patches(patches=patches, online_mode=online)) == set(LORA_KEYS)

    def with_lora(self, online: bool, memory: float = EVERYTHING) -> torch.Tensor:
        """The output with a LoRA, which is removed afterwards."""
        plain = self.unet
        self.lora(online)
        result = self.output(memory)
        self.unet.detach()
        self.unet = plain
        return result


@torch.inference_mode()
def swap(engine: Engine, path: str) -> torch.Tensor:
    """What the refiner does with its fast setting: fill the loaded model's layers from another file."""
    # Looked up in their modules whenever they are needed, as the program does.
    from backend.loader import preprocess_state_dict
    from backend.state_dict import load_state_dict, try_filter_state_dict
    from backend.utils import load_torch_file

    engine.unet.detach()
    tensors = preprocess_state_dict(load_torch_file(path))
    load_state_dict(engine.diffusion_model, try_filter_state_dict(tensors, guess(tensors).unet_key_prefix))
    return engine.output()


def pinned(engine: Engine) -> bool:
    """Whether the program pins packed weights that it leaves in main memory, and frees them, as CUDA would see."""
    registered: dict[int, int] = {}

    def register(pointer: int, nbytes: int, _: int) -> int:
        registered[pointer] = nbytes
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda pointer: bool(registered.pop(pointer)) - 1
    )
    torch.cuda.cudart, memory_management.MAX_PINNED_MEMORY = lambda: runtime, 1 << 40
    engine.unet.detach()
    engine.output(memory=1)
    found = all(registered.get(weight.data_ptr()) == weight.data.numel() for weight in engine.packed())
    engine.unet.detach()
    memory_management.MAX_PINNED_MEMORY = -1
    return found and not registered


def change(path_of: Callable[[str], str], raised: Callable[..., str]) -> dict[str, Any]:
    """See `driver.check_change`."""
    warnings = prepare(Engine)
    stock = load("other.safetensors")
    other = stock.output()
    stock = load("dequantised.safetensors")
    plain, merged, online = stock.output(), stock.with_lora(False), stock.with_lora(True)
    reference = utils.get_state_dict_after_quant(stock.diffusion_model)

    kept = load("tiny.nfq.safetensors")
    packed, size = len(kept.packed()), memory_management.module_size(kept.diffusion_model)
    # The stock model's weights are of 32 bits on a CPU.
    nbytes = sum(weight.data.numel() * weight.data.element_size() for weight in kept.diffusion_model.parameters())
    stock_bytes = memory_management.module_size(stock.diffusion_model)
    saved = utils.get_state_dict_after_quant(kept.diffusion_model)
    outputs = {
        "plain": torch.equal(kept.output(), plain),
        "packed": {weight.dim() for weight in kept.packed()} == {1}
        and {len(weight.shape) for weight in kept.packed()} == {2, 4},
        "accounted": size == nbytes < stock_bytes / 4,
        "lora moves it": not close(merged, plain),
        "merged": close(kept.with_lora(False), merged),
        "lora gone": torch.equal(kept.output(), plain) and len(kept.packed()) == packed,
        "online": torch.equal(kept.with_lora(True), online),
        "online, packed": len(kept.packed()) == packed,
        "saved": all(torch.equal(saved[key].float(), reference[key].float()) for key in reference),
    }
    kept.lora(False)
    kept.output()
    outputs["merged, dense"] = len(kept.packed()) == packed - 2
    outputs["partly unloaded"] = kept.unet.partially_unload(kept.unet.offload_device, 1 << 40) > 0
    outputs["merged weights packed again"] = len(kept.packed()) == packed and close(kept.run(), merged)
    kept.unet.detach()
    kept.unet = kept.forge_objects.unet
    outputs["partly loaded"] = torch.equal(kept.output(memory=size // 2), plain)
    kept.unet.detach()
    outputs["partly loaded, merged"] = close(kept.with_lora(False, size // 2), merged)
    outputs["partly loaded, online"] = torch.equal(kept.with_lora(True, size // 2), online)
    outputs["pinned"] = pinned(kept)
    answer: dict[str, Any] = {"loaded": isinstance(kept, Engine) and packed > 40, "outputs": outputs}
    answer |= broken(kept, raised) | {"warnings": warnings}
    again = load("tiny.nfq.safetensors")
    answer["output_after"] = again is kept and torch.equal(again.output(), plain)

    outputs["refiner: plain into packed"] = torch.equal(swap(kept, path_of("other.safetensors")), other)
    outputs["refiner: packed again"] = (
        torch.equal(swap(kept, path_of("tiny.nfq.safetensors")), plain) and len(kept.packed()) == packed
    )
    outputs["refiner: its own packed"] = (
        close(swap(kept, path_of("other.nfq.safetensors")), other) is False and len(kept.packed()) == packed
    )
    dense = load("other.safetensors")
    outputs["refiner: packed into plain"] = (
        torch.equal(swap(dense, path_of("tiny.nfq.safetensors")), plain) and not dense.packed()
    )

    companion = load(
        "unet.nfq.safetensors",
        [path_of("../modules/companions.safetensors"), path_of("../modules/clip_l.nfq.safetensors")],
    )
    outputs["unet alone with modules"] = torch.equal(companion.output(), plain) and len(companion.packed()) == packed
    eight = load("tiny.nfq.safetensors", low_bits=torch.float8_e4m3fn)
    outputs["low bits: not packed"] = not eight.packed() and eight.diffusion_model.storage_dtype == torch.float8_e4m3fn
    dynamic_args["forge_unet_storage_dtype"] = None
    shared.opts.data["nfq_keep_packed"] = False
    dense = load("tiny.nfq.safetensors")
    outputs["setting: not packed"] = not dense.packed() and torch.equal(dense.output(), plain)
    return answer
