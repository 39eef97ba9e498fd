"""Draw with the bundled demo model."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..checkpoints.state_dict import load
from ..checkpoints.whole_checkpoint import dequantize_state_dict
from ..errors import NFQError
from ..report.pictures import Drawing, is_packed
from ..report.protocol import Sample, Series, consecutive
from .model import GUIDANCE, build_pipeline, load_weights, sample
from .shapes import CAPTIONS, IMAGE_SIZE


class DemoPainter:
    """Draws with the demo model. See `report.pictures.Painter`."""

    has_latents = False
    """The demo model works on pixels."""

    def __init__(self, drawing: Drawing) -> None:
        if drawing.side is not None or drawing.device != "cpu":
            raise NFQError("the demo model draws 32 × 32 pixels on the CPU; leave --side and --device out")
        captions = drawing.prompts or CAPTIONS
        guidance = GUIDANCE if drawing.guidance is None else drawing.guidance
        seeds = consecutive(drawing.seed, len(captions))
        self.chosen = Series(captions, seeds, drawing.steps, IMAGE_SIZE, guidance)
        self.device = drawing.device
        self._pipeline = build_pipeline()

    def load(self, path: str | os.PathLike) -> None:
        """Load a file's weights."""
        weights = dequantize_state_dict(load(path)) if is_packed(path) else load_weights(path)
        try:
            self._pipeline = build_pipeline(weights)
        except (RuntimeError, KeyError):
            raise NFQError(f"{path} does not fit the demo model; give its own --pipeline") from None

    def draw(self, series: Series) -> Iterator[Sample]:
        """Draw every caption, all at once."""
        try:
            pictures = sample(
                self._pipeline, series.prompts, seed=series.seeds, steps=series.steps, guidance=series.guidance
            )
        except ValueError as error:
            raise NFQError(f"the demo model cannot draw this: {error}") from None
        yield from (Sample(None, picture) for picture in pictures)
