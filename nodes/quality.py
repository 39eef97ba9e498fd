"""A quality report of quantised files: plots as one picture, tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..nfq_core.parallel import Progress
from ..nfq_core.report.measure import by_size, measure
from ..nfq_core.report.plots import check_matplotlib, pixels, plots
from ..nfq_core.report.write import markdown


def quality_report(original: str, files: Sequence[str], progress: Progress) -> tuple[torch.Tensor, str]:
    """Measure quantised files against their original.

    Args:
        original: path of the safetensors file that was quantised.
        files: paths of `.nfq.safetensors` files.
        progress: see `parallel.Progress`; an error that it raises ends the measurement.

    Returns:
        All plots in one column, shape (1, height, width, 3), 0 … 1; the report as Markdown.

    Raises:
        NFQError: as `measure`.
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    found = measure(original, by_size(files), progress=progress)
    drawn = [torch.from_numpy(pixels(figure)) for figure in plots(found).values()]
    return torch.cat(drawn).unsqueeze(0).float() / 255, markdown(found, ())
