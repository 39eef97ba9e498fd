"""Makes the common levels, which small tensors share: `python -m benchmarks.quality.common_levels ID…`.

They are part of a released format, so only levels of a new format may be made. For trellis formats: Lloyd's algorithm
on Gaussian blocks, from many starts, each the Gaussian quantiles in the order of a multiplicative hash: the levels that
can follow a state are spread over the whole range. The best starts continue with more blocks. Scalar formats: as for
any large Gaussian tensor.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nfq_core.fitting.codebook import EFFORTS, fit_codebook
from nfq_core.fitting.search import ScaleGrid, largest_magnitudes
from nfq_core.fitting.trellis_fit import Trellis, lloyd
from nfq_core.packed.common_levels import PATH
from nfq_core.packed.formats import FORMATS
from nfq_core.packed.layout import BLOCK, BlockFormat

from ..shared import argument_parser

STARTS = 64
STAGES = ((64, 600, 4), (8, 3000, 8), (2, 16000, 30))  # Starts that are left, blocks, rounds
GAUSSIAN_RATIO = 0.76  # Standard deviation of Gaussian weights over the fourth root of their mean fourth power
SCALAR_WEIGHTS = 1 << 20


def hashed_quantiles(fmt: BlockFormat, generator: torch.Generator) -> Trellis:
    """Levels in the order of a random multiplicative hash."""
    factor, offset = torch.randint(1 << 32, (2,), generator=generator).tolist()
    numbers = torch.arange(fmt.levels)
    order = ((numbers * (factor | 1) + offset) & 0xFFFFFFFF) >> 32 - fmt.window
    quantiles = math.sqrt(2) * torch.erfinv((2 * order.double() + 1) / fmt.levels - 1)
    # Reproduction levels have less energy than the numbers that they reproduce.
    quantiles *= 1 - 0.3 * 4.0**-fmt.code_bits
    largest = quantiles.abs().amax().item()
    return Trellis((quantiles / largest).half().float(), GAUSSIAN_RATIO * largest)


def trellis_levels(fmt: BlockFormat) -> torch.Tensor:
    """The best of STARTS, fp16 of shape (fmt.levels,); prints the ratio for `USUAL_RATIOS`."""
    generator = torch.Generator().manual_seed(fmt.levels + fmt.codes)
    blocks = torch.randn(STAGES[-1][1], BLOCK, generator=generator)
    found = [(hashed_quantiles(fmt, generator), 0.0) for _ in range(STARTS)]
    for left, count, rounds in STAGES:
        found = [lloyd(blocks[:count], trellis, fmt, rounds, 0) for trellis, _ in found[:left]]
        found.sort(key=lambda result: result[1])
    trellis, error = found[0]
    print(f"{fmt.id}: {10 * math.log10(blocks.square().sum() / error):.2f} dB, ratio {trellis.ratio:.4f}", flush=True)
    return trellis.levels.half()


def scalar_levels(fmt: BlockFormat) -> torch.Tensor:
    """The levels of a large Gaussian tensor, ascending, fp16 of shape (fmt.levels,)."""
    blocks = torch.randn(SCALAR_WEIGHTS // BLOCK, BLOCK, generator=torch.Generator().manual_seed(fmt.levels))
    grid = ScaleGrid.for_blocks(largest_magnitudes(blocks))
    return fit_codebook(blocks, grid, fmt, EFFORTS["best"], SCALAR_WEIGHTS).levels.half()


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("ids", nargs="+", help="formats; the levels of others stay as they are")
    parser.add_argument("--out", type=Path, default=PATH, help="default: the core's own file")
    options = parser.parse_args()
    stored = load_file(options.out) if options.out.exists() else {}
    for id in options.ids:
        fmt = FORMATS[id]
        stored[id] = trellis_levels(fmt) if fmt.window else scalar_levels(fmt)
    save_file(dict(sorted(stored.items())), options.out)
    # Packages keep the mode, and safetensors writes for the owner alone.
    options.out.chmod(0o644)
