"""fp16, our formats and ComfyUI-GGUF in a real ComfyUI: `python -m benchmarks.hosts.comfyui --dir DIR`.

COMFYUI_PATH names the host and COMFYUI_PYTHON its Python. ComfyUI-GGUF takes part at Q4_0 if COMFYUI_GGUF names a
checkout and `gguf` is installed here. Every measurement is a fresh process of the host, in turns: a prompt samples with
a UNet of Segmind Vega's shapes and random weights. Peak memory is less the idle host's. LoRAs have rank 32, on three
linear layers of every transformer block. For Linux.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median_high
from time import time
from typing import NamedTuple

from safetensors.torch import load_file, save_file

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.models.unet_keys import SEGMIND_VEGA
from nfq_core.planning.settings import Formats, Settings

from ..shared import argument_parser, dated_table, spread, summary, write_results

STEPS, PIXELS = 3, 512
LORAS, RANK = 4, 32


class Contestant(NamedTuple):
    """The file that a contestant loads, and the number of LoRAs."""

    label: str
    file: str
    loras: int = 0

    def graph(self) -> dict:
        """The loading nodes; the last one is named `model`."""
        from graphs import lora

        node, inputs = LOADERS[self.file]
        nodes = {"lora 0": {"class_type": node, "inputs": {"unet_name": self.file, **inputs}}}
        for number in range(1, self.loras + 1):
            nodes[f"lora {number}"] = lora(f"lora-{number}", 0.5, [f"lora {number - 1}", 0])
        nodes["model"] = nodes.pop(f"lora {self.loras}")
        return nodes


FP16, NFQ, GGUF = "model.safetensors", "model.nfq.safetensors", "model.gguf"
# By file: the loader node, and its further inputs.
LOADERS = {
    FP16: ("UNETLoader", {"weight_dtype": "default"}),
    NFQ: ("NFQuantizedUNetLoader", {}),
    GGUF: ("UnetLoaderGGUF", {}),
}
CONTESTANTS = {
    "fp16": Contestant("fp16, stock loader", FP16),
    "nfq": Contestant("NFQ, 16 levels", NFQ),
    "gguf": Contestant("ComfyUI-GGUF, Q4_0", GGUF),
    "fp16_loras": Contestant(f"fp16, {LORAS} LoRAs", FP16, LORAS),
    "nfq_lora": Contestant("NFQ, a LoRA", NFQ, 1),
    "nfq_loras": Contestant(f"NFQ, {LORAS} LoRAs", NFQ, LORAS),
    "gguf_loras": Contestant(f"ComfyUI-GGUF, {LORAS} LoRAs", GGUF, LORAS),
}
# By figure: its label, unit, and the unit's size.
COLUMNS = {
    "to_first_step_s": ("Queue → first step", " s", 1),
    "to_first_step_end_s": ("Queue → first step's end", " s", 1),
    "step_s": ("a step", " s", 1),
    "peak_bytes": ("peak memory", " GB", 1e9),
}


def write_gguf(source: Path, target: Path) -> None:
    """Write a UNet at Q4_0 as ComfyUI-GGUF reads it; rows that are no multiple of 256 are cut anew."""
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


def prepare(directory: Path) -> tuple[Path, list[str]]:
    """Make the host's base folder with the models; returns it and the contestants that take part."""
    from driver import make_base
    from models import random_adapter, write_unet

    base = directory / "comfyui"
    unets, adapters = base / "models" / "diffusion_models", base / "models" / "loras"
    if not base.exists():
        make_base(base)
        write_unet(unets / FP16, SEGMIND_VEGA)
        quantize_file(unets / FP16, unets / NFQ, Settings(Formats()))
        for number in range(1, LORAS + 1):
            lora = random_adapter(SEGMIND_VEGA, "lora", number, RANK)
            save_file(lora, adapters / f"lora-{number}.safetensors")
    if not os.environ.get("COMFYUI_GGUF"):
        return base, [name for name in CONTESTANTS if not name.startswith("gguf")]
    plugin = base / "custom_nodes" / "ComfyUI-GGUF"
    if not plugin.exists():
        plugin.symlink_to(os.environ["COMFYUI_GGUF"])
        write_gguf(unets / FP16, unets / GGUF)
    return base, list(CONTESTANTS)


def measure(base: Path, contestant: str) -> dict[str, float]:
    """One prompt in a fresh host."""
    from driver import Host
    from graphs import sample

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
    return {
        "to_first_step_s": calls[0][0] - queued,
        "to_first_step_end_s": calls[0][1] - queued,
        "step_s": median_high(end - start for start, end in calls[1:]),
        "peak_bytes": peak - before,
    }


def table(results: dict) -> str:
    """Times and memory of every contestant, with ratios to fp16."""
    found, rows = results["contestants"], []
    for name in (name for name in CONTESTANTS if name in found):
        cells = [CONTESTANTS[name].label, f"{results['file_bytes'][name] / 1e9:.2f} GB"]
        for key, (_, unit, scale) in COLUMNS.items():
            ratio = found[name][key]["median"] / found["fp16"][key]["median"]
            cell = spread(found[name][key], unit, scale=scale)
            cells.append(cell if name == "fp16" else f"{cell} = {ratio:.2f} ×")
        rows.append(cells)
    title = f"{results['architecture']}, {results['pixels']} px, CFG"
    header = [title, "file", *(label for label, _, _ in COLUMNS.values())]
    return dated_table(header, rows, results, f"ComfyUI {results['host']}")


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the models and the host's files")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each contestant (default: 3)")
    options = parser.parse_args()
    base, contestants = prepare(options.dir.resolve())
    samples: dict[str, list[dict]] = {name: [] for name in contestants}
    for _ in range(options.runs):
        for name, runs in samples.items():
            runs.append(measure(base, name))
            print(name, runs[-1], flush=True)
    unets = base / "models" / "diffusion_models"
    summaries = {name: {key: summary([run[key] for run in runs]) for key in COLUMNS} for name, runs in samples.items()}
    results = {
        "architecture": SEGMIND_VEGA.name,
        "host": (Path(os.environ["COMFYUI_PATH"]) / "comfyui_version.py").read_text().split('"')[1],
        "pixels": PIXELS,
        "steps": STEPS,
        "file_bytes": {name: (unets / CONTESTANTS[name].file).stat().st_size for name in contestants},
        "contestants": summaries,
    }
    print(write_results("host", results))
