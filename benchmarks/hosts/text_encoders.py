"""Encoding prompts with packed text encoders in a real ComfyUI: `python -m benchmarks.hosts.text_encoders --dir DIR`.

COMFYUI_PATH names the host and COMFYUI_PYTHON its Python. SDXL's text encoders with random weights are quantised in the
host to each number of bits. The packed CLIP and the same one dense encode a prompt in turns.
"""

from __future__ import annotations

from pathlib import Path

from ..shared import argument_parser, dated_table, machine, spread, summary, write_results

BITS = ("8bit", "5bit")


def graph() -> dict:
    """A dense CLIP and a packed one of each number of bits."""
    nodes = {"dense": {"class_type": "NFQTestCompanions", "inputs": {}}}
    for bits in BITS:
        nodes[bits] = {"class_type": "NFQuantizeCLIP", "inputs": {"clip": ["dense", 0], "bits": bits}}
    return nodes


def measure(directory: Path) -> dict:
    """All measurements, as written to the results: by number of bits, seconds of each CLIP and bytes in the host."""
    from driver import Host, make_base

    base = directory / "comfyui"
    if not base.exists():
        make_base(base)
    host, found = Host(base), {}
    try:
        for bits in BITS:
            clips = {"clip": [bits, 0], "other_clip": ["dense", 0]}
            facts = host.check("encodings", graph(), **clips)["clips"]
            seconds = host.check("encode_seconds", graph(), **clips)
            found[bits] = {name: facts[0][name] for name in ("model_size", "fp16_size")}
            found[bits] |= {"packed": summary(seconds["clip"]), "dense": summary(seconds["other_clip"])}
    finally:
        host.close()
    return {"encoders": found}


def table(results: dict) -> str:
    """Memory and time of each number of bits, beside dense text encoders."""
    rows = []
    for bits, found in results["encoders"].items():
        size, dense, packed = found["model_size"], found["dense"], found["packed"]
        rows.append(
            [
                f"`{bits}`",
                f"{size / 1e9:.2f} GB = {size / found['fp16_size']:.2f} ×",
                spread(packed, " s"),
                spread(dense, " s"),
                f"{packed['median'] / dense['median']:.2f} ×",
            ]
        )
    return dated_table(["CLIP", "memory, of fp16", "packed", "dense", "ratio"], rows, results)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the host's files")
    options = parser.parse_args()
    print(machine())
    print(write_results("encoding", measure(options.dir.resolve())))
