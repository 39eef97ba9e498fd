"""Facts about a packed MODEL or a file, as text and as JSON-ready objects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..nfq_core import NFQError, NFQFile
from ..nfq_core.checkpoints.examine import (
    container_info,
    expected_in_words,
    of_main_component,
    settings_in_words,
)
from ..nfq_core.decibels import decibels_in_words, pooled_sqnr_db, sqnr_db
from ..nfq_core.errors import printable
from ..nfq_core.models.text_encoders import find_text_encoders, owner_finder
from ..nfq_core.packed.formats import format_by_id
from ..nfq_core.sizes import size_in_words
from .bake import without_dynamic_vram
from .host import UNET, json_decibels, provenance
from .misfits import apply_patches
from .packed_tensor import unwrap
from .patcher import nf_layers
from .weights import dense, key_patches


def file_facts(file: NFQFile, name: str) -> dict[str, Any]:
    """`container_info` of a file, with the diffusion model's number of weights and bits if it has one.

    Further fields are `name`, and `fp16_bytes`: its size with all quantised weights as fp16.
    """
    info = container_info(file)
    stored = sum(map(file.stored_bytes, file.quantized))
    fp16_bytes = info["file_bytes"] - stored + 2 * info["weights"]
    return {"name": name, "fp16_bytes": fp16_bytes, **of_main_component(info)}


def file_summary(file: NFQFile, name: str) -> dict[str, Any]:
    """`file_facts` with `formats` instead of `layers`: each format and its count of weights, most frequent first.

    Formats of text encoders are left out if the file has other quantised weights.
    """
    facts = file_facts(file, name)
    owner = owner_finder(find_text_encoders(file.shapes()))
    layers = facts.pop("layers")
    others = [layer for layer in layers if owner(layer["name"]) is None]
    weights: Counter[str] = Counter()
    for layer in others or layers:
        weights[layer["format"]] += math.prod(layer["shape"])
    formats = [
        {"format": id, "levels": format_by_id(id).levels, "trellis_bits": trellis_bits(id), "weights": count}
        for id, count in weights.most_common()
    ]
    return {**facts, "formats": formats}


def trellis_bits(format_id: str) -> int:
    """Bits of each code of a trellis format; 0 for other formats."""
    fmt = format_by_id(format_id)
    return fmt.code_bits if fmt.window else 0


def model_facts(model: Any, original: Any = None) -> dict[str, Any]:
    """Facts about a packed MODEL, as JSON-ready objects.

    Args:
        model: a MODEL from one of our nodes.
        original: the MODEL before it was quantised; each layer's error is measured against it.

    Returns:
        `name` (of its file; empty if it was quantised in this workflow), `settings`, `source`, `expected` (of the
        output, see `expectation`), `weights` (count of quantised weights), `packed_bits_per_weight`, `model_bytes` (in
        memory), `fp16_bytes` (the same with its quantised weights as fp16), `sqnr_db` (over all layers, see
        `decibels.pooled_sqnr_db`) and `layers` (each `name`, `format`, `shape`, `bits_per_weight`, `sqnr_db`). A
        `sqnr_db` is None if the weights are equal, and left out if no error was measured.

    Raises:
        NFQError: the MODEL is not packed, or was not quantised from the original.
    """
    facts = provenance(model, "this MODEL is not quantised; connect one from NFQ Quantize Model or an NFQ loader")
    before = key_patches(without_dynamic_vram(original)) if original is not None else {}
    layers, weights, packed_bytes = [], 0, 0
    measured: list[tuple[int, float]] = []
    for key, layer in nf_layers(model.model):
        packed, name = unwrap(layer.weight), key.removeprefix(UNET)
        sqnr = facts.sqnr.get(name)
        if before:
            if key not in before or before[key][0][0].shape != packed.shape:
                raise NFQError(
                    f"the original has no weight {name!r} of shape {tuple(packed.shape)}; connect the MODEL that was "
                    "quantised"
                )
            (weight, convert), *patches = before[key]
            wanted = convert(dense(weight).to("cpu")).float()
            if patches:
                wanted = apply_patches(patches, wanted.clone(), key)
            sqnr = sqnr_db(wanted, packed.to("cpu").dequantize(torch.float32))
            if math.isnan(sqnr) or sqnr == -math.inf:
                raise NFQError(
                    f"the original's weight {name!r} is not what was quantised; connect the MODEL that was quantised"
                )
        weights += packed.numel()
        packed_bytes += packed.nbytes
        layer = {
            "name": name,
            "format": packed.format.id,
            "shape": list(packed.shape),
            "bits_per_weight": round(packed.bits_per_weight, 4),
        }
        if sqnr is not None:
            layer["sqnr_db"] = json_decibels(sqnr)
            measured.append((packed.numel(), sqnr))
        layers.append(layer)
    return {
        "name": facts.file_name,
        "settings": dict(facts.settings),
        "source": {"name": facts.source.name, "sha256": facts.source.sha256},
        "expected": dict(facts.expected),
        "weights": weights,
        "packed_bits_per_weight": packed_bytes * 8 / weights if weights else 0.0,
        "model_bytes": model.model_size(),
        "fp16_bytes": model.model_size() - packed_bytes + 2 * weights,
        **({"sqnr_db": json_decibels(pooled_sqnr_db(measured))} if measured else {}),
        "layers": layers,
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """`model_facts` or `file_facts` as text: a summary, then one line per layer."""
    settings = settings_in_words(facts["settings"]) or "settings not recorded"
    source = facts["source"]["name"] or "an unrecorded model"
    bits = facts["packed_bits_per_weight"]
    lines = [
        facts["name"] or "quantised in this workflow",
        printable(f"from {source}: {settings}"),
        f"{facts['weights'] / 1e6:,.1f} million quantised weights, {bits:.3f} packed bits per weight",
    ]
    if "file_bytes" in facts:
        lines.append(f"{size_in_words(facts['file_bytes'])} in the file, {size_in_words(facts['fp16_bytes'])} as fp16")
    else:
        lines.append(f"{size_in_words(facts['model_bytes'])} in memory")
    if facts["expected"]:
        lines.append(expected_in_words(facts["expected"]))
    if "sqnr_db" in facts:
        error = decibels_in_words(facts["sqnr_db"])
        lines.append(f"SQNR {error} over all layers (signal-to-quantisation-noise ratio, higher is better)")
    for layer in facts["layers"]:
        error = f"  {decibels_in_words(layer['sqnr_db']):>9}" if "sqnr_db" in layer else ""
        lines.append(f"{layer['format']:>9}  {layer['bits_per_weight']:.3f} bits{error}  {printable(layer['name'])}")
    return "\n".join(lines)
