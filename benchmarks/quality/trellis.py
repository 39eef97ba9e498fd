"""Trellis formats beside the scalar ones and peers': error, bits and time: `python -m benchmarks.quality.trellis`.

Gaussian and Student-t weights (1024 × 1024), a convolution whose channels differ (640 × 320 × 3 × 3) and the demo
model, every weight in the given format, on one thread. Beside that: how long one search takes by window, how fast
each format decodes, and what SDXL's layers, were they such weights, get at the sizes in `quality_checks.FLOORS`. The
peers are ggml's types (`xllamacpp`) and bitsandbytes' NF4; what is not installed is left out, and said to be.

All times are those of the processor, on one thread: what else the machine does counts only as far as it takes caches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import log10, prod
from operator import itemgetter
from time import process_time

import torch

from nfq_core import quantize
from nfq_core.files.safefile import Entry
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.packed.formats import BLOCK, FORMATS, TRELLIS_IDS, BlockFormat, Scales
from nfq_core.planning.allocation import allocate
from nfq_core.planning.policy import DEFAULTS, plan_tensors

from ..shared import channel_spread, gaussian, in_turns, machine, markdown_table, student_t, summary, write_results
from .checks import FLOORS, PACKED
from .peers import packaged, stored
from .weights import DEMO, GAUSSIAN, SPREAD, STUDENT_T, Layer, demo_weights, figures

IDS = ("nf7_b64", "nf16_b64", "nf32_b64", "nf256_b64", *TRELLIS_IDS)

EIGHT_BITS = ("nf256_b64", "Q8_0")
"""Ours and a peer's."""

PEERS = (*(name for name, _ in FLOORS), EIGHT_BITS[1])
PEER_FAMILIES = ("GGUF", "bitsandbytes")

SHAPE = (1024, 1024)
CONVOLUTION = (640, 320, 3, 3)
WINDOWS = (8, 9, 10, 12)
ROUNDS = 7
TIMED_BLOCKS = 2048


SOURCES: dict[str, Callable[[], list[torch.Tensor]]] = {
    GAUSSIAN: lambda: [gaussian(SHAPE, 1)],
    STUDENT_T: lambda: [student_t(SHAPE, 2)],
    SPREAD: lambda: [channel_spread(CONVOLUTION, 3)],
    DEMO: lambda: list(demo_weights()),
}
"""What makes the weights to measure on, by name."""


def busy(work: Callable[[], object]) -> float:
    """Processor seconds that one call takes."""
    started = process_time()
    work()
    return process_time() - started


def measure(weights: list[torch.Tensor], format: str, effort: str) -> dict:
    """The `figures` of weights in a format of ours, and seconds per million weights to quantise."""
    layers, seconds = [], 0.0
    for weight in weights:
        started = process_time()
        tensor = quantize(weight, format=format, effort=effort)
        seconds += process_time() - started
        layers.append(Layer.of(weight, stored(tensor)))
    return {**figures(layers), "seconds_per_million": seconds / sum(layer.weights for layer in layers) * 1e6}


def search_seconds() -> dict[str, dict]:
    """Seconds per million weights of one search with four-bit codes, by window, in turns."""
    blocks = torch.randn(TIMED_BLOCKS, BLOCK, generator=torch.Generator().manual_seed(0))
    searches = {}
    for window in WINDOWS:
        fmt = BlockFormat("", 1 << window, 16, 2, 0, Scales.LOGARITHMIC, window)
        levels = torch.randn(fmt.levels, generator=torch.Generator().manual_seed(1))
        searches[str(window)] = partial(TrellisCoder(levels, fmt, blocks.device).encode, blocks)
    taken = in_turns(searches, ROUNDS, busy)
    return {name: summary([seconds / blocks.numel() * 1e6 for seconds in found]) for name, found in taken.items()}


def decode_rates() -> dict[str, dict]:
    """Billions of weights a second into a warm buffer, in turns."""
    weight = gaussian(SHAPE, 1)
    out = torch.empty(SHAPE, dtype=torch.float16)
    decodes = {id: partial(quantize(weight, format=id).dequantize, out=out) for id in IDS}
    taken = in_turns(decodes, 5 * ROUNDS, busy)
    return {id: summary([weight.numel() / seconds / 1e9 for seconds in found]) for id, found in taken.items()}


def goals(rows: Sequence[dict]) -> list[dict]:
    """What is reached at each effort at the packed bits that FLOORS allow beside a peer; peers without rows have none.

    Formats are chosen for SDXL's layers, every weight as sensitive as any other; the error is that of the rows.
    """
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in tensor_shapes(SDXL_BASE, "ldm").items()}
    shapes = {name: plan.shape for name, plan in plan_tensors(entries, DEFAULTS)[1].items() if plan.format}
    counts = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(counts.values())
    measured = {(row["source"], row["format"], row["effort"]): row["sqnr_db"] for row in rows}
    reached = []
    for peer, bits in sorted(FLOORS, key=itemgetter(1)):
        theirs = {row["source"]: row for row in rows if row["format"] == peer and row["source"] != DEMO}
        if not theirs:
            continue
        for effort in EFFORTS:
            chosen = allocate(shapes, int(bits * total / 8), counts, effort=effort)
            packed = sum(fmt.packed_bytes(counts[name]) for name, (fmt, _) in chosen.items())
            row = {
                "peer": peer,
                "peer_bits": next(iter(theirs.values()))[PACKED],
                "effort": effort,
                PACKED: 8 * packed / total,
            }
            for source, their in theirs.items():
                noise = sum(
                    counts[name] * 10 ** (-measured[source, fmt.id, effort] / 10) for name, (fmt, _) in chosen.items()
                )
                row[source] = {"peer_db": their["sqnr_db"], "sqnr_db": 10 * log10(total / noise)}
            reached.append(row)
    return reached


def run(names: Sequence[str]) -> dict:
    """All measurements on the sources named, as written to the results; the peers' rows have no effort."""
    torch.set_num_threads(1)
    peers, skipped = packaged(PEER_FAMILIES)
    for family, reason in skipped.items():
        print(f"{family} is left out: {reason}")
    results = {"search_seconds_per_million": search_seconds(), "decode_billions_per_second": decode_rates()}
    rows = []
    for name in names:
        weights = SOURCES[name]()
        for format, effort in product(IDS, EFFORTS):
            rows.append({"source": name, "format": format, "effort": effort, **measure(weights, format, effort)})
            print(rows[-1], flush=True)
        for peer in peers:
            if peer.name in PEERS:
                found = figures(Layer.of(weight, peer.store(weight)) for weight in weights)
                rows.append({"source": name, "format": peer.name, "effort": "", **found})
                print(rows[-1], flush=True)
    return {**results, "skipped": skipped, "rows": rows, "goals": goals(rows)}


def table(results: dict, formats: Sequence[str] = ()) -> str:
    """dB of these formats, by default of all, on each kind of weights, packed bits, and median seconds to quantise."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        if not formats or row["format"] in formats:
            rows.setdefault((row["format"], row["effort"]), []).append(row)
    header = ["format", "effort", *(row["source"] for row in next(iter(rows.values()))), "packed bits", "s per million"]
    lines = []
    for (format, effort), found in rows.items():
        seconds = [row["seconds_per_million"] for row in found if "seconds_per_million" in row]
        cells = [*(f"{row['sqnr_db']:.2f}" for row in found), f"{found[0][PACKED]:.3f}"]
        lines.append([format, effort or "–", *cells, f"{statistics.median(seconds):.2f}" if seconds else "–"])
    return markdown_table(header, lines)


def eight_bits_table(results: dict) -> str:
    """The formats of about eight bits."""
    return table(results, EIGHT_BITS)


def windows_table(results: dict) -> str:
    """Error and time of Gaussian weights by the bits of a code and the window, and what the widest window gains."""
    by_bits: dict[int, list[str]] = {}
    for id in TRELLIS_IDS:
        by_bits.setdefault(FORMATS[id].code_bits, []).append(id)
    found = {(row["format"], row["effort"]): row for row in results["rows"] if row["source"] == GAUSSIAN}

    def told(id: str, figure: str, digits: int) -> str:
        return " / ".join(f"{found[id, effort][figure]:.{digits}f}" for effort in EFFORTS)

    lines = []
    for bits, ids in by_bits.items():
        narrow, wide = min(ids, key=_window), max(ids, key=_window)
        gains = [found[wide, effort]["sqnr_db"] - found[narrow, effort]["sqnr_db"] for effort in EFFORTS]
        cells = [
            f"{_window(id)}: {told(id, 'sqnr_db', 2)} dB, {told(id, 'seconds_per_million', 1)} s"
            for id in (narrow, wide)
        ]
        lines.append([f"k = {bits}", *cells, " / ".join(f"{gain:+.2f}" for gain in gains) + " dB"])
    return markdown_table(["", "narrow window", "wide window", "gain"], lines)


def _window(id: str) -> int:
    return FORMATS[id].window


def goals_table(results: dict) -> str:
    """dB at each of the goals beside the peer's, and which peers are left out."""
    sources = [source for source in SOURCES if any(source in row for row in results["goals"])]
    lines = []
    for row in results["goals"]:
        cells = [f"{row[source]['sqnr_db']:.2f} ({row[source]['peer_db']:.2f})" for source in sources]
        lines.append([row["peer"], f"{row['peer_bits']:.3f}", f"{row[PACKED]:.3f}", row["effort"], *cells])
    header = ["peer", "its bits", "packed bits", "effort", *(f"{source} (peer)" for source in sources)]
    left_out = "; ".join(f"{family} ({reason})" for family, reason in results.get("skipped", {}).items())
    return markdown_table(header, lines) + (f"\n\nLeft out: {left_out}." if left_out else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="the demo model as well, which takes as long as the rest")
    names = [name for name in SOURCES if name != DEMO or parser.parse_args().demo]
    print(machine())
    results = run(names)
    write_results("trellis", results)
    print(table(results))
    print(goals_table(results))
