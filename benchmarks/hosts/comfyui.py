"""fp16, ours and ComfyUI-GGUF in the same host: `python -m benchmarks.hosts.comfyui --dir DIR`.

COMFYUI_PATH names the host, COMFYUI_PYTHON its Python; where COMFYUI_GGUF names a checkout of ComfyUI-GGUF, and its
Python package `gguf` is installed here, it takes part at Q4_0. Every measurement is a fresh process of the host, the
contestants in turns: a prompt is queued that loads a UNet with random weights and samples with CFG. Noted are the time
from Queue to the first step's beginning and end, the time of the following steps, and the process's peak resident
memory less what the host holds before. LoRAs have rank 32, on three linear layers of every transformer block; the
stock loader and ComfyUI-GGUF get four, ours one and four. For Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from time import time

from safetensors.torch import load_file, save_file

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.models.unet_keys import KNOWN_ARCHITECTURES

from ..shared import ROOT, markdown_table, summary, write_results

sys.path.insert(0, str(ROOT / "tests" / "host"))

from driver import Host, make_base
from graphs import lora, sample
from models import random_adapter, write_unet

RUNS = 3
STEPS = 3
PIXELS = 512

LORAS = 4
RANK = 32


@dataclass(frozen=True)
class Contestant:
    """Who loads which file, and how many LoRAs are put behind it."""

    label: str
    node: str
    file: str
    loras: int = 0

    def graph(self) -> dict:
        """The nodes that load, the last one named `model`."""
        inputs = {"unet_name": self.file} | ({"weight_dtype": "default"} if self.node == "UNETLoader" else {})
        nodes = {"lora 0": {"class_type": self.node, "inputs": inputs}}
        for number in range(1, self.loras + 1):
            nodes[f"lora {number}"] = lora(f"lora-{number}", 0.5, [f"lora {number - 1}", 0])
        nodes["model"] = nodes.pop(f"lora {self.loras}")
        return nodes


CONTESTANTS = {
    "fp16": Contestant("fp16, stock loader", "UNETLoader", "model.safetensors"),
    "nfq": Contestant("NFQ, 16 levels", "NFQuantizedUNetLoader", "model.nfq.safetensors"),
    "gguf": Contestant("ComfyUI-GGUF, Q4_0", "UnetLoaderGGUF", "model.gguf"),
    "fp16_loras": Contestant(f"fp16, {LORAS} LoRAs", "UNETLoader", "model.safetensors", LORAS),
    "nfq_lora": Contestant("NFQ, a LoRA", "NFQuantizedUNetLoader", "model.nfq.safetensors", 1),
    "nfq_loras": Contestant(f"NFQ, {LORAS} LoRAs", "NFQuantizedUNetLoader", "model.nfq.safetensors", LORAS),
    "gguf_loras": Contestant(f"ComfyUI-GGUF, {LORAS} LoRAs", "UnetLoaderGGUF", "model.gguf", LORAS),
}


def write_gguf(source: Path, target: Path) -> None:
    """Write a UNet as ComfyUI-GGUF reads it, weights at Q4_0; rows that are no multiple of 256 are cut anew."""
    import gguf

    writer = gguf.GGUFWriter(str(target), "sdxl")
    for key, weight in load_file(source).items():
        data = weight.float().numpy()
        if weight.dim() < 2 or weight.numel() % 256:
            writer.add_tensor(key, data)
            continue
        if data.shape[-1] % 256:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", tuple(map(int, data.shape)))
            data = data.reshape(-1, 256)
        quantized = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(key, quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(directory: Path, architecture: str) -> tuple[Path, list[str]]:
    """Make the base directory and the models in it; returns it and who takes part."""
    base = directory / "comfyui"
    unets = base / "models" / "diffusion_models"
    contestants = [name for name in CONTESTANTS if not name.startswith("gguf")]
    if not base.exists():
        make_base(base)
        chosen = next(known for known in KNOWN_ARCHITECTURES if known.name == architecture)
        write_unet(unets / "model.safetensors", chosen)
        quantize_file(unets / "model.safetensors", unets / "model.nfq.safetensors")
        for number in range(1, LORAS + 1):
            adapter = random_adapter(chosen, "lora", number, RANK)
            save_file(adapter, base / "models" / "loras" / f"lora-{number}.safetensors")
    if os.environ.get("COMFYUI_GGUF"):
        contestants = list(CONTESTANTS)
        plugin = base / "custom_nodes" / "ComfyUI-GGUF"
        if not plugin.exists():
            plugin.symlink_to(os.environ["COMFYUI_GGUF"])
            write_gguf(unets / "model.safetensors", unets / "model.gguf")
    return base, contestants


def measure(base: Path, contestant: str) -> dict[str, float]:
    """One prompt in a fresh host."""
    host = Host(base)
    try:
        before = host.resident_bytes()
        timer = {"class_type": "NFQTestTimer", "inputs": {"model": ["model", 0]}}
        graph = sample(CONTESTANTS[contestant].graph() | {"timer": timer}, ["timer", 0], "dpmpp_2m", steps=STEPS)
        graph["empty"]["inputs"] |= {"width": PIXELS, "height": PIXELS}
        queued = time()
        host.latent(graph)
        peak = host.peak_bytes()
        calls = host.check("step_times", {})
    finally:
        host.close()
    lengths = [end - start for start, end in calls[1:]]
    return {
        "to_first_step_s": calls[0][0] - queued,
        "to_first_step_end_s": calls[0][1] - queued,
        "step_s": sorted(lengths)[len(lengths) // 2],
        "peak_bytes": peak - before,
    }


def table(results: dict) -> str:
    """The README's table, with ratios to fp16."""
    files, rows = results["file_bytes"], []
    for name, contestant in CONTESTANTS.items():
        if name not in results["contestants"]:
            continue
        cells = [contestant.label, f"{files[name] / 1e9:.2f} GB"]
        for key, unit, scale in (
            ("to_first_step_s", "s", 1),
            ("to_first_step_end_s", "s", 1),
            ("step_s", "s", 1),
            ("peak_bytes", "GB", 1e9),
        ):
            got, base = results["contestants"][name][key], results["contestants"]["fp16"][key]
            spread = f"{got['median'] / scale:.2f} {unit} ({got['min'] / scale:.2f} – {got['max'] / scale:.2f})"
            cells.append(spread + ("" if name == "fp16" else f" = {got['median'] / base['median']:.2f} ×"))
        rows.append(cells)
    header = [
        f"{results['architecture']}, {results['pixels']} px, CFG",
        "file",
        "Queue → first step",
        "Queue → first step's end",
        "a step",
        "peak memory",
    ]
    told = results["machine"]
    where = f"{told['processors']} processors ({told['processor']}), ComfyUI {results['host']}, {told['date']}."
    return markdown_table(header, rows) + f"\n\n{where}"


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where models and the host's folders go")
    parser.add_argument("--architecture", default="Segmind Vega", help="a member of the SDXL family")
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    base, contestants = prepare(arguments.dir.resolve(), arguments.architecture)
    samples: dict[str, list[dict]] = {name: [] for name in contestants}
    for _ in range(arguments.runs):
        for name in contestants:
            samples[name].append(measure(base, name))
            print(name, json.dumps(samples[name][-1]), flush=True)
    unets = base / "models" / "diffusion_models"
    results = {
        "architecture": arguments.architecture,
        "host": (Path(os.environ["COMFYUI_PATH"]) / "comfyui_version.py").read_text().split('"')[1],
        "pixels": PIXELS,
        "steps": STEPS,
        "file_bytes": {name: (unets / CONTESTANTS[name].file).stat().st_size for name in contestants},
        "contestants": {
            name: {key: summary([run[key] for run in runs]) for key in runs[0]} for name, runs in samples.items()
        },
    }
    path = write_results("host", results)
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
