"""`nfq demo`: quantise the bundled model at the article's five levels and draw the same captions with each."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from ..checkpoints.convert import quantize_file
from ..checkpoints.examine import compare_files, file_info
from ..checkpoints.state_dict import load
from ..checkpoints.whole_checkpoint import dequantize_state_dict
from ..files.atomic import prepare_folder, write_whole
from ..files.container import SUFFIX
from ..packed.formats import LEVELS
from ..parallel import Progress, no_progress
from ..planning.settings import Formats, Settings
from ..report.metrics import psnr_db
from ..report.sheet import check_pillow, comparison_sheet
from .model import (
    GUIDANCE,
    STEPS,
    TinyPipeline,
    build_pipeline,
    bundled_weights_path,
    import_diffusers,
    load_weights,
    sample,
)
from .shapes import CAPTIONS

SEED = 0


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the warning that the demo model is too small for ComfyUI, which would appear five times."""
    log = logging.getLogger("nfq")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    log.addFilter(is_error)
    try:
        yield
    finally:
        log.removeFilter(is_error)


def run_demo(folder: str | Path, *, overwrite: bool = False, progress: Progress = no_progress) -> dict:
    """Quantise the bundled model at the article's five levels and draw the same captions and seeds with each.

    Convolutions always have 32 levels, as in the article; the first and last are kept. Pictures are drawn with DPM++ 2M
    and classifier-free guidance, from weights read back from the files.

    Args:
        folder: receives `comparison.png`, `report.json` and five `.nfq.safetensors` files; created if missing.
        overwrite: whether files of an earlier demo may be replaced.
        progress: called with the number of models sampled, the total of six, and the name of the last.

    Returns:
        The report: `levels` (32 first, each `levels`, `bits_per_weight`, `file_bytes`, `sqnr_db` of the weights and
        `psnr_db` of all pictures against fp16's), `comparison`, `captions`, `seed`, `steps`, `guidance`,
        `original_bytes` and `seconds`.

    Raises:
        TargetExistsError: the folder has an earlier demo and `overwrite` is false.
        NFQError: the folder cannot be created or written.
        ImportError: diffusers or Pillow is missing.
    """
    started = perf_counter()
    folder = Path(folder)
    import_diffusers()
    check_pillow()
    written = ["comparison.png", "report.json", *(f"demo-nf{levels}{SUFFIX}" for levels in LEVELS)]
    prepare_folder(folder, written, overwrite)
    original = bundled_weights_path()
    weights = load_weights()
    reference = _draw(build_pipeline(weights))
    progress(1, 1 + len(LEVELS), "fp16")
    columns = [(f"fp16|{original.stat().st_size / 1e6:.1f} MB", reference)]
    rows = []
    for count, levels in enumerate(LEVELS, 2):
        target = folder / f"demo-nf{levels}{SUFFIX}"
        with _without_warnings():
            quantize_file(original, target, Settings(Formats.of(levels)), overwrite=overwrite)
        pictures = _draw(build_pipeline(dequantize_state_dict(load(target))))
        psnr = psnr_db(torch.from_numpy(reference), torch.from_numpy(pictures), 255)
        info = file_info(target)
        row = {
            "levels": levels,
            "bits_per_weight": info["bits_per_weight"],
            "file_bytes": info["file_bytes"],
            "sqnr_db": compare_files(original, target)["sqnr_db"],
            "psnr_db": psnr,
        }
        rows.append(row)
        label = f"{levels} levels, {row['bits_per_weight']:.2f} bits|{row['file_bytes'] / 1e6:.1f} MB, "
        columns.append((f"{label}{psnr or math.inf:.1f} dB", pictures))
        progress(count, 1 + len(LEVELS), f"{levels} levels")
    comparison = folder / "comparison.png"
    png = BytesIO()
    comparison_sheet(CAPTIONS, columns).save(png, "PNG", optimize=True)
    write_whole(comparison, png.getvalue(), overwrite)
    report = {
        "levels": rows,
        "comparison": str(comparison),
        "captions": list(CAPTIONS),
        "seed": SEED,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "original_bytes": original.stat().st_size,
        "seconds": round(perf_counter() - started, 1),
    }
    write_whole(folder / "report.json", json.dumps(report, indent=2).encode(), overwrite)
    return report


def _draw(pipeline: TinyPipeline) -> np.ndarray:
    return sample(pipeline, CAPTIONS, seed=SEED, steps=STEPS, guidance=GUIDANCE)
