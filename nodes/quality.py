"""A quality report of files: its plots as one picture, its tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..nfq_core.parallel import Progress
from ..nfq_core.report.measure import by_size, measure
from ..nfq_core.report.plots import check_matplotlib, pixels, plots
from ..nfq_core.report.write import markdown


def quality_report(original: str, files: Sequence[str], progress: Progress) -> tuple[torch.Tensor, str]:
    """Measure files against the one that they were made from.

    Args:
        original: path of a safetensors file.
        files: paths of `.nfq.safetensors` files.
        progress: see `parallel.Progress`; an error raised in it ends the work.

    Returns:
        All plots one below the other, shape (1, height, width, 3), 0 … 1; the report in Markdown.

    Raises:
        NFQError: as `measure`.
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    found = measure(original, by_size(files), progress=progress)
    drawn = [torch.from_numpy(pixels(figure)) for figure in plots(found).values()]
    return torch.cat(drawn).unsqueeze(0).float() / 255, markdown(found, ())
