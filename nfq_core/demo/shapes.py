"""The demo model's scenes: coloured shapes on flat backgrounds, their captions, and the vocabulary.

Pictures are float32 arrays [32, 32, 3] (height, width, RGB) with values in 0..1; shapes are drawn four times larger
and averaged down, which smooths their edges. Needs numpy only.
"""

from collections.abc import Callable, Sequence
from math import perm
from typing import NamedTuple

import numpy as np

IMAGE_SIZE = 32
SUPERSAMPLING = 4
MAX_WORDS = 12

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "yellow": (0.98, 0.86, 0.10),
    "purple": (0.50, 0.12, 0.65),
    "pink": (1.00, 0.60, 0.75),
    "cyan": (0.20, 0.85, 0.90),
    "brown": (0.45, 0.26, 0.10),
    "white": (1.00, 1.00, 1.00),
    "black": (0.00, 0.00, 0.00),
}

# Radius in pixels: half the side of the box that a shape roughly fills.
SIZES: dict[str, float] = {"small": 5.5, "medium": 8.5, "large": 12.0}
PAIR_RADIUS = 6.0


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five-pointed star: within each tenth of a turn its edge is one straight line from a tip to a notch."""
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    radius = np.hypot(x, y)
    tip, notch = 1.1, 0.48
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_along, notch_across = notch * np.cos(tenth), notch * np.sin(tenth)
    return (tip - along) * notch_across >= across * (tip - notch_along)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sextic curve (x² + y² - 1)³ = x² y³, scaled into the unit box."""
    across, up = 1.15 * x, 0.2 - 1.15 * y
    return (across**2 + up**2 - 1) ** 3 <= across**2 * up**3


# Each takes coordinates in units of the radius, x to the right and y downwards, and returns which points are inside.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.88,
    "triangle": lambda x, y: (y <= 0.8) & (y + 0.95 >= 1.75 * np.abs(x)),
    "star": _star,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.32) & (np.maximum(np.abs(x), np.abs(y)) <= 1),
    "diamond": lambda x, y: 1.35 * np.abs(x) + np.abs(y) <= 1.1,
    "ring": lambda x, y: (np.hypot(x, y) <= 1) & (np.hypot(x, y) >= 0.55),
    "heart": _heart,
}

PADDING = "<pad>"
VOCABULARY: tuple[str, ...] = (
    PADDING,
    *("a", "on", "background", "left", "of"),
    *SIZES,
    *COLOURS,
    *SHAPES,
)
_WORD_IDS = {word: index for index, word in enumerate(VOCABULARY)}

# Mostly large things: the bundled model draws colours well, but small shapes as blobs.
CAPTIONS: tuple[str, ...] = (
    "a large red circle on a white background",
    "a large yellow star on a blue background",
    "a medium green triangle on a pink background",
    "a large purple heart on a yellow background",
    "a large cyan ring on a black background",
    "a large white cross on a red background",
    "a small blue circle on a yellow background",
    "a red square left of a blue circle on a white background",
)


class Thing(NamedTuple):
    """One shape of a picture; size is "" if the caption names none, as in pictures of two things."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """One thing somewhere near the middle, or two, the first left of the second, on a flat background."""

    things: tuple[Thing, ...]
    background: str


def tokenise(captions: Sequence[str]) -> np.ndarray:
    """Turn captions into word ids, int64 [n, MAX_WORDS]; "" gives padding only, the caption of unguided sampling.

    Raises ValueError on a word outside VOCABULARY and on a caption of more than MAX_WORDS words.
    """
    ids = np.zeros((len(captions), MAX_WORDS), dtype=np.int64)
    for row, caption in enumerate(captions):
        words = caption.lower().split()
        if len(words) > MAX_WORDS:
            raise ValueError(f"caption {caption!r} has {len(words)} words, at most {MAX_WORDS} are known")
        for column, word in enumerate(words):
            if word not in _WORD_IDS:
                raise ValueError(f"caption {caption!r}: unknown word {word!r}; known: {', '.join(VOCABULARY[1:])}")
            ids[row, column] = _WORD_IDS[word]
    return ids


def random_scene(rng: np.random.Generator, pair_share: float = 0.3) -> Scene:
    """Draw a scene at random; no thing has the background's colour, and the two things of a pair differ."""
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    shapes = [str(shape) for shape in rng.permutation(list(SHAPES))]
    background = colours.pop()
    if rng.random() < pair_share:
        return Scene((Thing("", colours[0], shapes[0]), Thing("", colours[1], shapes[1])), background)
    return Scene((Thing(str(rng.choice(list(SIZES))), colours[0], shapes[0]),), background)


def describe(scene: Scene) -> str:
    """The caption of a scene in words of VOCABULARY, such as "a small red circle on a blue background"."""
    things = [" ".join(word for word in ("a", *thing) if word) for thing in scene.things]
    return " left of ".join(things) + f" on a {scene.background} background"


SCENE_COUNT = perm(len(COLOURS), 2) * len(SIZES) * len(SHAPES) + perm(len(COLOURS), 3) * perm(len(SHAPES), 2)
"""Number of scenes of one thing and of two; each has its own caption."""


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, float32 [32, 32, 3] in 0..1; rng places its things, which always stay inside the picture."""
    side = IMAGE_SIZE * SUPERSAMPLING
    pixels = (np.arange(side, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = pixels[None, :], pixels[:, None]
    large = np.empty((side, side, 3), dtype=np.float32)
    large[:] = COLOURS[scene.background]
    for index, thing in enumerate(scene.things):
        if len(scene.things) == 1:
            radius = SIZES[thing.size]
            room = IMAGE_SIZE / 2 - 1 - radius
            centre_x, centre_y = IMAGE_SIZE / 2 + 0.6 * room * rng.uniform(-1, 1, size=2)
        else:
            radius = PAIR_RADIUS
            centre_x = IMAGE_SIZE * (0.25 + 0.5 * index) + rng.uniform(-1, 1)
            centre_y = IMAGE_SIZE / 2 + rng.uniform(-4, 4)
        inside = SHAPES[thing.shape]((x - centre_x) / radius, (y - centre_y) / radius)
        large[inside] = COLOURS[thing.colour]
    return large.reshape(IMAGE_SIZE, SUPERSAMPLING, IMAGE_SIZE, SUPERSAMPLING, 3).mean(axis=(1, 3))
