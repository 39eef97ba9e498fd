"""Small graphs in the host's API format."""

from __future__ import annotations


def loader(unet_name: str) -> dict:
    """The loader for a file: ours for `.nfq.safetensors`, the stock one for others."""
    if unet_name.endswith(".nfq.safetensors"):
        return {"class_type": "NFQuantizedUNetLoader", "inputs": {"unet_name": unet_name}}
    return {"class_type": "UNETLoader", "inputs": {"unet_name": unet_name, "weight_dtype": "default"}}


OURS, DENSE, ORIGINAL = (loader(f"narrow{end}.safetensors") for end in (".nfq", "-dense", ""))
"""The narrow model, for tests that sample; see `models.NARROW`."""

VEGA, VEGA_ORIGINAL = loader("vega.nfq.safetensors"), loader("vega.safetensors")
"""The model of a real size, for tests that need its time, its bytes or its name."""


def lora(name: str, strength: float, model: list) -> dict:
    return {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": f"{name}.safetensors", "strength_model": strength, "model": model},
    }


def lora_on_both(name: str, strength: float, source: str) -> dict:
    """A LoRA on MODEL and CLIP of a node that outputs them first."""
    inputs = {"lora_name": f"{name}.safetensors", "strength_model": strength, "strength_clip": strength}
    return {"class_type": "LoraLoader", "inputs": {**inputs, "model": [source, 0], "clip": [source, 1]}}


def quantize(model: list, **settings) -> dict:
    """NFQ Quantize Model; levels bring the preset with which they count."""
    by_levels = {"preset": "levels"} if "levels" in settings else {}
    return {"class_type": "NFQuantizeUNet", "inputs": {"model": model, **by_levels, **settings}}


def save(model: list, prefix: str, **inputs) -> dict:
    return {"class_type": "NFSaveCheckpoint", "inputs": {"model": model, "filename_prefix": prefix, **inputs}}


def sample(
    nodes: dict,
    model: list,
    sampler: str = "euler",
    *,
    steps: int = 2,
    cfg: float = 5.0,
    scheduler: str = "normal",
    positive: list | None = None,
    negative: list | None = None,
    name: str = "latent",
) -> dict:
    """`nodes` plus nodes that sample from `model`; the node `name` saves the latent."""
    return nodes | {
        "positive": {"class_type": "NFQTestConditioning", "inputs": {"number": 1}},
        "negative": {"class_type": "NFQTestConditioning", "inputs": {"number": 2}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        f"{name} sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": model,
                "seed": 7,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": sampler,
                "scheduler": scheduler,
                "positive": positive or ["positive", 0],
                "negative": negative or ["negative", 0],
                "latent_image": ["empty", 0],
                "denoise": 1.0,
            },
        },
        name: {"class_type": "SaveLatent", "inputs": {"samples": [f"{name} sampler", 0], "filename_prefix": name}},
    }
