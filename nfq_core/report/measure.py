"""Measure the error of files against their original, for each layer and each role of layers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoints.examine import compare_files, container_info, of_main_component
from ..decibels import pooled_sqnr_db
from ..errors import NFQError
from ..files.container import SUFFIX, NFQFile
from ..files.original import Original
from ..models.roles import OTHER_CONVOLUTION, OTHER_LINEAR, ROLES, common_names, role, stage
from ..models.unet import detect, is_unet_key
from ..parallel import Progress, no_progress
from ..version import __version__

SUFFIXES = (SUFFIX, ".safetensors")


def measure(
    original: str | os.PathLike, files: Sequence[str | os.PathLike], *, progress: Progress = no_progress
) -> dict[str, Any]:
    """Compare files with the original that they were made from.

    In a file with a UNet, its bits, errors and layers are those of the UNet.

    Args:
        original: a safetensors file in any key layout, or a sharded model by its index or folder.
        files: `.nfq.safetensors` files that were made from it.
        progress: see `parallel.Progress`, over all files.

    Returns:
        `version`, `original` (`name`, `bytes`, `sha256`) and `files`, in the given order. Each file has the keys of
        `examine.container_info` without `source`, and `name` (see `short_names`), `header_sha256`,
        `unet_bits_per_weight` (stored bytes of the UNet's tensors, kept ones too, × 8 ÷ their number of weights; None
        without a UNet), `sqnr_db` (see `examine.compare_files`), `note` (a warning if its source was another file, else
        empty), `roles` (each `role`, `group`, `layers`, `weights`, `bits_per_weight`, `sqnr_db`) and `layers` in
        forward order (each also `common_name`, `role`, `group`, `stage`, `sqnr_db`).

    Raises:
        NFQError: a file is missing, damaged, not made from this original, or given twice.
    """
    names = short_names(files)
    with Original(original) as file:
        before = {"name": _readable(file.path.name), "bytes": file.file_bytes, "sha256": file.sha256()}
    measured = []
    for number, (path, name) in enumerate(zip(files, names, strict=True)):

        def report(done: int, total: int, tensor: str, number: int = number) -> None:
            progress(number * total + done, len(files) * total, tensor)

        measured.append(_measure_file(original, before, path, name, report))
    return {"version": __version__, "original": before, "files": measured}


def short_names(files: Sequence[str | os.PathLike]) -> list[str]:
    """A unique name for each file: the last parts of its path, as few as possible.

    Raises:
        NFQError: a file is given twice.
    """
    paths = [Path(os.path.abspath(path)) for path in files]
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise NFQError(f"{twice} is named twice; name it once")
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = [_readable("/".join(path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _readable(name: str) -> str:
    """Escape the bytes of a file name that are not Unicode."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def by_size(files: Iterable[str | os.PathLike]) -> list[str | os.PathLike]:
    """Sort files by size, the largest first; missing files come last, and `measure` reports them."""
    return sorted(files, key=lambda path: (-os.path.getsize(path) if os.path.isfile(path) else 0, str(path)))


def label(name: str) -> str:
    """A file's name without its suffix, for plots and tables."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] or name


def _measure_file(
    original: str | os.PathLike, before: Mapping[str, Any], path: str | os.PathLike, name: str, progress: Progress
) -> dict[str, Any]:
    compared = compare_files(original, path, progress=progress)
    ratios = {layer["name"]: layer["sqnr_db"] for layer in compared["layers"]}
    with NFQFile(path) as file:
        shapes = file.shapes()
        info = detect(shapes)
        unet = [key for key in shapes if info and is_unet_key(info, key)]
        ratios = {key: ratios[key] for key in unet if key in ratios} or ratios
        ratio = pooled_sqnr_db((file.quantized[key].weights, one) for key, one in ratios.items())
        lost = sum(file.quantized[key].weights for key, one in ratios.items() if one is not None and one <= 0)
        # A few almost constant layers of the right original may be lost too.
        if 2 * lost > sum(file.quantized[key].weights for key in ratios):
            raise NFQError(
                f"{path} was not made from {original}: its error is as large as the weights ({ratio:.1f} dB)"
            )
        facts = of_main_component(container_info(file))
        common = common_names(info, shapes)
        unet_bytes, unet_weights = sum(map(file.stored_bytes, unet)), sum(prod(shapes[key]) for key in unet)
        header_sha256 = file.header_sha256
    source = facts.pop("source")
    known = {layer["name"]: layer for layer in facts.pop("layers")}
    layers = []
    for key in (key for key in common if key in ratios):
        part = role(common[key], known[key]["shape"])
        place = {"common_name": common[key], "role": part.name, "group": part.group, "stage": stage(common[key])}
        layers.append({**known[key], **place, "sqnr_db": ratios[key]})
    return {
        "name": name,
        "header_sha256": header_sha256,
        **facts,
        "unet_bits_per_weight": unet_bytes * 8 / unet_weights if unet_weights else None,
        "sqnr_db": ratio,
        "note": _note(source, before),
        "roles": _roles(layers),
        "layers": layers,
    }


def _note(source: Mapping[str, str], before: Mapping[str, Any]) -> str:
    """A warning if a file was made from another source than the original; else empty."""
    if source["sha256"] in ("", before["sha256"]):
        return ""
    return f"made from another file ({source['name'] or 'without a name'}), whose difference is part of the error"


def _roles(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for part in (*ROLES, OTHER_LINEAR, OTHER_CONVOLUTION):
        members = [layer for layer in layers if layer["role"] == part.name]
        weights = sum(prod(layer["shape"]) for layer in members)
        if not members:
            continue
        stored = sum(layer["bits_per_weight"] * prod(layer["shape"]) for layer in members)
        rows.append(
            {
                "role": part.name,
                "group": part.group,
                "layers": len(members),
                "weights": weights,
                "bits_per_weight": stored / weights,
                "sqnr_db": pooled_sqnr_db((prod(layer["shape"]), layer["sqnr_db"]) for layer in members),
            }
        )
    return rows
