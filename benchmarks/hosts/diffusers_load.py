"""Memory that loading SDXL's UNet in diffusers takes: `python -m benchmarks.hosts.diffusers_load --dir DIR`.

Makes a folder of synthetic fp16 weights (5.14 GB) in DIR and a quantised file of it, unless they exist, and loads each
way in a process of its own. The peaks are Linux's: of all resident memory (VmHWM), which counts the pages of mapped
files, and of the process's own memory (anonymous pages, read fifty times per second).
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.memory import needed_bytes
from nfq_core.files.container import NFQFile
from nfq_core.models.unet_keys import SDXL_BASE

from ..shared import argument_parser, json_of, markdown_table, process_status, timed, write_results, write_sdxl_unet

SAMPLES_PER_SECOND = 50


def from_pretrained(folder: Path, **settings: object) -> torch.nn.Module:
    """diffusers' own loader."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16, **settings)


def load_packed(folder: Path) -> torch.nn.Module:
    """`load_unet` of the quantised file."""
    from nfq_core.diffusers import load_unet

    return load_unet(folder / "sdxl.nfq.safetensors", folder)


def load_copied(folder: Path) -> torch.nn.Module:
    """fp16, copied to the process's own memory, as in a program that changes weights or closes the file."""
    model = from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def quantize_at_load(folder: Path) -> torch.nn.Module:
    """diffusers' loader with an `NFQConfig`."""
    from nfq_core.diffusers import NFQConfig

    return from_pretrained(folder, quantization_config=NFQConfig())


def load_nothing(folder: Path) -> object:
    """Import what the other ways import."""
    import diffusers

    import nfq_core.diffusers  # noqa: F401

    # Both are lazy about their parts.
    return diffusers.UNet2DConditionModel


# By name in the results: the label in the table, and the loading function.
LOADERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "imports": ("importing torch and diffusers", load_nothing),
    "load_unet": ("`load_unet`", load_packed),
    "fp16": ("`from_pretrained`, fp16, mapped", from_pretrained),
    "fp16_copied": ("the same, copied", load_copied),
    "quantised_at_load": ("`from_pretrained` with `NFQConfig()`", quantize_at_load),
}


def measure(kind: str, folder: Path) -> dict:
    """Load one way in this process; seconds and peaks."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1 / SAMPLES_PER_SECOND):
            peak = max(peak, process_status()["RssAnon"])

    watcher, kept = threading.Thread(target=watch, daemon=True), []
    watcher.start()
    seconds = timed(lambda: kept.append(LOADERS[kind][1](folder)))
    done.set()
    watcher.join()
    status = process_status()
    peak = max(peak, status["RssAnon"])
    return {"seconds": seconds, "peak_resident_bytes": status["VmHWM"], "peak_own_bytes": peak}


def run(folder: Path) -> dict:
    """All measurements, as written to the results."""
    from samples import unet_config

    folder.mkdir(parents=True, exist_ok=True)
    weights, quantised = folder / "diffusion_pytorch_model.safetensors", folder / "sdxl.nfq.safetensors"
    config = {"_class_name": "UNet2DConditionModel", **unet_config(SDXL_BASE)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not weights.exists():
        write_sdxl_unet(weights, "diffusers")
    if not quantised.exists():
        quantize_file(weights, quantised)
    with NFQFile(quantised) as file:
        dense_bytes, packed_bytes = needed_bytes(file)
    results: dict[str, dict] = {}
    for kind in LOADERS:
        results[kind] = json_of("benchmarks.hosts.diffusers_load", "--dir", str(folder), "--load", kind)
        print(kind, results[kind], flush=True)
    beyond_imports = results["load_unet"]["peak_resident_bytes"] - results["imports"]["peak_resident_bytes"]
    return {
        "packed_bytes": packed_bytes,
        "dense_bytes": dense_bytes,
        "load_unet_per_packed": round(beyond_imports / packed_bytes, 3),
        "loading": results,
    }


def table(results: dict) -> str:
    """Both peaks of every way to load."""
    rows = [
        [LOADERS[kind][0], *(f"{found[field] / 1e9:.2f} GB" for field in ("peak_own_bytes", "peak_resident_bytes"))]
        for kind, found in results["loading"].items()
    ]
    facts = results["machine"]
    note = (
        f"Packed weights take {results['packed_bytes'] / 1e9:.2f} GB: beyond the imports, `load_unet` needs "
        f"{results['load_unet_per_packed']:.2f} × that. torch {facts['torch']}, {facts['date']}."
    )
    header = ["SDXL's UNet in diffusers", "peak, own memory", "peak, mapped files too"]
    return f"{markdown_table(header, rows)}\n\n{note}"


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, default=Path("diffusers-data"), help="folder for the files, 7 GB")
    parser.add_argument("--load", choices=tuple(LOADERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measure(options.load, options.dir)))
    else:
        print(write_results("diffusers_load", run(options.dir)))
