"""Error, bits and time of trellis formats, scalar formats and peers: `python -m benchmarks.quality.trellis`.

Random weights, all in one format. Also measured: one search by window, and the decode. The goals are the error that
SDXL's layers would have, if their weights were of these kinds, at the sizes in `checks.FLOORS`. Peers are ggml's types
(`xllamacpp`) and bitsandbytes' NF4. Times are processor seconds on one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from operator import itemgetter
from time import process_time

import torch

from nfq_core import NFTensor, quantize
from nfq_core.decibels import pooled_sqnr_db
from nfq_core.files.safetensors_io import Entry
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.packed.formats import FORMATS, TRELLIS_IDS
from nfq_core.packed.layout import BLOCK, BlockFormat
from nfq_core.planning.allocation import allocate
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULTS

from ..shared import gaussian, in_turns, left_out, markdown_table, run_command, summary
from .checks import FLOORS, PACKED
from .peers import packaged, stored
from .weights import GAUSSIAN, SPREAD, STUDENT_T, Layer, figures, random_weights

IDS = ("nf7_b64", "nf16_b64", "nf32_b64", "nf256_b64", *TRELLIS_IDS)
EIGHT_BITS = ("nf256_b64", "Q8_0")  # Our format and the peer's
PEERS, PEER_FAMILIES = (*(name for name, _ in FLOORS), "Q8_0"), ("GGUF", "bitsandbytes")
SHAPE, CONVOLUTION = (1024, 1024), (640, 320, 3, 3)
WINDOWS, TIMED_BLOCKS, ROUNDS = (8, 9, 10, 12), 2048, 7


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    started = process_time()
    work()
    return process_time() - started


def measure(weight: torch.Tensor, format: str, effort: str) -> dict:
    """The `figures` of a weight in one of our formats, and seconds per million weights to quantise it."""
    made: list[NFTensor] = []
    seconds = processor_seconds(lambda: made.append(quantize(weight, format=format, effort=effort)))
    return {**figures([Layer.of(weight, stored(made[0]))]), "seconds_per_million": seconds / weight.numel() * 1e6}


def search_seconds() -> dict[str, dict]:
    """Seconds per million weights of one search with four-bit codes, by window."""
    blocks, searches = torch.randn(TIMED_BLOCKS, BLOCK, generator=torch.Generator().manual_seed(0)), {}
    for window in WINDOWS:
        fmt = BlockFormat("", 1 << window, 16, 2, 0, window)
        levels = torch.randn(fmt.levels, generator=torch.Generator().manual_seed(1))
        searches[str(window)] = partial(TrellisCoder(levels, fmt, blocks.device).encode, blocks)
    taken = in_turns(searches, ROUNDS, processor_seconds)
    return {name: summary([seconds / blocks.numel() * 1e6 for seconds in found]) for name, found in taken.items()}


def decode_rates() -> dict[str, dict]:
    """Billions of weights per second that each format decodes into a warm buffer."""
    weight, out = gaussian(SHAPE, 1), torch.empty(SHAPE, dtype=torch.float16)
    decodes = {id: partial(quantize(weight, format=id).dequantize, out=out) for id in IDS}
    taken = in_turns(decodes, 5 * ROUNDS, processor_seconds)
    return {id: summary([weight.numel() / seconds / 1e9 for seconds in found]) for id, found in taken.items()}


def goals(rows: Sequence[dict]) -> list[dict]:
    """The error of SDXL's layers at the packed bits that FLOORS allow for each peer, at each effort.

    Formats are chosen for SDXL's shapes, all weights equally sensitive; their errors are those of the rows. A peer
    without rows is left out.
    """
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in tensor_shapes(SDXL_BASE, "ldm").items()}
    shapes = {name: plan.shape for name, plan in plan_tensors(entries, DEFAULTS)[1].items() if plan.format}
    counts = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(counts.values())
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["format"], row["effort"]), {})[row["source"]] = row
    reached = []
    for (peer, bits), effort in product(sorted(FLOORS, key=itemgetter(1)), EFFORTS):
        theirs = found.get((peer, ""), {})
        if not theirs:
            continue
        chosen = allocate(shapes, int(bits * total / 8), counts, effort=effort)
        packed = 8 * sum(fmt.packed_bytes(counts[name]) for name, (fmt, _) in chosen.items()) / total
        goal = {"peer": peer, "peer_bits": next(iter(theirs.values()))[PACKED], "effort": effort, PACKED: packed}
        for source, their in theirs.items():
            errors = ((counts[key], found[fmt.id, effort][source]["sqnr_db"]) for key, (fmt, _) in chosen.items())
            goal[source] = {"peer_db": their["sqnr_db"], "sqnr_db": pooled_sqnr_db(errors)}
        reached.append(goal)
    return reached


def run() -> dict:
    """All measurements, as written to the results; the peers' rows have no effort."""
    torch.set_num_threads(1)
    peers, skipped = packaged(PEER_FAMILIES)
    rows = []
    for name, weight in random_weights(SHAPE, CONVOLUTION).items():
        for format, effort in product(IDS, EFFORTS):
            rows.append({"source": name, "format": format, "effort": effort, **measure(weight, format, effort)})
        for peer in (peer for peer in peers if peer.name in PEERS):
            found = figures([Layer.of(weight, peer.store(weight))])
            rows.append({"source": name, "format": peer.name, "effort": "", **found})
        print(f"{name} done", flush=True)
    times = {"search_seconds_per_million": search_seconds(), "decode_billions_per_second": decode_rates()}
    return {**times, "skipped": skipped, "rows": rows, "goals": goals(rows)}


def eight_bits_table(results: dict) -> str:
    """Error on each source, packed bits and median time of the formats with about eight bits."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        if row["format"] in EIGHT_BITS:
            rows.setdefault((row["format"], row["effort"]), []).append(row)
    header = ["format", "effort", *(row["source"] for row in next(iter(rows.values()))), "packed bits", "s per million"]
    lines = []
    for (format, effort), found in rows.items():
        seconds = [row["seconds_per_million"] for row in found if "seconds_per_million" in row]
        cells = [*(f"{row['sqnr_db']:.2f}" for row in found), f"{found[0][PACKED]:.3f}"]
        lines.append([format, effort or "–", *cells, f"{statistics.median(seconds):.2f}" if seconds else "–"])
    return markdown_table(header, lines)


def windows_table(results: dict) -> str:
    """Error and time of Gaussian weights with the narrowest and the widest window, by bits of a code."""
    found = {(row["format"], row["effort"]): row for row in results["rows"] if row["source"] == GAUSSIAN}

    def both(id: str, figure: str, digits: int) -> str:
        return " / ".join(f"{found[id, effort][figure]:.{digits}f}" for effort in EFFORTS)

    lines = []
    for bits in dict.fromkeys(FORMATS[id].code_bits for id in TRELLIS_IDS):
        ids = sorted((id for id in TRELLIS_IDS if FORMATS[id].code_bits == bits), key=lambda id: FORMATS[id].window)
        cells = [
            f"{FORMATS[id].window}: {both(id, 'sqnr_db', 2)} dB, {both(id, 'seconds_per_million', 1)} s"
            for id in (ids[0], ids[-1])
        ]
        gains = (found[ids[-1], effort]["sqnr_db"] - found[ids[0], effort]["sqnr_db"] for effort in EFFORTS)
        lines.append([f"k = {bits}", *cells, " / ".join(f"{gain:+.2f}" for gain in gains) + " dB"])
    return markdown_table(["", "narrow window", "wide window", "gain"], lines)


def goals_table(results: dict) -> str:
    """The goals, with the peer's error in brackets, and the peers left out."""
    sources = [source for source in (GAUSSIAN, STUDENT_T, SPREAD) if any(source in row for row in results["goals"])]
    lines = []
    for row in results["goals"]:
        cells = [f"{row[source]['sqnr_db']:.2f} ({row[source]['peer_db']:.2f})" for source in sources]
        lines.append([row["peer"], f"{row['peer_bits']:.3f}", f"{row[PACKED]:.3f}", row["effort"], *cells])
    header = ["peer", "its bits", "packed bits", "effort", *(f"{source} (peer)" for source in sources)]
    return f"{markdown_table(header, lines)}\n\n{left_out(results['skipped'])}".strip()


if __name__ == "__main__":
    run_command(__doc__, "trellis", run)
