"""Memory that loading SDXL's UNet in diffusers takes: `python -m benchmarks.hosts.diffusers_load --dir DIR`.

Makes a folder of synthetic fp16 weights (5.14 GB) in DIR and a quantised file of it, unless they are there, and loads
each way in a process of its own. Peaks are Linux's: of all resident memory (VmHWM), and of what the process has to
itself (its anonymous pages, looked at fifty times a second). Pages of mapped files, which the system takes back when it
needs them, are in the first alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.memory import needed_bytes
from nfq_core.files.container import NFQFile

from ..shared import markdown_table, process_status, timed, write_results, write_sdxl_unet

SAMPLES_PER_SECOND = 50


def load_nothing(folder: Path) -> object:
    """Import what the others import."""
    import diffusers

    import nfq_core.diffusers  # noqa: F401

    # Both are lazy about their parts.
    return diffusers.UNet2DConditionModel


def load_packed(folder: Path) -> object:
    """`load_unet` of the quantised file."""
    from nfq_core.diffusers import load_unet

    return load_unet(folder / "sdxl.nfq.safetensors", folder)


def load_fp16(folder: Path) -> object:
    """diffusers' own loader."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)


def load_fp16_copied(folder: Path) -> object:
    """The same, in memory of its own, which a program needs that changes weights or lets go of the file."""
    model = load_fp16(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def quantize_at_load(folder: Path) -> object:
    """diffusers' loader with an `NFQConfig`."""
    from diffusers import UNet2DConditionModel

    from nfq_core.diffusers import NFQConfig

    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16, quantization_config=NFQConfig())


LOADERS: dict[str, Callable[[Path], object]] = {
    "imports": load_nothing,
    "load_unet": load_packed,
    "fp16": load_fp16,
    "fp16_copied": load_fp16_copied,
    "quantised_at_load": quantize_at_load,
}


class OwnMemory:
    """The most anonymous memory that this process had while it was watched."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> OwnMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, process_status()["RssAnon"])
            if self._stop.wait(1 / SAMPLES_PER_SECOND):
                return


def measure(kind: str, folder: Path) -> dict:
    """One way of loading, in this process."""
    kept = []
    with OwnMemory() as own:
        seconds = timed(lambda: kept.append(LOADERS[kind](folder)))
    return {"seconds": seconds, "peak_resident_bytes": process_status()["VmHWM"], "peak_own_bytes": own.peak}


def prepare(folder: Path) -> None:
    """The fp16 folder and the quantised file."""
    # Not where the loading processes would import it too.
    from ..speed.gpu.step import SDXL_CONFIG

    folder.mkdir(parents=True, exist_ok=True)
    weights, quantised = folder / "diffusion_pytorch_model.safetensors", folder / "sdxl.nfq.safetensors"
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **SDXL_CONFIG}))
    if not weights.exists():
        write_sdxl_unet(weights, "diffusers")
    if not quantised.exists():
        quantize_file(weights, quantised)


def run(folder: Path) -> dict:
    """All measurements, as written to the results."""
    prepare(folder)
    with NFQFile(folder / "sdxl.nfq.safetensors") as file:
        dense_bytes, packed_bytes = needed_bytes(file)
    results: dict[str, dict] = {}
    for kind in LOADERS:
        command = [sys.executable, "-m", "benchmarks.hosts.diffusers_load", "--dir", str(folder), "--load", kind]
        results[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(kind, results[kind], flush=True)
    beyond_imports = results["load_unet"]["peak_resident_bytes"] - results["imports"]["peak_resident_bytes"]
    return {
        "packed_bytes": packed_bytes,
        "dense_bytes": dense_bytes,
        "load_unet_per_packed": round(beyond_imports / packed_bytes, 3),
        "loading": results,
    }


def table(results: dict) -> str:
    """The README's table."""
    names = {
        "imports": "importing torch and diffusers",
        "load_unet": "`load_unet`",
        "fp16": "`from_pretrained`, fp16, mapped",
        "fp16_copied": "the same, copied",
        "quantised_at_load": "`from_pretrained` with `NFQConfig()`",
    }
    rows = [
        [names[kind], *(f"{found[field] / 1e9:.2f} GB" for field in ("peak_own_bytes", "peak_resident_bytes"))]
        for kind, found in results["loading"].items()
    ]
    machine = results["machine"]
    note = (
        f"Packed weights take {results['packed_bytes'] / 1e9:.2f} GB: beyond the imports, `load_unet` needs "
        f"{results['load_unet_per_packed']:.2f} × that. torch {machine['torch']}, {machine['date']}."
    )
    return (
        markdown_table(["SDXL's UNet in diffusers", "peak, own memory", "peak, mapped files too"], rows) + f"\n\n{note}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("diffusers-data"), help="where the files are, 7 GB")
    parser.add_argument("--load", choices=tuple(LOADERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measure(options.load, options.dir)))
    else:
        print(write_results("diffusers_load", run(options.dir)))
