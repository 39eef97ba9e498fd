"""The scenes of the second model: a thing in a landscape, their captions, and the vocabulary.

Nothing here is in the demo model's scenes, and nothing was ever tuned on the model that draws them. Pictures are
float32 arrays [24, 24, 3] with values in 0..1, drawn four times larger and averaged down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nfq_core.demo.shapes import MAX_WORDS

SIZE, SUPERSAMPLING = 24, 4
HORIZON = 0.62  # Height of the sky, as a share of the picture's

COLOURS = {
    "red": (0.80, 0.16, 0.12),
    "blue": (0.15, 0.25, 0.70),
    "orange": (0.95, 0.55, 0.15),
    "violet": (0.55, 0.30, 0.75),
    "grey": (0.55, 0.55, 0.58),
    "ivory": (0.98, 0.95, 0.85),
}
# The sky's colour at the top and at the horizon, and the light on everything else.
TIMES = {
    "day": ((0.25, 0.50, 0.95), (0.75, 0.88, 1.00), 1.0),
    "dusk": ((0.25, 0.15, 0.40), (0.98, 0.55, 0.25), 0.75),
    "night": ((0.02, 0.02, 0.10), (0.10, 0.14, 0.32), 0.45),
}
# The colour near and far, and how strong the waves are.
GROUNDS = {
    "grass": ((0.16, 0.50, 0.12), (0.45, 0.70, 0.30), 0.03),
    "sand": ((0.85, 0.70, 0.40), (0.95, 0.86, 0.62), 0.05),
    "snow": ((0.92, 0.94, 1.00), (0.80, 0.84, 0.92), 0.02),
    "water": ((0.05, 0.22, 0.45), (0.30, 0.52, 0.70), 0.12),
}
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}
LIGHTS = ("sun", "moon", "cloud")


def _house(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    roof = (y <= -0.1) & (y + 1 >= 1.0 * np.abs(x))
    return roof | ((np.abs(x) <= 0.75) & (y > -0.1) & (y <= 1))


def _tree(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.hypot(x, y + 0.35) <= 0.65) | ((np.abs(x) <= 0.14) & (y > 0) & (y <= 1))


def _tower(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    battlement = (np.abs(x) <= 0.5) & (y > -1) & (y <= -0.6) & ((np.abs(x) <= 0.14) | (np.abs(x) >= 0.32))
    return battlement | ((np.abs(x) <= 0.4) & (y > -0.6) & (y <= 1))


def _tent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y <= 1) & (y + 0.4 >= 1.4 * np.abs(x)) & ~((np.abs(x) <= 0.15 * (y + 0.4)) & (y > 0.2))


# Each takes coordinates in units of half the thing's height, y downwards, and returns which points are inside.
THINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "house": _house,
    "tree": _tree,
    "tower": _tower,
    "tent": _tent,
}

VOCABULARY = ("<pad>", "a", "on", "under", "at", *COLOURS, *TIMES, *GROUNDS, *PLACES, *LIGHTS, *THINGS)
_WORD_IDS = {word: index for index, word in enumerate(VOCABULARY)}


class Landscape(NamedTuple):
    """One thing on the ground, and one light in the sky; every part of it is in the caption."""

    colour: str
    thing: str
    place: str
    ground: str
    light: str
    time: str


def random_landscape(rng: np.random.Generator) -> Landscape:
    """Draw a landscape at random."""
    parts = (COLOURS, THINGS, PLACES, GROUNDS, LIGHTS, TIMES)
    return Landscape(*(str(rng.choice(list(part))) for part in parts))


def describe(scene: Landscape) -> str:
    """The caption, such as "a red house left on grass under a moon at dusk"."""
    return f"a {scene.colour} {scene.thing} {scene.place} on {scene.ground} under a {scene.light} at {scene.time}"


def tokenise(captions: Sequence[str]) -> np.ndarray:
    """Turn captions in words of VOCABULARY into word ids, int64 [n, MAX_WORDS]; "" gives padding only."""
    ids = np.zeros((len(captions), MAX_WORDS), dtype=np.int64)
    for row, caption in enumerate(captions):
        for column, word in enumerate(caption.split()):
            ids[row, column] = _WORD_IDS[word]
    return ids


def draw(scene: Landscape, rng: np.random.Generator) -> np.ndarray:
    """Draw a landscape, float32 [24, 24, 3] in 0..1; rng varies sizes, positions and waves."""
    side = SIZE * SUPERSAMPLING
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = at[None, :, None], at[:, None, None]
    top, bottom, brightness = (np.array(part, dtype=np.float32) for part in TIMES[scene.time])
    large = np.broadcast_to(top + (bottom - top) * np.minimum(y / HORIZON, 1), (side, side, 3)).copy()
    _draw_light(large, scene.light, x, y, rng)
    near, far, waves = (np.array(part, dtype=np.float32) for part in GROUNDS[scene.ground])
    depth = np.clip((y - HORIZON) / (1 - HORIZON), 0, 1)
    phase = 40 * np.sqrt(depth) + 2 * np.sin(6 * x + rng.uniform(0, 6))
    ground = np.clip((far + (near - far) * depth + waves * np.sin(phase)) * brightness, 0, 1)
    below = np.broadcast_to(y > HORIZON, (side, side, 1))[..., 0]
    large[below] = np.broadcast_to(ground, large.shape)[below]
    half = rng.uniform(0.20, 0.26)
    centre_x, centre_y = PLACES[scene.place] + rng.uniform(-0.03, 0.03), HORIZON + 0.12 - half * 0.5
    inside = THINGS[scene.thing]((x[..., 0] - centre_x) / half, (y[..., 0] - centre_y) / half)
    shade = 1 - 0.35 * np.clip((x - centre_x) / half, 0, 1)
    coloured = np.array(COLOURS[scene.colour], dtype=np.float32) * brightness * shade
    large[inside] = np.broadcast_to(coloured, large.shape)[inside]
    return large.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING, 3).mean(axis=(1, 3), dtype=np.float32)


def _draw_light(large: np.ndarray, light: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> None:
    """Draw the sun, the moon or a cloud somewhere in the sky."""
    x, y = x[..., 0] - rng.uniform(0.2, 0.8), y[..., 0] - rng.uniform(0.14, 0.24)
    if light == "sun":
        large[np.hypot(x, y) <= 0.11] = (1.0, 0.93, 0.45)
    elif light == "moon":
        large[(np.hypot(x, y) <= 0.10) & (np.hypot(x - 0.05, y + 0.02) > 0.08)] = (0.95, 0.95, 0.88)
    else:
        puffs = [np.hypot((x - dx) / 1.5, y - dy) <= 0.07 for dx, dy in ((-0.10, 0.02), (0.0, -0.02), (0.10, 0.02))]
        large[np.logical_or.reduce(puffs)] = (0.92, 0.92, 0.95)
