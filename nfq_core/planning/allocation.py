"""Choose each layer's format so that a model of a given size has the least noise in its output.

A layer adds noise to the model's output: its sensitivity (see `models.sensitivities`) times the relative noise power of
its weight. Layers move to their next larger format in the order of noise saved per byte, until nothing more fits. Only
formats on the lower convex hull of (bytes, noise) are used, which makes this greedy order a Lagrangian solution (Shoham
and Gersho 1988). The hull depends on the layer's size, because every layer stores its levels if they are few, and
large layers also store many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from math import prod

from ..errors import NFQError
from ..files.writer import Plan
from ..models.sensitivities import Sensitivities
from ..packed.formats import FORMATS
from ..packed.layout import BlockFormat
from ..sizes import size_in_words

EXPECTED_SQNR_DB = {
    "nf4_b64": 9.74,
    "nf7_b64": 14.42,
    "nf12_b64": 19.17,
    "nf16_b64": 21.83,
    "nf24_b64": 25.41,
    "nf32_b64": 27.91,
    "t2w8_b64": 11.53,
    "t3w8_b64": 17.56,
    "t4w8_b64": 23.47,
    "t5w9_b64": 29.46,
    "t6w9_b64": 35.31,
    "nf256_b64": 45.53,
}
"""Signal-to-quantisation-noise ratio (SQNR) of Gaussian weights in each format, in dB.

Measured by `benchmarks.quality.trellis`: scalar formats with effort `fast`, trellis formats with `best`.
Weights with heavier tails lose about the same in every format, so the choice stays the same.
"""

LARGEST = "nf256_b64"

MENUS = {
    effort: tuple(FORMATS[id] for id in EXPECTED_SQNR_DB if id == LARGEST or id.startswith(prefix))
    for effort, prefix in (("fast", "nf"), ("best", "t"))
}
"""Formats to choose from at each effort, smallest first: scalar formats take seconds, trellis formats minutes."""

NEAR = 0.99
"""Smallest accepted file, as a share of the target size."""

MAX_TRIES = 4
"""Most files written while searching for a size. If none is near enough, the best one is written again."""


@dataclass(frozen=True)
class _Step:
    """A layer's move to its next larger format.

    Args:
        noise_saved: noise that it saves in the model's output, per byte.
        layer: name of the layer.
        index: index of the larger format among those on the layer's hull.
        nbytes: packed bytes that it adds.
    """

    noise_saved: float
    layer: str
    index: int
    nbytes: int


def lower_convex_hull(weights: int, formats: Sequence[BlockFormat]) -> list[BlockFormat]:
    """Lower convex hull of (packed bytes, noise) for a layer of `weights` weights, smallest format first."""
    points = sorted((fmt.packed_bytes(weights), expected_noise(fmt), fmt.id) for fmt in formats)
    hull: list[tuple[int, float, str]] = []
    for size, noise, id in points:
        if hull and noise >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (size, noise, id)):
            hull.pop()
        hull.append((size, noise, id))
    return [FORMATS[id] for _, _, id in hull]


def packed_bounds(shapes: Mapping[str, Sequence[int]], effort: str) -> tuple[int, int]:
    """Fewest and most packed bytes that layers of these shapes can take together; see MENUS."""
    counts, formats = [prod(shape) for shape in shapes.values()], MENUS[effort]
    return tuple(sum(limit(fmt.packed_bytes(n) for fmt in formats) for n in counts) for limit in (min, max))


def expected_noise(fmt: BlockFormat) -> float:
    """Noise power of Gaussian weights in one of the formats of EXPECTED_SQNR_DB, relative to their variance."""
    return 10 ** (-EXPECTED_SQNR_DB[fmt.id] / 10)


def predicted_output_db(
    formats: Mapping[str, BlockFormat],
    sensitivities: Sensitivities,
    factors: Mapping[str, float] | None = None,
) -> float | None:
    """Predict the signal-to-noise ratio of a quantised model's output: -10·log10(Σ sensitivity · noise of the format).

    Assumes weights with the noise of Gaussian ones, and independent effects on the output.

    Args:
        formats: format of each quantised layer by name.
        sensitivities: those of the same layers, at least.
        factors: by what error feedback multiplies a layer's noise, by name; 1 for a layer that is not named.

    Returns:
        The ratio in dB. None if the sensitivities are only relative, if the noise of a format is not known, or if there
        is no noise.
    """
    if not sensitivities.absolute or any(fmt.id not in EXPECTED_SQNR_DB for fmt in formats.values()):
        return None
    factors = factors or {}
    noise = sum(
        sensitivities.values[name] * expected_noise(fmt) * factors.get(name, 1.0) for name, fmt in formats.items()
    )
    return -10 * math.log10(noise) if noise else None


def _slope(smaller: tuple[int, float, str], larger: tuple[int, float, str]) -> float:
    """Noise saved per byte between two points (bytes, noise, format id)."""
    return (smaller[1] - larger[1]) / (larger[0] - smaller[0])


def allocate(
    shapes: Mapping[str, Sequence[int]],
    budget: int,
    sensitivities: Mapping[str, float] | None = None,
    *,
    effort: str = "fast",
) -> dict[str, tuple[BlockFormat, float]]:
    """Choose a format for each layer.

    Args:
        shapes: shape of each layer's weight by name.
        budget: most packed bytes that all layers may take together.
        sensitivities: sensitivity of each layer by name, in any unit; by default all weights count alike.
        effort: "fast" or "best", see MENUS.

    Returns:
        Format of each layer and its sensitivity per weight, relative to the mean over all weights, to four digits.
        Bytes beyond the largest format stay unused.

    Raises:
        NFQError: even the smallest formats exceed the budget, or a sensitivity is NaN, infinite or negative.
    """
    counts = {name: prod(shape) for name, shape in shapes.items()}
    sensitivities = counts if sensitivities is None else sensitivities
    for name, value in sensitivities.items():
        if not 0 <= value < math.inf:
            raise NFQError(f"the sensitivity of {name!r} is {value}; it must be finite and not negative")
    if not shapes:
        return {}
    if budget < 0:
        raise NFQError(f"the tensors that are kept exceed the target size by {-budget:,} bytes; choose a larger target")
    hull_of = lru_cache(None)(partial(lower_convex_hull, formats=MENUS[effort]))
    hulls = {name: hull_of(count) for name, count in counts.items()}
    left = budget - sum(hull[0].packed_bytes(counts[name]) for name, hull in hulls.items())
    if left < 0:
        raise NFQError(
            f"the quantised weights need at least {budget - left:,} bytes, the target leaves {budget:,}; "
            "choose a larger target"
        )
    steps = []
    for name, hull in hulls.items():
        for index, (smaller, larger) in enumerate(pairwise(hull), 1):
            nbytes = larger.packed_bytes(counts[name]) - smaller.packed_bytes(counts[name])
            noise_saved = sensitivities[name] * (expected_noise(smaller) - expected_noise(larger)) / nbytes
            steps.append(_Step(noise_saved, name, index, nbytes))
    chosen = dict.fromkeys(shapes, 0)
    # Names break ties, so that the order of the tensors does not matter.
    for step in sorted(steps, key=lambda step: (-step.noise_saved, step.layer, step.index)):
        if step.nbytes <= left and chosen[step.layer] == step.index - 1:
            chosen[step.layer] = step.index
            left -= step.nbytes
    mean = sum(sensitivities[name] for name in shapes) / sum(counts.values()) or 1.0
    return {
        name: (hulls[name][index], float(f"{sensitivities[name] / counts[name] / mean:.4g}"))
        for name, index in chosen.items()
    }


class SizeSearch:
    """Searches the packed bytes that give a file of the target size.

    Each try writes the file, because its compressed size is only known afterwards.

    Args:
        target: most bytes of the file, of which it should take at least `NEAR`; None accepts any size.
        effort: "fast" or "best", see MENUS.
    """

    def __init__(self, target: int | None, effort: str) -> None:
        self.packed_bytes: int | None = None
        self.warnings: list[str] = []
        self._target = target
        self._effort = effort
        self._tries = 0
        self._best = 0
        """Bytes of the largest file so far that is within the target ..."""
        self._best_packed: int | None = None
        """... and its packed bytes."""

    def accepts(self, file_bytes: int, plans: Mapping[str, Plan]) -> bool:
        """Whether to keep a written file; if not, `packed_bytes` is the budget to try next.

        Args:
            file_bytes: size of the file.
            plans: the plan that it was written by.

        Raises:
            NFQError: no file within the target was found.
        """
        if self._target is None or NEAR * self._target <= file_bytes <= self._target:
            return True
        sized = {key: plan for key, plan in plans.items() if plan.sensitivity is not None}
        packed = sum(plan.format.packed_bytes(prod(plan.shape)) for plan in sized.values())
        fits = file_bytes <= self._target
        if fits and not sized:
            return True
        if fits and all(plan.format.id == LARGEST for plan in sized.values()):
            self.warnings.append(
                f"every layer has {LARGEST}, the largest format; {self._possible(file_bytes, packed, sized)}"
            )
            return True
        if fits and self._tries == MAX_TRIES:
            self.warnings.append(f"the file has {file_bytes:,} bytes; no size nearer to {self._target:,} was found")
            return True
        if fits and file_bytes > self._best:
            self._best, self._best_packed = file_bytes, packed
        self._tries += 1
        smallest, _ = packed_bounds({key: plan.shape for key, plan in sized.items()}, self._effort)
        if not fits and packed == smallest:
            self._tries = MAX_TRIES
        if self._tries < MAX_TRIES:
            self.packed_bytes = int(packed + (1 + NEAR) / 2 * self._target - file_bytes)
        elif self._best_packed is not None:
            self.packed_bytes = self._best_packed
        else:
            possible = self._possible(file_bytes, packed, sized)
            raise NFQError(f"no file of at most {self._target:,} bytes was found; {possible}; choose a larger target")
        return False

    def _possible(self, file_bytes: int, packed: int, plans: Mapping[str, Plan]) -> str:
        """The sizes that a model's file can have, estimated from one of its files.

        Args:
            file_bytes: size of that file.
            packed: packed bytes of its layers whose formats were chosen by size.
            plans: the plans of these layers.
        """
        bounds = packed_bounds({key: plan.shape for key, plan in plans.items()}, self._effort)
        smallest, largest = (size_in_words(file_bytes - packed + bound) for bound in bounds)
        return f"this model's file can have about {smallest} to {largest}"
