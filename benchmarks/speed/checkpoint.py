"""A whole SDXL checkpoint through the command line: `python -m benchmarks.speed.checkpoint --dir DIR`.

Writes a synthetic fp16 checkpoint of SDXL's names and shapes (6.94 GB: UNet, CLIP-L, OpenCLIP-G, VAE) to DIR if there
is none, predicts its size for several settings, and converts it at the defaults, in turns with SDXL's UNet alone. With
`--runs 0` nothing is converted.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from ..checkpoint_shapes import sdxl_checkpoint
from ..shared import (
    argument_parser,
    dated_table,
    in_turns,
    json_of,
    spread,
    summary,
    write_results,
    write_sdxl_unet,
    write_synthetic,
)

SETTINGS = {
    "defaults": (),
    "`--text-encoders 5bit`": ("--text-encoders", "5bit"),
    "`--text-encoders keep`": ("--text-encoders", "keep"),
    "`--preset large`": ("--preset", "large"),
    "`--preset small`": ("--preset", "small"),
    "`--preset tiny`": ("--preset", "tiny"),
}
"""Options of `nfq quantize`, by the name that the table shows."""


def run(folder: Path, runs: int) -> dict:
    """All measurements, as written to the results."""
    source, target = folder / "sdxl-checkpoint.safetensors", folder / "sdxl-checkpoint.nfq.safetensors"
    if not source.exists():
        write_synthetic(source, sdxl_checkpoint())
    predicted = {}
    for name, options in SETTINGS.items():
        with tempfile.TemporaryDirectory() as empty:
            found = json_of("nfq_core", "quantize", str(source), empty, *options, "--dry-run", "--json")
        predicted[name] = {key: found[key] for key in ("file_bytes", "original_bytes", "components")}
        print(name, found["file_bytes"], flush=True)
    results: dict = {"predicted": predicted}
    if runs:
        unet = folder / "sdxl.safetensors"
        if not unet.exists():
            write_sdxl_unet(unet)
        converted = {"unet": unet, "checkpoint": source}
        seconds = in_turns({name: partial(_convert, path, target) for name, path in converted.items()}, runs)
        results["convert_seconds"] = {name: summary(each) for name, each in seconds.items()}
        facts = json_of("nfq_core", "info", str(target), "--json")
        results["converted"] = {key: facts[key] for key in ("file_bytes", "original_bytes", "components")}
    return results


def _convert(source: Path, target: Path) -> None:
    json_of("nfq_core", "quantize", str(source), str(target), "--force", "--json")


def table(results: dict) -> str:
    """Size of the file and of each component, by setting."""
    names = [each["name"] for each in results["predicted"]["defaults"]["components"]]
    rows = []
    for setting, found in results["predicted"].items():
        parts = {each["name"]: each["file_bytes"] for each in found["components"]}
        cells = [f"{nbytes / 1e9:.2f} GB" for nbytes in (found["file_bytes"], *map(parts.__getitem__, names))]
        rows.append([setting, *cells])
    if "converted" in results:
        seconds = spread(results["convert_seconds"]["checkpoint"], " s")
        unet = spread(results["convert_seconds"]["unet"], " s")
        label = f"defaults, converted in {seconds}; the UNet alone in {unet}"
        rows.append([label, f"{results['converted']['file_bytes'] / 1e9:.2f} GB"])
        rows[-1] += [f"{each['file_bytes'] / 1e9:.2f} GB" for each in results["converted"]["components"]]
    original = results["predicted"]["defaults"]["original_bytes"] / 1e9
    return dated_table([f"whole checkpoint, {original:.2f} GB as fp16", "file", *names], rows, results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, default=Path("checkpoint-data"), help="folder for the files, 15 GB")
    parser.add_argument("--runs", type=int, default=3, help="number of conversions to time (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.dir.mkdir(exist_ok=True)
    print(write_results("checkpoint", run(arguments.dir, arguments.runs)))
