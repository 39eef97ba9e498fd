"""What a packed MODEL or a file is, and what to do where a file is missing, in words and as JSON-ready objects."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import folder_paths
import torch

from ..nfq_core import NFQError, NFQFile
from ..nfq_core.container import UNRECORDED, Source
from ..nfq_core.examine import file_info, sqnr_db
from .bake import UNET
from .host import SUFFIX, file_names, file_path, made
from .ops import unwrap
from .patcher import packed_layers

LOADER_INPUTS = ("unet_name", "ckpt_name", "model_name", "model_path")
"""Inputs by which loaders, stock ones and others, name their file."""


def recipe(folder: str, name: str) -> dict[str, Any]:
    """What a listed file was made from and how, short enough for a workflow.

    Raises:
        NFQError: the file is missing, damaged, foreign or newer.
    """
    with NFQFile(file_path(folder, name)) as file:
        source = file.facts.source
        return {
            "architecture": file.facts.architecture,
            "settings": file.facts.settings,
            "source": source.name,
            "source_sha256": source.sha256,
            "header_sha256": file.header_sha256,
            "file_bytes": file.file_bytes,
        }


def missing_file(folder: str, name: str | None, recipe_text: str) -> str:
    """What to do about a file that a workflow wants and that is not there; empty where it is.

    Args:
        folder: the host's folder.
        name: the file; None where another node will give the name.
        recipe_text: JSON of `recipe`, from the workflow; anything else is taken for none.
    """
    if name is None or name in file_names(folder):
        return ""
    there = f"{name!r} is not in models/{folder}"
    if folder_paths.get_full_path(folder, name) is not None:
        return f"{there} under that ending: it is no {SUFFIX} file, load it with the stock loader"
    try:
        told = json.loads(recipe_text)
        settings = told["settings"]
        flags = " ".join(f"{key}={settings[key]}" for key in ("levels", "conv_levels", "effort") if key in settings)
        source, digest = str(told["source"]), str(told["source_sha256"])
    except (ValueError, KeyError, TypeError):
        return f"{there}; put it there, or choose another file"
    known = f" (SHA-256 {digest})" if digest else ""
    made_from = f"{source!r}{known}" if source else f"a {told.get('architecture', 'SDXL')} model"
    save_as = name.removesuffix(SUFFIX)
    return (
        f"{there}. It was made from {made_from} with {flags}: load that with the stock loader, connect NFQuantizeUNet "
        f"with these settings, and NFSaveCheckpoint with filename_prefix {save_as!r}; or run `nfq quantize`"
    )


def source_in_graph(prompt: Mapping[str, Any] | None, node_id: str | None) -> Source:
    """The file that the MODEL of a node came from, found by following its inputs up the graph."""
    seen: set[str] = set()
    waiting = [str(node_id)]
    while waiting and prompt:
        current = waiting.pop()
        node = prompt.get(current)
        if node is None or current in seen:
            continue
        seen.add(current)
        inputs = node.get("inputs", {})
        for name in LOADER_INPUTS:
            if isinstance(inputs.get(name), str):
                return Source(name=inputs[name].replace("\\", "/").rpartition("/")[2])
        links = [(name, value) for name, value in inputs.items() if isinstance(value, list) and len(value) == 2]
        waiting += [str(value[0]) for name, value in links if name.startswith("model")]
    return UNRECORDED


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
            weight, convert = before[key][0]
            sqnr = sqnr_db(convert(weight.to("cpu")).float(), packed.to("cpu").dequantize(torch.float32))
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
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items())
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
