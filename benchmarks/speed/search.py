"""The trellis search at full size: `python -m benchmarks.speed.search --dir DIR`.

Converts a synthetic fp16 file of SDXL's shapes (5.14 GB, written to DIR if there is none) with `--preset small --effort
best`, once with numba and once without, and compares both files with the original. Needs the extra `fast`. For Linux.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

from nfq_core.errors import NFQError
from nfq_core.fitting.backends import search_backend

from ..shared import argument_parser, dated_table, json_of, timed, write_results, write_sdxl_unet

WAYS = {"numba": {}, "plain torch": {"NFQ_BACKEND": "torch"}}
"""Environment variables of each way to search."""


def run(folder: Path) -> dict:
    """All measurements, as written to the results."""
    name, reason = search_backend(torch.device("cpu"))
    if name != "numba":
        raise NFQError(f"this measures numba's search too, but {reason}")
    source, target = folder / "sdxl.safetensors", folder / "small.nfq.safetensors"
    if not source.exists():
        write_sdxl_unet(source)
    convert = ("nfq_core", "quantize", str(source), str(target), "--preset", "small", "--effort", "best")
    found = {}
    for way, environment in WAYS.items():
        with patch.dict("os.environ", environment):
            seconds = timed(lambda: json_of(*convert, "--force", "--json"))
        facts = json_of("nfq_core", "info", str(target), "--json")
        compared = json_of("nfq_core", "compare", str(source), str(target), "--json")
        kept = {name: facts[name] for name in ("file_bytes", "packed_bits_per_weight")}
        found[way] = {"seconds": seconds, **kept, "sqnr_db": compared["sqnr_db"]}
        print(way, found[way], flush=True)
    return {"ways": found}


def table(results: dict) -> str:
    """Time, size and error with and without numba."""
    plain = results["ways"]["plain torch"]["seconds"]
    rows = []
    for way, one in results["ways"].items():
        time = [f"{one['seconds']:.0f} s", f"{plain / one['seconds']:.1f} ×"]
        size = [f"{one['file_bytes'] / 1e9:.3f} GB", f"{one['packed_bits_per_weight']:.2f}"]
        rows.append([way, *time, *size, f"{one['sqnr_db']:.2f}"])
    header = ["SDXL's UNet, `--preset small --effort best`", "time", "speed", "file", "packed bits", "weights, dB"]
    return dated_table(header, rows, results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, default=Path("fullsize-data"), help="folder for the files, 7 GB")
    options = parser.parse_args()
    options.dir.mkdir(exist_ok=True)
    print(write_results("search", run(options.dir)))
