"""Which format each layer gets, where a size is asked for instead of formats.

Rounding a layer adds noise to its output; how much of it arrives in the model's output is the layer's *sensitivity*:
relative noise power of the output ÷ that of the weight. The formats are chosen so that the sum of all layers' noise is
least at the given size: every layer moves to the next larger format in the order of what a byte gains, until nothing
more fits. Formats that would break the rule that every further byte gains less than the one before are passed over, so
that this is a Lagrangian (Shoham and Gersho 1988); which ones these are depends on the size of the layer, for levels
take as much of a small one as of a large one.
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
from ..models.roles import expected_sensitivity
from ..packed.formats import FORMATS, BlockFormat
from ..sizes import size_in_words

EXPECTED_SQNR_DB = {
    "t2w8_b64": 11.6,
    "t2w10_b64": 11.7,
    "t3w8_b64": 17.57,
    "t3w10_b64": 17.7,
    "t4w8_b64": 23.43,
    "t4w10_b64": 23.62,
    "t5w9_b64": 29.42,
    "t5w10_b64": 29.54,
    "nf256_b64": 45.5,
}
"""Formats to choose from, with the signal-to-quantisation-noise ratio of Gaussian weights in them.

From `benchmarks.quality.trellis`, at `best`; `fast` loses 0.1 to 0.3 dB in each. Heavier tails lose about as much in
one as in another, which does not change the choice.
"""

LARGEST = list(EXPECTED_SQNR_DB)[-1]

FAST_WINDOW = 9
"""The widest window of a trellis format that `fast` chooses: each further bit doubles the time that searching takes."""

PRESETS = {"best": 4.9, "balanced": 4.1, "small": 3.4, "tiny": 2.8}
"""Packed bits per weight."""

NEAR = 0.99
"""How much of the size asked for a file has at least."""

MAX_TRIES = 4
"""Files written in search of a size, the best of which is written again where none is near enough."""


@dataclass(frozen=True)
class _Step:
    """Moving a layer to the next larger of its formats: what it gains for each byte, and how many bytes it takes."""

    gain: float
    layer: str
    number: int
    nbytes: int


def menu(effort: str) -> list[BlockFormat]:
    """The formats that are chosen from; see FAST_WINDOW."""
    formats = [FORMATS[id] for id in EXPECTED_SQNR_DB]
    return [fmt for fmt in formats if effort == "best" or fmt.window <= FAST_WINDOW]


def worthwhile(weights: int, formats: Sequence[BlockFormat]) -> list[BlockFormat]:
    """Those formats for so many weights of which each gains less for a byte than the one before, the smallest first."""
    points = sorted((fmt.packed_bytes(weights), expected_noise(fmt), fmt.id) for fmt in formats)
    hull: list[tuple[int, float, str]] = []
    for size, noise, id in points:
        if hull and noise >= hull[-1][1]:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], (size, noise, id)):
            hull.pop()
        hull.append((size, noise, id))
    return [FORMATS[id] for _, _, id in hull]


def packed_bounds(shapes: Mapping[str, Sequence[int]], effort: str = "fast") -> tuple[int, int]:
    """The fewest and the most packed bytes that layers of these shapes can take together, see `menu`."""
    counts = [prod(shape) for shape in shapes.values()]
    return tuple(sum(limit(fmt.packed_bytes(n) for fmt in menu(effort)) for n in counts) for limit in (min, max))


def expected_noise(fmt: BlockFormat) -> float:
    """Relative noise power of weights in a format, one of EXPECTED_SQNR_DB."""
    return 10 ** (-EXPECTED_SQNR_DB[fmt.id] / 10)


def _gain(smaller: tuple[int, float, str], larger: tuple[int, float, str]) -> float:
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
        budget: packed bytes of all of them together, at most.
        sensitivities: measured ones by name; a layer that is missing gets a typical one. By default
            `expected_sensitivity`.
        effort: "fast" or "best", see `menu`.

    Returns:
        The format of each layer, and its sensitivity per weight in terms of the mean over all weights, to four digits.
        More than the largest format takes is not used.

    Raises:
        NFQError: not even the smallest format fits, or a sensitivity is NaN, infinite or negative.
    """
    for name, value in (sensitivities or {}).items():
        if not 0 <= value < math.inf:
            raise NFQError(f"the sensitivity of {name!r} is {value}; it must be a number from 0 up")
    if not shapes:
        return {}
    if budget < 0:
        raise NFQError(f"what is not quantised takes {-budget:,} bytes more than the size asked for; ask for more")
    counts = {name: prod(shape) for name, shape in shapes.items()}
    worth = lru_cache(None)(partial(worthwhile, formats=tuple(menu(effort))))
    options = {name: worth(count) for name, count in counts.items()}
    weight_of = _completed(shapes, sensitivities)
    left = budget - sum(fmts[0].packed_bytes(counts[name]) for name, fmts in options.items())
    if left < 0:
        raise NFQError(
            f"the quantised weights need at least {budget - left:,} bytes, {budget:,} are left for them; ask for more"
        )
    steps = []
    for name, fmts in options.items():
        for number, (smaller, larger) in enumerate(pairwise(fmts), 1):
            nbytes = larger.packed_bytes(counts[name]) - smaller.packed_bytes(counts[name])
            gain = weight_of[name] * (expected_noise(smaller) - expected_noise(larger)) / nbytes
            steps.append(_Step(gain, name, number, nbytes))
    chosen = dict.fromkeys(shapes, 0)
    # Names decide between equals, so that the order of the tensors does not.
    for step in sorted(steps, key=lambda step: (-step.gain, step.layer, step.number)):
        if step.nbytes <= left and chosen[step.layer] == step.number - 1:
            chosen[step.layer] = step.number
            left -= step.nbytes
    mean = sum(weight_of.values()) / sum(counts.values()) or 1.0
    return {
        name: (options[name][number], float(f"{weight_of[name] / counts[name] / mean:.4g}"))
        for name, number in chosen.items()
    }


class SizeSearch:
    """Finds how many packed bytes make a file of the size asked for, by writing it: it has to be known to be kept.

    Args:
        target: bytes of the file, at most, and at least `NEAR` of that; None: any size will do.
    """

    def __init__(self, target: int | None) -> None:
        self.packed_bytes: int | None = None
        self.warnings: list[str] = []
        self._target = target
        self._tries = 0
        self._best = 0
        """The largest file found so far that is small enough ..."""
        self._best_packed: int | None = None
        """... and its packed bytes."""

    def accepts(self, file_bytes: int, plans: Mapping[str, Plan]) -> bool:
        """Whether a file is as asked for; if not, `packed_bytes` is what to try next.

        Raises:
            NFQError: there is no such file.
        """
        if self._target is None or NEAR * self._target <= file_bytes <= self._target:
            return True
        quantized = [plan for plan in plans.values() if plan.format]
        packed = sum(plan.format.packed_bytes(prod(plan.shape)) for plan in quantized)
        fits = file_bytes <= self._target
        if fits and not quantized:
            return True
        if fits and all(plan.format.id == LARGEST for plan in quantized):
            self.warnings.append(
                f"every layer has {LARGEST}, the most there is; {self._possible(file_bytes, packed, plans)}"
            )
            return True
        if fits and self._tries == MAX_TRIES:
            self.warnings.append(f"the file has {file_bytes:,} bytes, nothing nearer to {self._target:,} was found")
            return True
        if fits and file_bytes > self._best:
            self._best, self._best_packed = file_bytes, packed
        self._tries += 1
        smallest, _ = packed_bounds({key: plan.shape for key, plan in plans.items() if plan.format})
        if not fits and packed == smallest:
            self._tries = MAX_TRIES
        if self._tries < MAX_TRIES:
            self.packed_bytes = int(packed + (1 + NEAR) / 2 * self._target - file_bytes)
        elif self._best_packed is not None:
            self.packed_bytes = self._best_packed
        else:
            possible = self._possible(file_bytes, packed, plans)
            raise NFQError(f"no file of at most {self._target:,} bytes was found; {possible}, ask for more")
        return False

    @staticmethod
    def _possible(file_bytes: int, packed: int, plans: Mapping[str, Plan]) -> str:
        """The sizes that a model's file can have, told by one of its files and that one's packed bytes."""
        bounds = packed_bounds({key: plan.shape for key, plan in plans.items() if plan.format})
        smallest, largest = (size_in_words(file_bytes - packed + bound) for bound in bounds)
        return f"this model's file can have about {smallest} to {largest}"


def _completed(shapes: Mapping[str, Sequence[int]], sensitivities: Mapping[str, float] | None) -> dict[str, float]:
    """A sensitivity for every layer: what was not measured is as sensitive, for its role, as the measured ones are."""
    expected = {name: expected_sensitivity(name, shape) for name, shape in shapes.items()}
    known = {name: value for name, value in (sensitivities or {}).items() if name in shapes}
    if not known:
        return expected
    unit = sum(known.values()) / sum(expected[name] for name in known)
    return {name: known.get(name, expected[name] * unit) for name in shapes}
