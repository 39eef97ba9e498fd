"""Writes the golden files of formats that have none yet: python tests/golden/make.py NAME ...

The bytes of a released format id never change, so an existing file is never replaced: bytes that should change need a
new format id. `<format id>.nfq.safetensors` holds a quantised `weight` and a kept `bias`, `<format id>.npy` what the
weight must decode to, to the bit. Of a format with common levels, the weight uses them, and `<format id>.own.…` are the
files of a weight with levels of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import nfq_core
from nfq_core.checkpoints.article_import import pack_article
from nfq_core.files.article import article_dequantize, article_quantize
from nfq_core.packed.article import ArticleFormat
from nfq_core.packed.formats import FORMATS

FOLDER = Path(__file__).resolve().parent

SHAPES = {"article7_b64": (5, 3291)}
"""More than one superblock; the other formats' files have eleven blocks."""


OWN = ".own"
"""Ends the name of files of a weight with levels of its own, where others use the common levels."""

TINY = 2.0**-7
"""Makes some blocks so small that they need levels of their own."""

NAMES = [f"{fmt.id}{end}" for fmt in FORMATS.values() for end in (("", OWN) if fmt.has_common_levels else ("",))]
"""Names of the golden files, by format."""


def paths(name: str) -> tuple[Path, Path]:
    """Where the golden files of a name in NAMES are: the container, and the values."""
    return FOLDER / f"{name}.nfq.safetensors", FOLDER / f"{name}.npy"


def main(names: list[str]) -> None:
    """Write the golden files of `names`; nothing is written when one of them exists or is unknown."""
    targets = {name: paths(name) for name in names}
    unknown = [name for name in names if name not in NAMES]
    existing = [path.name for pair in targets.values() for path in pair if path.exists()]
    if unknown or existing or not names:
        problem = f"no such format: {', '.join(unknown)}" if unknown else f"never replaced: {', '.join(existing)}"
        sys.exit(problem if names else __doc__)
    for name, (container, values) in targets.items():
        weight = sample(SHAPES.get(name, (23, 29)))
        if name.endswith(OWN):
            weight *= TINY
        packed, expected = packed_and_expected(name.removesuffix(OWN), weight)
        bias = torch.tensor([0.5, -2.0, 0.0], dtype=torch.bfloat16)
        nfq_core.save({"weight": packed, "bias": bias}, container, settings={"golden": name})
        with open(values, "xb") as file:
            np.save(file, expected.numpy())


def sample(shape: tuple[int, ...]) -> torch.Tensor:
    """Gaussian weights in fp16 with a zero block, a block of tiny weights, an outlier and a short last block."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(64)) * 0.02
    flat = weight.view(-1)
    flat[128:192] = 0
    flat[192:256] *= 0.01
    flat[300] = -1.5
    return weight.half()


def packed_and_expected(format_id: str, weight: torch.Tensor) -> tuple[nfq_core.NFTensor, torch.Tensor]:
    """The packed weight, and the fp16 weights that it stands for."""
    fmt = FORMATS[format_id]
    if not isinstance(fmt, ArticleFormat):
        packed = nfq_core.quantize(weight, format=format_id)
        return packed, packed.dequantize()
    article = article_quantize(weight, fmt.levels)
    return pack_article(article), article_dequantize(article)


if __name__ == "__main__":
    main(sys.argv[1:])
