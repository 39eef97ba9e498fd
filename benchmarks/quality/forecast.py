"""Measures the constants of `nfq_core.planning.forecast`: `python -m benchmarks.quality.forecast`.

Gaussian weights, one processor. Needs the extra `fast`.
"""

from __future__ import annotations

import time

import torch

from nfq_core import NFTensor, quantize
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.fitting.trellis_fit import gaussian_trellis
from nfq_core.fitting.trellis_numba import CompiledCoder
from nfq_core.packed.codec import encode, frame_spans
from nfq_core.packed.formats import FORMATS, TRELLIS_IDS, WRITABLE_IDS
from nfq_core.packed.layout import BLOCK
from nfq_core.planning.forecast import PACE_WEIGHTS, measure_pace

from ..shared import argument_parser

WEIGHTS, SEARCHED = 1 << 22, 1 << 20  # Weights to quantise in a scalar format, and in a trellis format


def coarse_digits(tensor: NFTensor) -> tuple[float, float]:
    """Entropy in bits of a digit of the coarse plane, and the share of the most frequent digit."""
    planes = tensor.data[tensor.sections.coarse : tensor.sections.fine]
    shares = torch.bincount(planes.int(), minlength=256).double() / planes.numel()
    entropy = float(-(shares * shares.clamp_min(1e-12).log2()).sum())
    digits = tensor.format.coarse_digits
    return entropy / digits, float(shares.amax()) ** (1 / digits)


def scale_bits(tensor: NFTensor) -> float:
    """Bits on disk of a block's scale."""
    lengths = zip(frame_spans(tensor.sections), encode(tensor.data, tensor.sections), strict=True)
    stored = sum(len(frame) for (start, _), frame in lengths if start >= tensor.sections.scales)
    return stored * 8 / (tensor.numel() // BLOCK)


def search_line(id: str, coder: TrellisCoder) -> str:
    """Seconds of the first pass of a search, and of the rest in passes."""
    values = torch.randn(SEARCHED // BLOCK, BLOCK, generator=torch.Generator().manual_seed(0)) / 2.3
    # Compiled code is loaded at the first use.
    coder.encode(values[:1])
    started = time.perf_counter()
    state_errors = coder.state_errors(values)
    passed = time.perf_counter()
    coder.encode(values, state_errors)
    seconds, rest = passed - started, time.perf_counter() - passed
    per_million = seconds / SEARCHED * 1e6
    return f"{id} {type(coder).__name__}: a pass {per_million:.3f} s per million, the rest {rest / seconds:.1f} passes"


def main() -> None:
    """Print a line for each format."""
    argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    print(f"{PACE_WEIGHTS} weights in {measure_pace():.4f} s", flush=True)
    for id in WRITABLE_IDS:
        count = SEARCHED if id in TRELLIS_IDS else WEIGHTS
        weight = torch.randn(count // 1024, 1024, generator=torch.Generator().manual_seed(0)).half()
        for effort in EFFORTS:
            started = time.perf_counter()
            tensor = quantize(weight, format=id, effort=effort)
            frames = encode(tensor.data, tensor.sections)
            seconds = (time.perf_counter() - started) / count * 1e6
            entropy, share = coarse_digits(tensor)
            stored = sum(map(len, frames)) * 8 / count
            print(
                f"{id} {effort}: coarse digits {entropy:.3f} bits, most frequent {share:.4f}; scales "
                f"{scale_bits(tensor):.2f} bits; stored {stored:.3f} of {tensor.bits_per_weight:.3f} bits per weight; "
                f"{seconds:.3f} s per million",
                flush=True,
            )
    for id in TRELLIS_IDS:
        fmt = FORMATS[id]
        levels = gaussian_trellis(fmt).levels
        for coder in (TrellisCoder(levels, fmt, torch.device("cpu")), CompiledCoder(levels, fmt)):
            print(search_line(id, coder), flush=True)


if __name__ == "__main__":
    main()
