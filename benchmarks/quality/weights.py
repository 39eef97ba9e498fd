"""Error of weights in every contestant's format: random sources, the demo model, any other model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10, prod
from pathlib import Path

import torch

from nfq_core.checkpoints.examine import sqnr_db
from nfq_core.demo.model import bundled_weights_path
from nfq_core.errors import NFQError
from nfq_core.files.safefile import SafetensorsFile
from nfq_core.parallel import ordered_map
from nfq_core.planning.allocation import allocate
from nfq_core.planning.policy import DEFAULTS, plan_tensors

from ..shared import channel_spread, gaussian, student_t
from .peers import OURS, Contestant, Stored

SHAPE = (2048, 2048)
CONVOLUTION = (1280, 320, 3, 3)
QUICK_SHAPE, QUICK_CONVOLUTION = (512, 512), (320, 64, 3, 3)

GAUSSIAN, STUDENT_T, SPREAD, DEMO = "gaussian", "student_t5", "convolution", "demo"

MIX_TARGETS = (2.3, 2.6, 3.0, 3.15, 3.4, 3.7, 3.85, 4.0, 4.15, 4.5, 5.0, 5.3, 5.5, 6.0, 6.5, 8.0)
"""Packed bits per weight of the mixes of our formats."""

HALVES = (2, 4, 8, 16, 16)
"""A random source is cut into so many parts of a whole, for a mix needs several layers."""

Layers = Mapping[str, "Layer"]


@dataclass(frozen=True)
class Layer:
    """One weight in one format."""

    weights: int
    disk_bytes: int
    packed_bytes: int
    sqnr_db: float

    @classmethod
    def of(cls, weight: torch.Tensor, stored: Stored) -> Layer:
        """A weight, and what was made of it."""
        return cls(weight.numel(), stored.disk_bytes, stored.packed_bytes, sqnr_db(weight, stored.weight))


def cut(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows of a weight in parts of a half, a quarter … of them, by name."""
    sizes = [len(weight) // part for part in HALVES]
    return {f"layer {number}": part for number, part in enumerate(weight.split(sizes))}


def random_weights(quick: bool = False) -> dict[str, torch.Tensor]:
    """A random weight of each source; small ones where it has to be quick."""
    shape, convolution = (QUICK_SHAPE, QUICK_CONVOLUTION) if quick else (SHAPE, CONVOLUTION)
    return {
        GAUSSIAN: gaussian(shape, 1),
        STUDENT_T: student_t(shape, 2),
        SPREAD: channel_spread(convolution, 3),
    }


def model_layers(path: Path, count: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights that are quantised at the defaults, one after the other; `count` of them, spread evenly."""
    with SafetensorsFile(path) as file:
        keys = [key for key, plan in plan_tensors(file.entries, DEFAULTS)[1].items() if plan.format]
        if not keys:
            raise NFQError(f"{path} has no weights to quantise")
        if count is not None and count < len(keys):
            keys = [keys[index * len(keys) // count] for index in range(count)]
        for key in keys:
            yield key, file.tensor(key)


def demo_weights() -> Iterator[torch.Tensor]:
    """The demo model's weights that are quantised at the defaults."""
    return (weight for _, weight in model_layers(bundled_weights_path()))


def measure_layers(
    layers: Iterable[tuple[str, torch.Tensor]], contestants: Sequence[Contestant]
) -> tuple[dict[str, dict[str, Layer]], dict[str, tuple[int, ...]]]:
    """Quantise layers one at a time in every contestant's format.

    Returns:
        What came of each layer by contestant and layer name, and the layers' shapes. A layer that cannot be quantised
        (NaN, Inf) is left out, which is printed.
    """

    def work(job: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor, dict[str, Layer] | str]:
        key, weight = job
        try:
            return key, weight, {one.name: Layer.of(weight, one.store(weight)) for one in contestants}
        except NFQError as error:
            return key, weight, str(error)

    found: dict[str, dict[str, Layer]] = {one.name: {} for one in contestants}
    shapes = {}
    for key, weight, measured in ordered_map(work, layers, size=lambda job: 16 * job[1].numel()):
        if isinstance(measured, str):
            print(f"  {key} is left out: {measured}", flush=True)
            continue
        shapes[key] = tuple(weight.shape)
        for name, layer in measured.items():
            found[name][key] = layer
        print(f"  {key} {tuple(weight.shape)}", flush=True)
    return found, shapes


def mix(
    found: Mapping[str, Layers], shapes: Mapping[str, tuple[int, ...]], bits: float, effort: str
) -> dict[str, Layer] | None:
    """What `allocate` chooses where the relative noise of all weights counts alike; None: too few bits.

    Args:
        found: what became of each layer, by format id and name.
        shapes: of the layers.
        bits: packed bits per weight, at most.
        effort: decides which formats are chosen from.
    """
    counts = {key: prod(shape) for key, shape in shapes.items()}
    try:
        chosen = allocate(shapes, int(bits * sum(counts.values()) / 8), counts, effort=effort)
    except NFQError:
        return None
    return {key: found[fmt.id][key] for key, (fmt, _) in chosen.items()}


def figures(layers: Iterable[Layer]) -> dict:
    """Bits per weight, and errors over all weights.

    `sqnr_db` is the mean over weights of their layers' ratios in dB, as `nfq compare` has it; `noise_db` that of the
    mean relative noise, which is lower where layers differ, and does not reward a mix for the layers that it spares.
    """
    layers = list(layers)
    total = sum(layer.weights for layer in layers)
    noise = sum(layer.weights * 10 ** (-layer.sqnr_db / 10) for layer in layers) / total
    return {
        "bits_per_weight": 8 * sum(layer.disk_bytes for layer in layers) / total,
        "packed_bits_per_weight": 8 * sum(layer.packed_bytes for layer in layers) / total,
        "sqnr_db": sum(layer.weights * layer.sqnr_db for layer in layers) / total,
        "noise_db": -10 * log10(noise),
    }


def row(source: str, name: str, family: str, *, calibrated: bool = False, **values: float) -> dict:
    """One line of the results."""
    return {
        "source": source,
        "name": name,
        "family": family,
        "ours": family == OURS,
        "calibrated": calibrated,
        **values,
    }


def weight_rows(
    source: str, layers: Iterable[tuple[str, torch.Tensor]], contestants: Sequence[Contestant]
) -> list[dict]:
    """The figures of every contestant and of the mixes of our formats on one source."""
    found, shapes = measure_layers(layers, contestants)
    if not shapes:
        raise NFQError(f"{source}: no layer could be quantised")
    rows = [row(source, one.name, one.family, **figures(found[one.name].values())) for one in contestants]
    return rows + mix_rows(source, contestants, found, shapes)


def mix_rows(
    source: str,
    contestants: Sequence[Contestant],
    found: Mapping[str, Layers],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[dict]:
    """The mixes of our formats on one source, those of each effort by themselves."""
    rows = []
    for effort in dict.fromkeys(one.effort for one in contestants if one.ours):
        of_effort = {one.format: one for one in contestants if one.effort == effort}
        layers = {id: found[one.name] for id, one in of_effort.items()}
        suffix = next(one.name.removeprefix(id) for id, one in of_effort.items())
        before = None
        for bits in MIX_TARGETS:
            chosen = mix(layers, shapes, bits, effort)
            if chosen and chosen != before:
                rows.append(row(source, f"mix {bits}{suffix}", OURS, **figures(chosen.values())))
            before = chosen
    return rows
