"""What a packed MODEL or a file is, in words and as JSON-ready objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.lora
import torch

from ..nfq_core import NFQError
from ..nfq_core.examine import file_info, sqnr_db
from .bake import UNET
from .host import file_path, made
from .ops import unwrap
from .patcher import packed_layers


def file_facts(folder: str, name: str) -> dict[str, Any]:
    """`file_info` of a listed file, its name before it."""
    return {"name": name, **file_info(file_path(folder, name))}


def model_facts(model: Any, original: Any = None) -> dict[str, Any]:
    """What a packed MODEL is: `settings`, `source`, `weights`, `packed_bits_per_weight`, `model_bytes` and `layers`.

    Args:
        model: a MODEL from one of our nodes.
        original: the MODEL that it was made from, to measure each layer's error against.

    Raises:
        NFQError: the MODEL is not packed, or the original has other layers.
    """
    facts = made(model)
    if facts is None:
        raise NFQError("this MODEL is not quantised; connect one from NFQuantizeUNet or an NFQ loader")
    before = original.get_key_patches(UNET) if original is not None else {}
    layers = []
    for key, layer in packed_layers(model.model):
        packed, name = unwrap(layer.weight), key.removeprefix(UNET)
        sqnr = facts.sqnr.get(name)
        if before:
            if key not in before or before[key][0][0].shape != packed.shape:
                raise NFQError(f"the original has no weight {name!r} of shape {tuple(packed.shape)}; connect its own")
            (weight, convert), *patches = before[key]
            dense = convert(weight.to("cpu")).float()
            if patches:
                dense = comfy.lora.calculate_weight(patches, dense.clone(), key)
            sqnr = sqnr_db(dense, packed.to("cpu").dequantize(torch.float32))
        layers.append(
            {
                "name": name,
                "format": packed.format.id,
                "shape": list(packed.shape),
                "bits_per_weight": packed.bits_per_weight,
                "sqnr_db": sqnr if sqnr is not None and math.isfinite(sqnr) else None,
            }
        )
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    bits = sum(math.prod(layer["shape"]) * layer["bits_per_weight"] for layer in layers)
    return {
        "name": facts.file_name or "quantised in this graph",
        "settings": dict(facts.settings),
        "source": {"name": facts.source.name, "sha256": facts.source.sha256},
        "weights": weights,
        "packed_bits_per_weight": bits / weights,
        "model_bytes": model.model_size(),
        "layers": layers,
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """`model_facts` or `file_facts` as lines to read: a summary, then one line for each layer."""
    values = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts["settings"].items()}
    settings = ", ".join(f"{name} {value}" for name, value in values.items())
    lines = [
        facts["name"],
        f"from {facts['source']['name'] or 'a model that is not recorded'}: {settings or 'settings not recorded'}",
        f"{facts['weights'] / 1e6:,.1f} million quantised weights at {facts['packed_bits_per_weight']:.3f} packed bits",
    ]
    if "file_bytes" in facts:
        original = facts["original_bytes"]
        lines.append(f"{facts['file_bytes'] / 1e9:,.3f} GB" + (f" of {original / 1e9:,.3f} GB" if original else ""))
    else:
        lines.append(f"{facts['model_bytes'] / 1e9:,.3f} GB in memory")
    measured = [layer for layer in facts["layers"] if layer.get("sqnr_db") is not None]
    if measured:
        weights = [math.prod(layer["shape"]) for layer in measured]
        mean = sum(w * layer["sqnr_db"] for w, layer in zip(weights, measured, strict=True)) / sum(weights)
        lines.append(f"{mean:.2f} dB mean signal-to-quantisation-noise ratio, more is better")
    for layer in facts["layers"]:
        error = f"  {layer['sqnr_db']:6.2f} dB" if layer.get("sqnr_db") is not None else ""
        lines.append(f"{layer['format']:>9}  {layer['bits_per_weight']:.3f} bits{error}  {layer['name']}")
    return "\n".join(lines)
