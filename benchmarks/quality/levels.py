"""Size and error of every number of levels, compared with the article's format: `python -m benchmarks.quality.levels`.

Gaussian, Student-t and the demo model's weights; convolutions have the given number of levels too. Sizes count all
bytes of a tensor on disk.
"""

from __future__ import annotations

from itertools import product
from math import log2

import torch

from nfq_core import NFTensor, quantize
from nfq_core.demo.model import bundled_weights_path
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.packed.codec import encode, frame_spans
from nfq_core.packed.formats import LEVELS
from nfq_core.packed.layout import BLOCK
from nfq_core.packed.packing import unpack_codes

from ..shared import markdown_table, run_command
from .checks import SOURCES
from .peers import Stored, article
from .weights import DEMO, GAUSSIAN, SHAPE, STUDENT_T, Layer, figures, model_layers, random_weights


def code_entropy(tensor: NFTensor) -> float:
    """Order-0 entropy of a tensor's codes, bits per weight."""
    sections = tensor.sections
    coarse = tensor.data[sections.coarse : sections.fine]
    fine = tensor.data[sections.fine : sections.scales]
    codes = unpack_codes(coarse, fine, -(-tensor.numel() // BLOCK), tensor.format)
    shares = torch.bincount(codes.view(-1).int()).double() / codes.numel()
    return -sum(share * log2(share) for share in shares.tolist() if share)


def measure_ours(weights: list[torch.Tensor], levels: int, effort: str) -> dict:
    """The `figures` of weights in our format, and the codes' size on disk relative to their entropy."""
    layers, planes, entropy = [], 0, 0.0
    for weight in weights:
        tensor = quantize(weight, levels, effort=effort)
        sections = tensor.format.sections(weight.numel())
        frames = encode(tensor.data, sections)
        layers.append(Layer.of(weight, Stored(tensor.dequantize(), sum(map(len, frames)), tensor.nbytes)))
        spans = zip(frames, frame_spans(sections), strict=True)
        planes += sum(len(frame) for frame, (start, _) in spans if sections.coarse <= start < sections.scales)
        entropy += weight.numel() * code_entropy(tensor)
    return {**figures(layers), "codes_above_entropy": 8 * planes / entropy - 1}


def run() -> dict:
    """All measurements, as written to the results."""
    rows, random = [], random_weights()
    sources = {GAUSSIAN: [random[GAUSSIAN]], STUDENT_T: [random[STUDENT_T]]}
    sources[DEMO] = [weight for _, weight in model_layers(bundled_weights_path())]
    for (name, weights), levels in product(sources.items(), LEVELS):
        theirs = figures(Layer.of(weight, article(weight, levels)) for weight in weights)
        ours = {effort: measure_ours(weights, levels, effort) for effort in EFFORTS}
        rows.append({"source": name, "levels": levels, "article": theirs, **ours})
        print(rows[-1], flush=True)
    return {"shape": SHAPE, "rows": rows}


def table(results: dict) -> str:
    """Bits and error by weights and levels, with the gain over the article's format in brackets."""
    rows = []
    for row in results["rows"]:
        base = row["article"]
        cells = [SOURCES[row["source"]], str(row["levels"]), f"{base['bits_per_weight']:.3f}", f"{base['sqnr_db']:.2f}"]
        for ours in (row[effort] for effort in EFFORTS):
            gain = ours["sqnr_db"] - base["sqnr_db"]
            cells += [f"{ours['bits_per_weight']:.3f}", f"{ours['sqnr_db']:.2f} ({gain:+.2f})"]
        rows.append([*cells, f"{row['fast']['packed_bits_per_weight']:.3f}"])
    header = ["weights", "levels", "article, bits", "dB", "`fast`, bits", "dB", "`best`, bits", "dB", "packed bits"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    run_command(__doc__, "levels", run)
