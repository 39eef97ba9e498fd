"""Error, bits and time of trellis formats, scalar formats and peers: `python -m benchmarks.quality.trellis`.

Random weights, all in one format. Also measured: one search by window, and the decode. The goals are the error that
SDXL's layers would have, if their weights were of these kinds, at the sizes in `checks.FLOORS`. Peers are ggml's types
(`xllamacpp`) and bitsandbytes' NF4. Times are processor seconds on one thread. Needs the extra `fast`; effort `best` of
trellis formats is measured without it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, product
from math import prod
from operator import itemgetter
from time import process_time
from unittest.mock import patch

import torch

from nfq_core import NFTensor, quantize
from nfq_core.decibels import pooled_sqnr_db
from nfq_core.demo.model import bundled_weights_path
from nfq_core.errors import NFQError
from nfq_core.files.safetensors_io import Entry
from nfq_core.fitting.backends import search_backend
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.packed.formats import FORMATS, TRELLIS_IDS, WRITABLE_IDS
from nfq_core.packed.layout import BLOCK, BlockFormat
from nfq_core.planning.allocation import MENUS, allocate
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULTS

from ..shared import gaussian, in_turns, left_out, markdown_table, run_command, summary
from .checks import FLOORS, PACKED
from .peers import Contestant, our_formats, packaged, stored
from .weights import GAUSSIAN, SPREAD, STUDENT_T, Layer, figures, measure_layers, mix, model_layers, random_weights

PEERS, PEER_FAMILIES = tuple(name for name, _ in FLOORS), ("GGUF", "bitsandbytes")
SHAPE, CONVOLUTION = (1024, 1024), (640, 320, 3, 3)
PLAIN = "best, plain torch"
WAYS = (*EFFORTS, PLAIN)
WINDOWS, TIMED_BLOCKS, ROUNDS = (8, 9, 10, 12), 2048, 7


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    started = process_time()
    work()
    return process_time() - started


def measure(weight: torch.Tensor, format: str, way: str) -> dict:
    """The `figures` of a weight in one of our formats, and seconds per million weights to quantise it."""
    made: list[NFTensor] = []
    with patch.dict("os.environ", {"NFQ_BACKEND": "torch"} if way == PLAIN else {}):
        effort = way if way in EFFORTS else "best"
        # Compiled code is loaded at the first use.
        quantize(weight[:16], format=format, effort=effort)
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
    decodes = {id: partial(quantize(weight, format=id).dequantize, out=out) for id in WRITABLE_IDS}
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


def demo_goals(peers: Sequence[Contestant]) -> list[dict]:
    """The same on the demo model's weights, in small layers whose formats and errors are their own."""
    ours = {effort: [one for one in our_formats(effort) if FORMATS[one.format] in MENUS[effort]] for effort in EFFORTS}
    layers, shapes = measure_layers(model_layers(bundled_weights_path()), [*chain(*ours.values()), *peers])
    reached = []
    for (peer, bits), effort in product(sorted(FLOORS, key=itemgetter(1)), EFFORTS):
        if peer not in layers:
            continue
        theirs = figures(layers[peer].values())
        found = figures(mix({one.format: layers[one.name] for one in ours[effort]}, shapes, bits, effort).values())
        goal = {"peer": peer, "peer_bits": theirs[PACKED], "peer_db": theirs["sqnr_db"], "effort": effort}
        reached.append(goal | {PACKED: found[PACKED], "sqnr_db": found["sqnr_db"]})
    return reached


def run() -> dict:
    """All measurements, as written to the results; the peers' rows have no effort."""
    torch.set_num_threads(1)
    backend, reason = search_backend(torch.device("cpu"))
    if backend != "numba":
        raise NFQError(f"this measures numba's search too, but {reason}")
    contestants, skipped = packaged(PEER_FAMILIES)
    peers = [one for one in contestants if one.name in PEERS]
    rows = []
    for name, weight in random_weights(SHAPE, CONVOLUTION).items():
        for format, way in product(WRITABLE_IDS, WAYS):
            if way in EFFORTS or format in TRELLIS_IDS:
                rows.append({"source": name, "format": format, "effort": way, **measure(weight, format, way)})
        for peer in peers:
            found = figures([Layer.of(weight, peer.store(weight))])
            rows.append({"source": name, "format": peer.name, "effort": "", **found})
        print(f"{name} done", flush=True)
    times = {"search_seconds_per_million": search_seconds(), "decode_billions_per_second": decode_rates()}
    return {**times, "skipped": skipped, "rows": rows, "goals": goals(rows), "demo": demo_goals(peers)}


def _by_way(rows: dict[str, dict], figure: str) -> str:
    return " / ".join(f"{rows[way][figure]:.2f}" for way in WAYS if way in rows)


def formats_table(results: dict) -> str:
    """Packed bits, error on each source and time of every format at both efforts, and its decode."""
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for row in results["rows"]:
        if row["effort"]:
            found.setdefault(row["format"], {}).setdefault(row["source"], {})[row["effort"]] = row
    sources = list(next(iter(found.values())))
    lines = []
    for id, by_source in sorted(found.items(), key=lambda item: item[1][sources[0]]["fast"][PACKED]):
        errors = [_by_way(one, "sqnr_db") for one in by_source.values()]
        first = by_source[sources[0]]
        seconds = _by_way(first, "seconds_per_million")
        rate = results["decode_billions_per_second"][id]["median"]
        lines.append([id, f"{first['fast'][PACKED]:.3f}", *errors, seconds, f"{rate:.2f}"])
    header = ["format", "packed bits", *(f"{source}, dB" for source in sources), "s per million", "decode, 10⁹ / s"]
    return markdown_table(header, lines)


def demo_table(results: dict) -> str:
    """The goals on the demo model's own weights."""
    lines = []
    for row in results["demo"]:
        theirs = [row["peer"], f"{row['peer_bits']:.3f}", f"{row['peer_db']:.2f}"]
        gain = f"{row['sqnr_db'] - row['peer_db']:+.2f}"
        lines.append([*theirs, row["effort"], f"{row[PACKED]:.3f}", f"{row['sqnr_db']:.2f}", gain])
    return markdown_table(["peer", "its bits", "its dB", "effort", "packed bits", "dB", "gain, dB"], lines)


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
