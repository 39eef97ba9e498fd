"""Trellis formats beside the scalar ones: error, bits and time: `python -m benchmarks.trellis`.

Gaussian and Student-t weights (1024 × 1024), a convolution whose channels differ (640 × 320 × 3 × 3) and the demo
model, every weight in the given format, on one thread. Beside that: how long one search takes by window, how fast
each format decodes, and what SDXL's layers, were they such weights, get at the sizes in GOALS.

All times are those of the processor, on one thread: what else the machine does counts only as far as it takes caches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from math import log10, prod
from time import process_time

import torch

from nfq_core import quantize
from nfq_core.allocation import EXPECTED_SQNR_DB, allocate
from nfq_core.codebook import EFFORTS
from nfq_core.codec import encode
from nfq_core.examine import sqnr_db
from nfq_core.formats import BLOCK, TRELLIS_IDS, BlockFormat, Scales
from nfq_core.policy import DEFAULTS, plan_tensors
from nfq_core.safefile import Entry
from nfq_core.trellis import TrellisCoder
from nfq_core.unet_keys import SDXL_BASE, tensor_shapes

from .quality_weights import demo_weights
from .report import machine, markdown_table, summary, write_results
from .synthetic import channel_spread, gaussian, student_t

SCALAR_IDS = ("nf7_b64", "nf16_b64", "nf32_b64", "nf256_b64")

GOALS = {
    "Q3_K": (3.438, 3.15, {"gaussian": 16.43, "student_t5": 15.08, "convolution": 15.18}),
    "NF4": (4.127, 3.85, {"gaussian": 20.73, "student_t5": 19.59, "convolution": 19.30}),
    "Q4_K": (4.5, 4.15, {"gaussian": 22.93, "student_t5": 21.62, "convolution": 21.29}),
    "Q5_K": (5.5, 5.3, {"gaussian": 28.84, "student_t5": 27.54, "convolution": 27.21}),
}
"""What has to be reached: a peer's bits per weight, the packed bits that ours may take, and the peer's dB by source.

The peers' own quantisers (ggml's and, for NF4 with double quantisation, bitsandbytes') on weights of these kinds.
"""

SHAPE = (1024, 1024)
WINDOWS = (8, 9, 10, 12)
ROUNDS = 7
TIMED_BLOCKS = 2048


def sources() -> dict[str, list[torch.Tensor]]:
    """The weights to measure on, by name."""
    return {
        "gaussian": [gaussian(SHAPE, 1)],
        "student_t5": [student_t(SHAPE, 2)],
        "convolution": [channel_spread((640, 320, 3, 3), 3)],
        "demo": list(demo_weights()),
    }


def busy(work: Callable[[], object]) -> float:
    """Processor seconds that one call takes."""
    started = process_time()
    work()
    return process_time() - started


def measure(weights: list[torch.Tensor], format: str, effort: str) -> dict:
    """Bits per weight packed and on disk, SQNR (weight-count mean), and seconds per million weights to quantise."""
    total = packed = stored = 0
    noise = seconds = 0.0
    for weight in weights:
        started = process_time()
        tensor = quantize(weight, format=format, effort=effort)
        seconds += process_time() - started
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
            samples[name].append(busy(lambda coder=coder: coder.encode(blocks)) / blocks.numel() * 1e6)
    return {name: summary(values) for name, values in samples.items()}


def decode_rates() -> dict[str, dict]:
    """Billions of weights a second into a warm buffer, in turns."""
    weight = gaussian(SHAPE, 1)
    tensors = {id: quantize(weight, format=id) for id in (*SCALAR_IDS, *TRELLIS_IDS)}
    out = torch.empty(SHAPE, dtype=torch.float16)
    samples: dict[str, list[float]] = {id: [] for id in tensors}
    for _ in range(5 * ROUNDS):
        for id, tensor in tensors.items():
            samples[id].append(weight.numel() / busy(lambda tensor=tensor: tensor.dequantize(out=out)) / 1e9)
    return {id: summary(values) for id, values in samples.items()}


def goals(rows: list[dict]) -> list[dict]:
    """GOALS and what is reached at each effort.

    Formats are chosen for SDXL's layers, every weight as sensitive as any other; the error is that of the rows.
    """
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in tensor_shapes(SDXL_BASE, "ldm").items()}
    shapes = {name: plan.shape for name, plan in plan_tensors(entries, DEFAULTS)[1].items() if plan.format}
    counts = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(counts.values())
    measured = {(row["source"], row["format"], row["effort"]): row["sqnr_db"] for row in rows}
    reached = []
    for peer, (peer_bits, bits, decibels) in GOALS.items():
        for effort in EFFORTS:
            chosen = allocate(shapes, int(bits * total / 8), counts, effort=effort)
            packed = sum(fmt.packed_bytes(counts[name]) for name, (fmt, _) in chosen.items())
            row = {"peer": peer, "peer_bits": peer_bits, "effort": effort, "packed_bits_per_weight": 8 * packed / total}
            for source, wanted in decibels.items():
                noise = sum(
                    counts[name] * 10 ** (-measured[source, fmt.id, effort] / 10) for name, (fmt, _) in chosen.items()
                )
                row[source] = {"peer_db": wanted, "sqnr_db": 10 * log10(total / noise)}
            reached.append(row)
    return reached


def run(names: Sequence[str]) -> dict:
    """All measurements on the sources named, as written to the results."""
    torch.set_num_threads(1)
    results = {"search_seconds_per_million": search_seconds(), "decode_billions_per_second": decode_rates(), "rows": []}
    for name in names:
        weights = sources()[name]
        for format in (*SCALAR_IDS, *TRELLIS_IDS):
            efforts = EFFORTS if format in EXPECTED_SQNR_DB else ("fast",)
            for effort in efforts:
                row = {"source": name, "format": format, "effort": effort, **measure(weights, format, effort)}
                results["rows"].append(row)
                print(row, flush=True)
    return results | {"goals": goals(results["rows"])}


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


def goals_table(results: dict) -> str:
    """dB at each of the GOALS beside the peer's."""
    lines = []
    for row in results["goals"]:
        cells = [
            f"{row[source]['sqnr_db']:.2f} ({row[source]['peer_db']:.2f})" for source in next(iter(GOALS.values()))[2]
        ]
        lines.append(
            [row["peer"], f"{row['peer_bits']}", f"{row['packed_bits_per_weight']:.3f}", row["effort"], *cells]
        )
    header = ["peer", "its bits", "packed bits", "effort", "gaussian (peer)", "student_t5 (peer)", "convolution (peer)"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="the demo model as well, which takes as long as the rest")
    names = [name for name in sources() if name != "demo" or parser.parse_args().demo]
    print(machine())
    results = run(names)
    write_results("trellis", f"python -m benchmarks.trellis{' --demo' if 'demo' in names else ''}", results)
    print(table(results))
    print(goals_table(results))
