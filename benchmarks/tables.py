"""The README's tables, made anew from the results: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
import re

from . import article, calibrated, decode, diffusers_load, fullsize, gpu, host, int8, levels, quality_tables, sizes
from .report import RESULTS, ROOT

BY_NAME = {
    "quality": quality_tables.table,
    "levels": levels.table,
    "calibrated": calibrated.table,
    "sizes": sizes.table,
    "article": article.table,
    "int8": int8.table,
    "fullsize": fullsize.table,
    "diffusers_load": diffusers_load.table,
    "host": host.table,
    "decode": decode.table,
    "gpu": gpu.table,
}


def put_tables() -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in the README by the tables of the results."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, table in BY_NAME.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))
            body = f"<!-- {name} -->\n\n{table(results)}\n\n<!-- /{name} -->"
            text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, body=body: body, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    put_tables()
