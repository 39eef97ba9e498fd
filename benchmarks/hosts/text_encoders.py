"""Encoding prompts with packed text encoders in a real ComfyUI: `python -m benchmarks.hosts.text_encoders --dir DIR`.

COMFYUI_PATH names the host and COMFYUI_PYTHON its Python. SDXL's text encoders with random weights are quantised in the
host to each number of bits. The packed CLIP and the same one dense encode a prompt in turns. Prints seconds and
memory.
"""

from __future__ import annotations

from pathlib import Path

from ..shared import argument_parser, markdown_table

BITS = ("8bit", "5bit")


def graph() -> dict:
    """A dense CLIP and a packed one of each number of bits."""
    nodes = {"dense": {"class_type": "NFQTestCompanions", "inputs": {}}}
    for bits in BITS:
        nodes[bits] = {"class_type": "NFQuantizeCLIP", "inputs": {"clip": ["dense", 0], "bits": bits}}
    return nodes


def measure(directory: Path) -> list[list[str]]:
    """A row for each number of bits."""
    from driver import Host, make_base

    base = directory / "comfyui"
    if not base.exists():
        make_base(base)
    host, rows = Host(base), []
    try:
        for bits in BITS:
            clips = {"clip": [bits, 0], "other_clip": ["dense", 0]}
            facts = host.check("encodings", graph(), **clips)["clips"]
            seconds = host.check("encode_seconds", graph(), **clips)
            packed, dense = seconds["clip"], seconds["other_clip"]
            share = facts[0]["model_size"] / facts[0]["fp16_size"]
            size = f"{facts[0]['model_size'] / 1e9:.2f} GB = {share:.2f} ×"
            rows.append([bits, size, f"{packed:.2f} s", f"{dense:.2f} s", f"{packed / dense:.2f} ×"])
    finally:
        host.close()
    return rows


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the host's files")
    options = parser.parse_args()
    header = ["text encoders", "memory, of fp16", "packed", "dense", "ratio"]
    print(markdown_table(header, measure(options.dir.resolve())))
