"""The tables of README and docs, made anew from the results: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from . import (
    article,
    calibrated,
    decode,
    diffusers_load,
    fullsize,
    gpu,
    host,
    int8,
    levels,
    quality_tables,
    sizes,
    trellis,
)
from .report import RESULTS, ROOT

TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "quality": ("quality", quality_tables.table),
    "quality_checks": ("quality", quality_tables.summary),
    "trellis_windows": ("trellis", trellis.windows_table),
    "trellis_eight_bits": ("trellis", trellis.eight_bits_table),
    "trellis_goals": ("trellis", trellis.goals_table),
} | {
    module.__name__.rpartition(".")[2]: (module.__name__.rpartition(".")[2], module.table)
    for module in (levels, calibrated, sizes, article, int8, fullsize, diffusers_load, host, decode, gpu)
}
"""By the name between the marks, the results it is made of, and what makes it."""

PAGES = (ROOT / "README.md", ROOT / "docs" / "MEASUREMENTS.md", ROOT / "docs" / "TRELLIS.md")


def put_tables() -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in the pages by the tables of the results."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, (results, table) in TABLES.items():
            path = RESULTS / f"{results}.json"
            if path.exists() and f"<!-- {name} -->" in text:
                body = f"<!-- {name} -->\n\n{table(json.loads(path.read_text(encoding='utf-8')))}\n\n<!-- /{name} -->"
                text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, body=body: body, text, flags=re.DOTALL)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    put_tables()
