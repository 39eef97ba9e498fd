"""Draw with the bundled demo model."""

from __future__ import annotations

import os

import numpy as np

from ..checkpoints.state_dict import load
from ..checkpoints.whole_checkpoint import dequantize_state_dict
from ..errors import NFQError
from ..report.pictures import Drawing, is_packed
from .model import GUIDANCE, build_pipeline, load_weights, sample
from .shapes import CAPTIONS


class DemoPainter:
    """Draws with the demo model. See `report.pictures.Painter`."""

    def __init__(self, drawing: Drawing) -> None:
        captions = drawing.prompts or CAPTIONS
        guidance = GUIDANCE if drawing.guidance is None else drawing.guidance
        self.drawing = Drawing(captions, drawing.seed, drawing.steps, guidance)
        if drawing.side is not None or drawing.device != "cpu":
            raise NFQError("the demo model draws 32 × 32 pixels on the CPU; leave --side and --device out")
        self._pipeline = build_pipeline()

    def load(self, path: str | os.PathLike) -> None:
        """Load a file's weights."""
        weights = dequantize_state_dict(load(path)) if is_packed(path) else load_weights(path)
        try:
            self._pipeline = build_pipeline(weights)
        except (RuntimeError, KeyError):
            raise NFQError(f"{path} does not fit the demo model; give its own --pipeline") from None

    def pictures(self) -> np.ndarray:
        """Draw every caption."""
        drawing = self.drawing
        try:
            return sample(
                self._pipeline, drawing.prompts, seed=drawing.seed, steps=drawing.steps, guidance=drawing.guidance
            )
        except ValueError as error:
            raise NFQError(f"the demo model cannot draw this: {error}") from None

    def latents(self) -> None:
        """None: the demo model works on pixels."""
