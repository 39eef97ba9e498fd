"""Trellis formats beside the scalar ones: error, bits and time: `python -m benchmarks.trellis`.

Gaussian and Student-t weights (2048 × 2048), a convolution whose channels differ (1280 × 320 × 3 × 3) and the demo
model, every weight in the given format, on one thread. Beside that: how long one search takes by window, and how fast
each format decodes.
"""

from __future__ import annotations

import statistics
from time import perf_counter

import torch

from nfq_core import quantize
from nfq_core.codebook import EFFORTS
from nfq_core.codec import encode
from nfq_core.examine import sqnr_db
from nfq_core.formats import BLOCK, TRELLIS_IDS, BlockFormat, Scales
from nfq_core.trellis import TrellisCoder

from .quality_weights import DEMO, SHAPE, demo_weights, random_weights
from .report import machine, markdown_table, summary, timed, write_results
from .synthetic import gaussian

SCALAR_IDS = ("nf7_b64", "nf16_b64", "nf32_b64")
WINDOWS = (8, 9, 10, 12)
ROUNDS = 7
TIMED_BLOCKS = 2048


def sources() -> dict[str, list[torch.Tensor]]:
    """The weights to measure on, by name."""
    return {name: [weight] for name, weight in random_weights().items()} | {DEMO: list(demo_weights())}


def measure(weights: list[torch.Tensor], format: str, effort: str) -> dict:
    """Bits per weight packed and on disk, SQNR (weight-count mean), and seconds per million weights to quantise."""
    total = packed = stored = 0
    noise = seconds = 0.0
    for weight in weights:
        started = perf_counter()
        tensor = quantize(weight, format=format, effort=effort)
        seconds += perf_counter() - started
        total += weight.numel()
        packed += tensor.nbytes
        stored += sum(map(len, encode(tensor.data, tensor.format.sections(weight.numel()))))
        noise += weight.numel() * sqnr_db(weight, tensor.dequantize())
    return {
        "packed_bits_per_weight": 8 * packed / total,
        "bits_per_weight": 8 * stored / total,
        "sqnr_db": noise / total,
        "seconds_per_million": seconds / total * 1e6,
    }


def search_seconds() -> dict[str, dict]:
    """Seconds per million weights of one search with four-bit codes, by window, in turns."""
    blocks = torch.randn(TIMED_BLOCKS, BLOCK, generator=torch.Generator().manual_seed(0))
    coders = {}
    for window in WINDOWS:
        fmt = BlockFormat("", 1 << window, 16, 2, 0, Scales.LOGARITHMIC, window)
        levels = torch.randn(fmt.levels, generator=torch.Generator().manual_seed(1))
        coders[str(window)] = TrellisCoder(levels, fmt, blocks.device)
    samples: dict[str, list[float]] = {name: [] for name in coders}
    for _ in range(ROUNDS):
        for name, coder in coders.items():
            samples[name].append(timed(lambda coder=coder: coder.encode(blocks)) / blocks.numel() * 1e6)
    return {name: summary(values) for name, values in samples.items()}


def decode_rates() -> dict[str, dict]:
    """Billions of weights a second into a warm buffer, in turns."""
    weight = gaussian(SHAPE, 1)
    tensors = {id: quantize(weight, format=id) for id in (*SCALAR_IDS, *TRELLIS_IDS)}
    out = torch.empty(SHAPE, dtype=torch.float16)
    samples: dict[str, list[float]] = {id: [] for id in tensors}
    for _ in range(5 * ROUNDS):
        for id, tensor in tensors.items():
            samples[id].append(weight.numel() / timed(lambda tensor=tensor: tensor.dequantize(out=out)) / 1e9)
    return {id: summary(values) for id, values in samples.items()}


def run() -> dict:
    """All measurements, as written to the results."""
    torch.set_num_threads(1)
    results = {"search_seconds_per_million": search_seconds(), "decode_billions_per_second": decode_rates(), "rows": []}
    for name, weights in sources().items():
        for format in (*SCALAR_IDS, *TRELLIS_IDS):
            efforts = EFFORTS if format in TRELLIS_IDS else ("fast",)
            for effort in efforts:
                row = {"source": name, "format": format, "effort": effort, **measure(weights, format, effort)}
                results["rows"].append(row)
                print(row, flush=True)
    return results


def table(results: dict) -> str:
    """dB of each format on each kind of weights, its packed bits, and the median seconds to quantise."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        rows.setdefault((row["format"], row["effort"]), []).append(row)
    header = ["format", "effort", *(row["source"] for row in next(iter(rows.values()))), "packed bits", "s per million"]
    lines = []
    for (format, effort), found in rows.items():
        seconds = statistics.median(row["seconds_per_million"] for row in found)
        bits = f"{found[0]['packed_bits_per_weight']:.3f}"
        lines.append([format, effort, *(f"{row['sqnr_db']:.2f}" for row in found), bits, f"{seconds:.2f}"])
    return markdown_table(header, lines)


if __name__ == "__main__":
    print(machine())
    results = run()
    write_results("trellis", "python -m benchmarks.trellis", results)
    print(table(results))
