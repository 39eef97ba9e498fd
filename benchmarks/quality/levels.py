"""Size and error of every level, beside the article's format: `python -m benchmarks.quality.levels`.

Gaussian and Student-t weights (2048 × 2048) and all weights of the demo model that are quantised; every weight at the
given number of levels, convolutions too. Sizes count all bytes of a tensor on disk: codes, scales, levels, frames.
"""

from __future__ import annotations

from math import log2

import torch

from nfq_core import NFTensor, quantize
from nfq_core.packed.codec import encode, frame_spans
from nfq_core.packed.formats import BLOCK, LEVELS
from nfq_core.packed.packing import unpack_codes

from ..shared import machine, markdown_table, write_results
from .peers import Stored, article
from .tables import SOURCES
from .weights import DEMO, GAUSSIAN, SHAPE, STUDENT_T, Layer, demo_weights, figures, random_weights


def sources() -> dict[str, list[torch.Tensor]]:
    """The weights to measure on, by name."""
    weights = random_weights()
    return {name: [weights[name]] for name in (GAUSSIAN, STUDENT_T)} | {DEMO: list(demo_weights())}


def code_entropy(tensor: NFTensor) -> float:
    """Order-0 entropy of a tensor's codes, bits per weight."""
    sections = tensor.format.sections(tensor.numel())
    coarse = tensor.data[sections.coarse : sections.fine]
    fine = tensor.data[sections.fine : sections.superblock_scales]
    codes = unpack_codes(coarse, fine, -(-tensor.numel() // BLOCK), tensor.format)
    shares = torch.bincount(codes.view(-1).int()).double() / codes.numel()
    return -sum(share * log2(share) for share in shares.tolist() if share)


def measure_ours(weights: list[torch.Tensor], levels: int, effort: str) -> dict:
    """The `figures` of weights in ours, and codes on disk against their entropy."""
    layers, planes, entropy = [], 0, 0.0
    for weight in weights:
        tensor = quantize(weight, levels, effort=effort)
        sections = tensor.format.sections(weight.numel())
        frames = encode(tensor.data, sections)
        layers.append(Layer.of(weight, Stored(tensor.dequantize(), sum(map(len, frames)), tensor.nbytes)))
        planes += sum(
            len(frame)
            for frame, (start, _) in zip(frames, frame_spans(sections), strict=True)
            if sections.coarse <= start < sections.block_scales
        )
        entropy += weight.numel() * code_entropy(tensor)
    return {**figures(layers), "codes_above_entropy": 8 * planes / entropy - 1}


def measure_article(weights: list[torch.Tensor], levels: int) -> dict:
    """Bits per weight on disk and SQNR (weight-count mean) of the article's format."""
    found = figures(Layer.of(weight, article(weight, levels)) for weight in weights)
    return {name: found[name] for name in ("bits_per_weight", "sqnr_db")}


def run() -> dict:
    """All measurements, as written to the results."""
    rows = []
    for name, weights in sources().items():
        for levels in LEVELS:
            row = {"source": name, "levels": levels, "article": measure_article(weights, levels)}
            for effort in ("fast", "best"):
                row[effort] = measure_ours(weights, levels, effort)
            rows.append(row)
            print(name, levels, row, flush=True)
    return {"shape": SHAPE, "rows": rows}


def table(results: dict) -> str:
    """The README's table."""
    rows = []
    for row in results["rows"]:
        article = row["article"]
        cells = [SOURCES[row["source"]], str(row["levels"])]
        cells += [f"{article['bits_per_weight']:.3f}", f"{article['sqnr_db']:.2f}"]
        for effort in ("fast", "best"):
            ours = row[effort]
            cells += [
                f"{ours['bits_per_weight']:.3f}",
                f"{ours['sqnr_db']:.2f} ({ours['sqnr_db'] - article['sqnr_db']:+.2f})",
            ]
        cells.append(f"{row['fast']['packed_bits_per_weight']:.3f}")
        rows.append(cells)
    header = ["weights", "levels", "article, bits", "dB", "`fast`, bits", "dB", "`best`, bits", "dB", "packed bits"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    print(machine())
    print(write_results("levels", run()))
