"""Growth over long use: `python tests/slow/endurance.py [--dir DIR]`.

`demo`, in this process: load a file of the demo model, put its packed weights into the UNet, sample, add a LoRA,
sample, remove it, and free everything; every fifth cycle also quantises a layer, saves a file and reads it back.
`host`, in a real ComfyUI as in `tests/host`: load, LoRA, sample with CFG, and unload; every fifth cycle quantises and
saves. Recorded at intervals are the process's own memory (without mapped files), file handles and threads. Growth is
the median of the last quarter less that of the second: the first quarter fills caches.

`crowd`: several processes, each with several threads, load and save the same files at once, and check every number. For
Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from time import monotonic, sleep

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import nfq_core
from benchmarks.shared import RESULTS, ROOT, argument_parser, machine, process_status, with_origin, write_json
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.demo.model import build_pipeline, bundled_weights_path, sample, split_weights
from nfq_core.layers import PackedLayer, assign_state, packed_layers
from nfq_core.layers.low_rank import LowRank

CAPTION = "a red circle"
RANK = 4
NOTES = 40
"""Number of times in a run that the process's state is recorded."""

SETTLED_SECONDS, SETTLED_BYTES, MAX_SETTLING_SECONDS = 1.0, 1 << 20, 15.0
"""A host has settled when its memory changes by less than these bytes in these seconds; then the longest wait."""

PARTS = ("demo", "crowd", "host")

PROCESSES, THREADS, ROUNDS = 3, 3, 40


def state_of(pid: int | str = "self") -> dict[str, int]:
    """A process's own memory in bytes, its open file handles and its threads."""
    status = process_status(pid)
    handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"bytes": status["RssAnon"], "handles": handles, "threads": status["Threads"]}


def settled_state(pid: int) -> dict[str, int]:
    """`state_of` once the process has freed what it is going to free: a host does so on another thread."""
    state, until = state_of(pid), monotonic() + MAX_SETTLING_SECONDS
    while monotonic() < until:
        sleep(SETTLED_SECONDS)
        before, state = state, state_of(pid)
        if abs(before["bytes"] - state["bytes"]) < SETTLED_BYTES:
            break
    return state


def growth(states: list[dict[str, int]]) -> dict[str, float]:
    """By how much each figure's median over the last quarter is above that over the second."""
    quarter = max(1, len(states) // 4)

    def middle(part: list[dict[str, int]], name: str) -> float:
        return statistics.median(state[name] for state in part)

    second, last = states[quarter : 2 * quarter], states[-quarter:]
    return {name: middle(last, name) - middle(second, name) for name in states[0]}


def repeat(cycle: Callable[[int], None], cycles: int, look: Callable[[], dict[str, int]]) -> dict:
    """Run the cycles and look at the process between them."""
    every = max(1, cycles // NOTES)
    states = [look()]
    for number in range(1, cycles + 1):
        cycle(number)
        if number % every == 0:
            gc.collect()
            states.append(look())
            print(f"{number:6} {states[-1]['bytes'] / 2**20:9.1f} MiB {states[-1]}", flush=True)
    return {"cycles": cycles, "growth": growth(states), "states": states}


def demo_cycle(folder: Path) -> Callable[[int], None]:
    """One cycle of the demo model in this process; every picture must be the first cycle's."""
    path = folder / "demo.nfq.safetensors"
    quantize_file(bundled_weights_path(), path)
    weight = nfq_core.load(path, ["conv_in.weight"])["conv_in.weight"]
    first: dict[str, tuple] = {}

    def draw(pipeline: torch.nn.Module) -> bytes:
        return sample(pipeline, [CAPTION], steps=1).tobytes()

    def lora(layer: PackedLayer) -> LowRank:
        rows, columns = layer.weight_shape[0], prod(layer.weight_shape[1:])
        generator = torch.Generator().manual_seed(rows)
        up, down = (torch.randn(shape, generator=generator) for shape in ((rows, RANK), (RANK, columns)))
        return LowRank(up * 0.01, down)

    def cycle(number: int) -> None:
        loaded = nfq_core.load(path)
        with torch.device("meta"):
            pipeline = build_pipeline()
        unet, text = split_weights(
            {key: value if isinstance(value, nfq_core.NFTensor) else value.float() for key, value in loaded.items()}
        )
        assign_state(pipeline.unet, unet)
        assign_state(pipeline.text, text)
        plain = draw(pipeline)
        for layer in packed_layers(pipeline.unet).values():
            layer.low_rank = lora(layer)
        with_lora = draw(pipeline)
        for layer in packed_layers(pipeline.unet).values():
            layer.low_rank = None
        drawn = (plain, with_lora)
        if drawn != first.setdefault("drawn", drawn) or with_lora == plain:
            raise AssertionError(f"cycle {number} drew another picture")
        if number % 5 == 0:
            tensors = {"weight": nfq_core.quantize(weight.float()), "bias": torch.zeros(3)}
            nfq_core.save(tensors, folder / "one.nfq.safetensors", overwrite=True)
            nfq_core.load(folder / "one.nfq.safetensors")

    return cycle


def host_cycles(directory: Path, cycles: int) -> dict:
    """Cycles in a real host."""
    from driver import Host, make_base
    from graphs import OURS, lora, quantize, sample, save
    from models import random_adapter, write_unet
    from safetensors.torch import save_file

    from nfq_core.models.unet_keys import SEGMIND_VEGA

    base = directory / "comfyui"
    if not base.exists():
        make_base(base)
        unets = base / "models" / "diffusion_models"
        write_unet(unets / "vega.safetensors", SEGMIND_VEGA)
        quantize_file(unets / "vega.safetensors", unets / "vega.nfq.safetensors")
        save_file(random_adapter(SEGMIND_VEGA, "lora", 0), base / "models" / "loras" / "lora.safetensors")
    # glibc keeps what is freed in pieces of up to 32 MB for later, which would hide what the host itself keeps.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    host = Host(base)
    first: dict[str, torch.Tensor] = {}

    def cycle(number: int) -> None:
        graph = {"model": OURS, "lora": lora("lora", 0.8, ["model", 0])}
        latent = host.latent(sample(graph, ["lora", 0]))
        if not torch.equal(first.setdefault("latent", latent), latent):
            raise AssertionError(f"cycle {number} computed another latent")
        if number % 5 == 0:
            stock = {"class_type": "UNETLoader", "inputs": {"unet_name": "vega.safetensors", "weight_dtype": "default"}}
            graph = {
                "stock": stock,
                "made": quantize(["stock", 0]),
                "saved": save(["made", 0], "again", overwrite=True),
            }
            host.run(graph)
        host.free()

    try:
        return repeat(cycle, cycles, lambda: settled_state(host.process.pid))
    finally:
        host.close()


def crowd(folder: Path) -> dict:
    """Several processes with several threads each load and save the same files; every number is looked at."""
    path = folder / "crowd.nfq.safetensors"
    tensors = {f"layer.{i}.weight": torch.randn(256, 256, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    nfq_core.save(nfq_core.quantize_state_dict(tensors), path)
    command = [sys.executable, __file__, "--member", str(folder)]
    members = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(PROCESSES)]
    failed = sum(member.wait() != 0 for member in members)
    left = [name.name for name in folder.iterdir() if name.suffix == ".tmp"]
    return {"processes": PROCESSES, "threads": THREADS, "rounds": ROUNDS, "failed": failed, "left_behind": left}


def member(folder: Path, number: int) -> None:
    """What one process of the crowd does; an exception where a file is not what some member wrote."""
    path = folder / "crowd.nfq.safetensors"
    expected = {key: value.data for key, value in nfq_core.load(path).items()}

    def work(thread: int) -> None:
        for turn in range(ROUNDS):
            loaded = nfq_core.load(path)
            if not all(torch.equal(loaded[key].data, data) for key, data in expected.items()):
                raise AssertionError(f"member {number}, thread {thread}, round {turn}: other numbers")
            # All write the same numbers to one target, replacing what another reads.
            nfq_core.save(loaded, path, overwrite=True)
            with nfq_core.NFQFile(path) as file:
                for key in loaded:
                    file.verify(key)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    if threading.active_count() > 1:
        raise AssertionError("threads are left")


def run(parts: Sequence[str], cycles: int, host_rounds: int, directory: Path | None) -> dict:
    """What was asked for, by part, each with the command and the machine that made it."""
    made: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "demo" in parts:
            made["demo"] = repeat(demo_cycle(Path(folder)), cycles, state_of)
        if "crowd" in parts:
            made["crowd"] = crowd(Path(folder))
    if "host" in parts and directory:
        directory.mkdir(parents=True, exist_ok=True)
        made["host"] = host_cycles(directory, host_rounds)
    return {part: with_origin(found) for part, found in made.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a member of the crowd failed or left a file behind."""
    parser = argument_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--cycles", type=int, default=1000, help="in this process (default: %(default)s)")
    parser.add_argument("--host-cycles", type=int, default=50, help="in the host (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="folder for the host's models, about 2 GB; needs COMFYUI_PATH")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/endurance.json)")
    parser.add_argument("--member", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.member:
        member(Path(options.member[0]), int(options.member[1]))
        return 0
    if options.dir and not os.environ.get("COMFYUI_PATH"):
        parser.error("--dir needs a ComfyUI: name its folder in COMFYUI_PATH")
    print(machine())
    results = run(options.parts, options.cycles, options.host_cycles, options.dir)
    path = options.out or RESULTS / "endurance.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write_json(path, before | results)
    print(path)
    found = results.get("crowd", {})
    return 1 if found.get("failed") or found.get("left_behind") else 0


if __name__ == "__main__":
    sys.exit(main())
