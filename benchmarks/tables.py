"""Regenerates the tables in README.md, docs/ and benchmarks/README.md from the results files.

A table goes between `<!-- NAME -->` and `<!-- /NAME -->`, in whichever of these pages has the two markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from . import article, families
from .hosts import comfyui, diffusers_load, text_encoders
from .quality import (
    calibration,
    checks,
    collecting,
    levels,
    prediction,
    presets,
    sharing,
    text_encoder,
    trellis,
)
from .shared import RESULTS, ROOT, argument_parser
from .speed import calibrating, checkpoint, decode, fullsize, gpu, gpu_static, int8, plain_decode, search

TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "quality": ("quality", checks.table),
    "levels": ("levels", levels.table),
    "calibrated": ("calibrated", calibration.table),
    "collecting": ("collecting", collecting.table),
    "calibrating": ("calibrating", calibrating.table),
    "sharing": ("sharing", sharing.table),
    "prediction": ("prediction", prediction.table),
    "presets": ("presets", presets.table),
    "text_encoder": ("text_encoder", text_encoder.table),
    "trellis_formats": ("trellis", trellis.formats_table),
    "trellis_demo": ("trellis", trellis.demo_table),
    "trellis_goals": ("trellis", trellis.goals_table),
    "article": ("article", article.table),
    "int8": ("int8", int8.table),
    "fullsize": ("fullsize", fullsize.table),
    "checkpoint": ("checkpoint", checkpoint.table),
    "search": ("search", search.table),
    "decode": ("decode", decode.table),
    "plain_decode": ("plain_decode", plain_decode.table),
    "gpu": ("gpu", gpu.table),
    "gpu_static": ("gpu_static", gpu_static.table),
    "families": ("families", families.table),
    "host": ("host", comfyui.table),
    "encoding": ("encoding", text_encoders.table),
    "diffusers_load": ("diffusers_load", diffusers_load.table),
}
"""By marker: the results file without its suffix, and the function that makes the table of it."""


def pages() -> list[Path]:
    """The Markdown files that may have tables."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("benchmarks/*.md")]


def with_tables(text: str, folder: Path = RESULTS) -> str:
    """A page's text with its tables made from the results in `folder`; a table without results stays as it is."""
    for name, (results, table) in TABLES.items():
        path = folder / f"{results}.json"
        if path.exists() and f"<!-- {name} -->" in text:
            body = f"<!-- {name} -->\n\n{table(json.loads(path.read_text(encoding='utf-8')))}\n\n<!-- /{name} -->"
            text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(ROOT))
