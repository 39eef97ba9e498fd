"""Speed of the decode on a CPU, compared with other libraries: `python -m benchmarks.speed.decode`.

One hundred million weights into a buffer that is used again, on one thread and on all. Contestants: a plain copy; our
formats; bitsandbytes' NF4, which allocates its result; gguf-py's Q4_0 and Q4_K, which allocate fp32 arrays in numpy and
use one thread. A package that is not installed is left out and named (`pip install -e ".[bench]"`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from nfq_core import quantize
from nfq_core.packed.formats import LEVELS

from ..shared import gaussian, in_turns, markdown_table, run_command, summary, unavailable

SHAPE, ROUNDS = (10240, 10240), 9
PART = 10  # Slow peers get a tenth of the weights

Work = tuple[Callable[[], object], int]  # One decode, and the number of its weights


def copied() -> Work:
    """Copy the result from one warm buffer to another."""
    source, target = torch.zeros(SHAPE, dtype=torch.float16), torch.zeros(SHAPE, dtype=torch.float16)
    return lambda: target.copy_(source), source.numel()


def ours(levels: int) -> Work:
    """Decode an NFTensor into a warm buffer."""
    tensor, out = quantize(gaussian(SHAPE, 1), levels), torch.zeros(SHAPE, dtype=torch.float16)
    return lambda: tensor.dequantize(out=out), tensor.numel()


def bitsandbytes_nf4() -> Work:
    """bitsandbytes' NF4, which takes no buffer on a CPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(gaussian(SHAPE, 1), blocksize=64, quant_type="nf4")
    return lambda: dequantize_4bit(packed, state), SHAPE[0] * SHAPE[1]


def ggml(name: str) -> Work:
    """gguf-py's decode of random bytes; its speed does not depend on them."""
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
"""By name: the package that it needs, and the function that makes it."""


def run(rounds: int = ROUNDS) -> dict:
    """Nanoseconds per weight of every contestant, on one thread and on all."""
    skipped = {name: reason for name, (package, _) in PEERS.items() if (reason := unavailable(package))}
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}")
    makers = {"copy": copied, **{f"nf{levels}": partial(ours, levels) for levels in LEVELS}}
    makers |= {name: make for name, (_, make) in PEERS.items() if name not in skipped}
    works, weights = {}, {}
    for name, make in makers.items():
        works[name], weights[name] = make()
    threads, results = torch.get_num_threads(), {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        taken = in_turns(works, rounds)
        results[str(count)] = {
            name: summary([1e9 * seconds / weights[name] for seconds in found]) for name, found in taken.items()
        }
    return {"weights": SHAPE[0] * SHAPE[1], "skipped": skipped, "nanoseconds_per_weight": results}


def table(results: dict) -> str:
    """Billions of weights per second, and the time relative to a plain copy's."""
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
    run_command(__doc__, "decode", run)
