"""How fast a CPU decodes, beside what one would pick instead: `python -m benchmarks.speed.decode`.

One hundred million weights into a buffer that is used again, on one thread and on all. Beside it, in turns in the same
process: a plain copy of the result; bitsandbytes' NF4, which makes a new tensor; gguf-py's Q4_0 and Q4_K, which make
new fp32 arrays in numpy on one thread and get a tenth of the weights. What is not installed (`pip install -e
".[bench]"`) is left out, and said to be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from nfq_core import quantize
from nfq_core.packed.formats import LEVELS

from ..shared import gaussian, in_turns, machine, markdown_table, summary, unavailable, write_results

SHAPE = (10240, 10240)
PART = 10
"""What is too slow for all weights gets one part in so many."""


def copied() -> tuple[Callable[[], object], int]:
    """Copy the result from one warm buffer to another; the work, and its number of weights."""
    source, target = torch.zeros(SHAPE, dtype=torch.float16), torch.zeros(SHAPE, dtype=torch.float16)
    return lambda: target.copy_(source), source.numel()


def ours(levels: int) -> tuple[Callable[[], object], int]:
    """Decode an NFTensor into a warm buffer."""
    tensor = quantize(gaussian(SHAPE, 1), levels)
    out = torch.zeros(SHAPE, dtype=torch.float16)
    return lambda: tensor.dequantize(out=out), tensor.numel()


def bitsandbytes_nf4() -> tuple[Callable[[], object], int]:
    """bitsandbytes' NF4 on the CPU, blocks of 64; it takes no buffer there."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(gaussian(SHAPE, 1), blocksize=64, quant_type="nf4")
    return lambda: dequantize_4bit(packed, state), SHAPE[0] * SHAPE[1]


def ggml(name: str) -> tuple[Callable[[], object], int]:
    """gguf-py's decode of random bytes, whose speed does not depend on what they say."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    blocks = SHAPE[0] * SHAPE[1] // PART // block
    data = np.random.default_rng(0).integers(0, 60, (blocks, size), dtype=np.uint8)
    return lambda: dequantize(data, kind), blocks * block


PEERS = {
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes_nf4),
    "gguf-py Q4_0": ("gguf", partial(ggml, "Q4_0")),
    "gguf-py Q4_K": ("gguf", partial(ggml, "Q4_K")),
}
"""By name, the package that each needs, and what makes it."""


def run(rounds: int) -> dict:
    """Measure everything in turns; nanoseconds per weight, on one thread and on all that there are."""
    makers = {"copy": copied, **{f"nf{levels}": partial(ours, levels) for levels in LEVELS}}
    skipped = {}
    for name, (package, make) in PEERS.items():
        reason = unavailable(package)
        if reason:
            skipped[name] = reason
            print(f"{name} is left out: {reason}")
        else:
            makers[name] = make
    contestants = {name: make() for name, make in makers.items()}
    threads = torch.get_num_threads()
    results = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        taken = in_turns({name: work for name, (work, _) in contestants.items()}, rounds)
        results[str(count)] = {
            name: summary([1e9 * seconds / contestants[name][1] for seconds in found]) for name, found in taken.items()
        }
    torch.set_num_threads(threads)
    return {"weights": SHAPE[0] * SHAPE[1], "skipped": skipped, "nanoseconds_per_weight": results}


def table(results: dict) -> str:
    """The README's table: billions of weights a second, and the time beside that of a plain copy."""
    by_threads = results["nanoseconds_per_weight"]
    rows = []
    for name in next(iter(by_threads.values())):
        row = [name]
        for found in by_threads.values():
            own, copy = found[name], found["copy"]
            rates = " – ".join(f"{1 / own[which]:.2f}" for which in ("max", "min"))
            row.append(f"{1 / own['median']:.2f} ({rates}) = {own['median'] / copy['median']:.1f} × a copy's time")
        rows.append(row)
    facts = results["machine"]
    header = ["10⁹ weights a second", *(f"{count} thread{'s' * (count != '1')}" for count in by_threads)]
    return f"{markdown_table(header, rows)}\n\n{facts['processor']}, torch {facts['torch']}, {facts['date']}."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    results = run(parser.parse_args().rounds)
    write_results("decode", results)
    print(table({"machine": machine(), **results}))
