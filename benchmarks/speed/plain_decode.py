"""The plain decode on devices other than a CPU, without one: `python -m benchmarks.speed.plain_decode`.

Counts torch's operations, except views, and the peak of temporaries for the largest layer of SDXL, on torch's meta
device, which computes nothing. On a GPU most operations are one launch.
"""

from __future__ import annotations

from math import prod

import torch
from operations import Recorder

from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.packed import torch_decode
from nfq_core.packed.formats import WRITABLE_IDS, format_by_id
from nfq_core.packed.layout import BlockFormat

from ..shared import dated_table, run_command

DTYPES = (torch.float16, torch.bfloat16)  # Every dtype but fp16 is cast


def recorded(fmt: BlockFormat, weights: int, dtype: torch.dtype) -> Recorder:
    """What one decode does, after a first one has built the tables that are kept for the process."""
    data = torch.empty(fmt.sections(weights).end, dtype=torch.uint8, device="meta")
    out = torch.empty(weights, dtype=dtype, device="meta")
    torch_decode.dequantize_into(out, data, fmt)
    with Recorder(data, out) as found:
        torch_decode.dequantize_into(out, data, fmt)
    return found


def run() -> dict:
    """Operations by format and output dtype; bytes of temporaries by format, for fp16."""
    weights, formats = max(map(prod, tensor_shapes(SDXL_BASE, "ldm").values())), {}
    for fmt in map(format_by_id, WRITABLE_IDS):
        found = [recorded(fmt, weights, dtype) for dtype in DTYPES]
        operations = {str(dtype): len(one.operations) for dtype, one in zip(DTYPES, found, strict=True)}
        formats[fmt.id] = {"operations": operations, "temporary_bytes": max(one.most for one in found)}
    return {"weights": weights, "formats": formats}


def table(results: dict) -> str:
    """Operations by output dtype, and temporaries."""
    rows = [
        [f"`{name}`", *map(str, one["operations"].values()), f"{one['temporary_bytes'] / 1e6:.0f} MB"]
        for name, one in results["formats"].items()
    ]
    header = [f"a layer of {results['weights']:,} weights", "operations, fp16", "other dtypes", "temporaries"]
    return dated_table(header, rows, results)


if __name__ == "__main__":
    run_command(__doc__, "plain_decode", run)
