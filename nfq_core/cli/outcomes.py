"""The results of commands as text: sizes, errors, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.batch import Result
from ..checkpoints.dry_run import named
from ..checkpoints.examine import MAX_LINE, expected_in_words
from ..decibels import decibels_in_words
from ..errors import printable
from ..files.container import NFQFile
from ..models.components import find_components
from ..models.unet import detect
from ..sizes import duration_in_words, share_in_words, size_in_words

WORST = 10
"""How many layers `nfq compare` lists unless it lists all."""

BATCH_NEXT = (
    "next: copy the new files to the folders of their originals; the nodes are Load NFQ Checkpoint, Load NFQ Diffusion "
    "Model and Load NFQ CLIP"
)
"""What to do with the files that `nfq batch` made."""

_PLACES = {
    "checkpoints": ("Load NFQ Checkpoint", "Load Checkpoint", ", in a web UI to models/Stable-diffusion"),
    "diffusion_models": ("Load NFQ Diffusion Model", "Load Diffusion Model", ""),
    "text_encoders": ("Load NFQ CLIP", "Load CLIP", ""),
}
"""By folder of ComfyUI's models: the node for an .nfq.safetensors file, the stock node, and other programs' folder."""


def conversion_text(target: str | os.PathLike, result: Mapping[str, Any]) -> str:
    """The result of `quantize_file` or `import_article`."""
    lines = [
        f"{target}: {named(result['architecture'])}{share_in_words(result['file_bytes'], result['original_bytes'])}; "
        f"{result['quantized']} tensors quantised, {result['kept']} kept, in {duration_in_words(result['seconds'])}",
        expected_in_words(result["expected"]),
        next_step(target, target),
    ]
    return "\n".join(filter(None, lines))


def next_step(container: str | os.PathLike, target: str | os.PathLike) -> str:
    """Where to put a model file for ComfyUI, and which node loads it; empty if its kind is not known.

    Args:
        container: the `.nfq.safetensors` file, which says what the model is.
        target: the file to put there: the container, or plain safetensors made from it.
    """
    with NFQFile(container) as file:
        shapes = file.shapes()
    kinds = {component.kind for component in find_components(detect(shapes), shapes)}
    if "diffusion model" in kinds:
        folder = "checkpoints" if kinds & {"text encoder", "VAE"} else "diffusion_models"
    elif kinds == {"text encoder"}:
        folder = "text_encoders"
    else:
        return ""
    ours, stock, elsewhere = _PLACES[folder]
    node = ours if os.fspath(container) == os.fspath(target) else stock
    if folder in Path(os.path.abspath(target)).parts:
        return f"next: press R in ComfyUI and choose it in {node}"
    return f"next: copy it to ComfyUI/models/{folder}{elsewhere}; the node is {node}"


def calibration_text(result: Mapping[str, Any], sampled: str) -> str:
    """The result of a calibration.

    Args:
        result: `target`, `weights`, `prompts`, `file_bytes` and `seconds`.
        sampled: what was sampled, in the plural.
    """
    size, duration = size_in_words(result["file_bytes"]), duration_in_words(result["seconds"])
    return f"{result['target']}: {result['weights']} weights, {result['prompts']} {sampled}, {size}, in {duration}"


def comparison_lines(path: str | os.PathLike, result: Mapping[str, Any], every_layer: bool) -> list[str]:
    """The result of `compare_files`: a summary, and its layers.

    Args:
        path: the container.
        result: what `compare_files` returned.
        every_layer: list all layers, in the file's order; otherwise the WORST.
    """
    with NFQFile(path) as file:
        lines = [f"{path}: {share_in_words(file.file_bytes, file.facts.source.bytes)}"]
    layers = result["layers"]
    lines.append(f"all {len(layers)} layers together: {decibels_in_words(result['sqnr_db'])}")
    lines += [f"{each['name']}: {decibels_in_words(each['sqnr_db'])}" for each in result.get("components", ())]
    lines += [f"{name}: not compared, ORIGINAL has none" for name in result.get("not_compared", ())]
    lines.append("dB: weights divided by their error; more is closer to the original, 6 dB are one bit")
    if every_layer or len(layers) <= WORST:
        shown = layers
    else:
        by_error = sorted((each for each in layers if each["sqnr_db"] is not None), key=lambda each: each["sqnr_db"])
        shown = by_error[:WORST]
        lines.append(f"the {len(shown)} layers with the largest errors (--all lists all {len(layers)}):")
    names = [printable(layer["name"], MAX_LINE) for layer in shown]
    width = max(map(len, names), default=0)
    for name, layer in zip(names, shown, strict=True):
        figures = f"{layer['bits_per_weight']:6.3f} bits  {decibels_in_words(layer['sqnr_db']):>9}"
        lines.append(f"{name:{width}}  {layer['format']:12}  {figures}")
    return lines


def batch_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of `convert_folders`: a line for each file, and one with the totals."""
    rows, totals = report["files"], report["totals"]
    width = max((len(row["source"]) for row in rows), default=0)
    texts = (f"{_spaced(row['result']):10}  {row['source']:{width}}  {_outcome(row)}".rstrip() for row in rows)
    lines = map(printable, texts)
    counts = ", ".join(f"{totals[result]} {_spaced(result)}" for result in Result if totals[result])
    if not totals[Result.CONVERTED]:
        return [*lines, counts or "no model file found"]
    sizes = share_in_words(totals["file_bytes"], totals["original_bytes"])
    return [*lines, f"{counts}; {sizes}, in {duration_in_words(totals['seconds'])}", BATCH_NEXT]


def _spaced(result: str) -> str:
    return Result(result).value.replace("_", " ")


def _outcome(row: Mapping[str, Any]) -> str:
    """The text after a file's name."""
    if row["file_bytes"]:
        seconds = "" if row["seconds"] is None else f", in {duration_in_words(row['seconds'])}"
        return f"{row['kind']}, {share_in_words(row['file_bytes'], row['original_bytes'])}{seconds}"
    target = f"→ {row['target']}" if row["result"] == Result.TO_CONVERT else ""
    return ": ".join(filter(None, (row["kind"], row["reason"] or target)))
