"""Loading a model in Forge with its own loader, layers and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_sdxl
import torch
from backend import utils
from backend.args import dynamic_args
from modules import shared
from tiny_sdxl import LORA_KEYS, broken, close, load, prepare


class Engine(tiny_sdxl.Engine):
    """With Forge's way to apply LoRAs."""

    def output(self) -> torch.Tensor:
        with torch.inference_mode():
            self.unet.refresh_loras()
        return self.run()

    def with_lora(self, online: bool) -> torch.Tensor:
        """The output with a LoRA, which is removed afterwards."""
        patches = {key: ("lora", (*factors, None, None, None, None)) for key, factors in self.lora_factors().items()}
        plain, self.unet = self.unet, self.unet.clone()
        assert self.unet.add_patches(filename="lora", patches=patches, online_mode=online) == set(LORA_KEYS)
        result = self.output()
        self.unet = plain
        return result


def change(path_of: Callable[[str], str], raised: Callable[..., str]) -> dict[str, Any]:
    """See `driver.check_change`."""
    warnings = prepare(Engine)
    stock = load("dequantised.safetensors")
    plain, merged, online = stock.output(), stock.with_lora(False), stock.with_lora(True)
    kept = load("tiny.nfq.safetensors")
    packed = len(kept.packed())
    saved = utils.get_state_dict_after_quant(kept.diffusion_model)
    reference = utils.get_state_dict_after_quant(stock.diffusion_model)
    outputs = {
        "plain": torch.equal(kept.output(), plain),
        "lora moves it": not close(merged, plain),
        "merged": close(kept.with_lora(False), merged),
        "merged, dense": len(kept.packed()) == packed - 1,
        "lora gone": torch.equal(kept.output(), plain) and len(kept.packed()) == packed,
        "online": close(kept.with_lora(True), online),
        "saved": all(torch.equal(saved[key].float(), reference[key].float()) for key in reference),
    }
    answer: dict[str, Any] = {"loaded": isinstance(kept, Engine) and packed > 20, "outputs": outputs}
    answer |= broken(kept, raised) | {"warnings": warnings}
    again = load("tiny.nfq.safetensors")
    answer["output_after"] = again is kept and torch.equal(again.output(), plain)

    companion = load("unet.nfq.safetensors", [path_of("../modules/companions.safetensors")])
    outputs["unet alone with modules"] = torch.equal(companion.output(), plain) and len(companion.packed()) == packed
    eight = load("tiny.nfq.safetensors", low_bits=torch.float8_e4m3fn)
    outputs["low bits: not packed"] = not eight.packed()
    dynamic_args["forge_unet_storage_dtype"] = None
    shared.opts.data["nfq_keep_packed"] = False
    dense = load("tiny.nfq.safetensors")
    outputs["setting: not packed"] = not dense.packed() and torch.equal(dense.output(), plain)
    return answer
