"""Error of weights in every contestant's format: random weights, the demo model's, any other model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nfq_core.decibels import pooled_sqnr_db, sqnr_db
from nfq_core.errors import NFQError
from nfq_core.files.safetensors_io import SafetensorsFile
from nfq_core.parallel import ordered_map
from nfq_core.planning.allocation import allocate
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULTS

from ..shared import channel_spread, gaussian, student_t
from .peers import OURS, Contestant, Stored

SHAPE, CONVOLUTION = (2048, 2048), (1280, 320, 3, 3)
GAUSSIAN, STUDENT_T, SPREAD, DEMO = "gaussian", "student_t5", "convolution", "demo"
# Packed bits per weight of the mixes of our formats.
MIX_TARGETS = (2.3, 2.6, 3.0, 3.13, 3.4, 3.7, 3.85, 4.0, 4.15, 4.5, 5.0, 5.3, 5.5, 6.0, 6.36, 8.0)
MIX = "mix"  # What the names of mixes begin with
FRACTIONS = (2, 4, 8, 16, 16)  # A mix needs several layers: a random weight is cut into a half, a quarter … of its rows

Layers = Mapping[str, "Layer"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """Size and error of one weight in one format."""

    weights: int
    disk_bytes: int
    packed_bytes: int
    sqnr_db: float

    @classmethod
    def of(cls, weight: torch.Tensor, stored: Stored) -> Layer:
        """Compare a weight with its stored form."""
        return cls(weight.numel(), stored.disk_bytes, stored.packed_bytes, sqnr_db(weight, stored.weight))


def cut(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a weight, by name; see FRACTIONS."""
    parts = weight.split([len(weight) // fraction for fraction in FRACTIONS])
    return {f"layer {number}": part for number, part in enumerate(parts)}


def random_weights(shape: tuple[int, ...] = SHAPE, convolution: tuple[int, ...] = CONVOLUTION) -> dict:
    """A random weight of each kind, by name."""
    return {GAUSSIAN: gaussian(shape, 1), STUDENT_T: student_t(shape, 2), SPREAD: channel_spread(convolution, 3)}


def model_layers(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the weights of a safetensors file that the defaults quantise, one at a time."""
    with SafetensorsFile(path) as file:
        keys = [key for key, plan in plan_tensors(file.entries, DEFAULTS)[1].items() if plan.format]
        if not keys:
            raise NFQError(f"{path} has no weights to quantise")
        for key in keys:
            yield key, file.tensor(key)


def figures(layers: Iterable[Layer]) -> dict[str, float | None]:
    """Bits per weight, and the error of all layers together; `sqnr_db` is None if all are exact."""
    layers = list(layers)
    total = sum(layer.weights for layer in layers)
    return {
        "bits_per_weight": 8 * sum(layer.disk_bytes for layer in layers) / total,
        "packed_bits_per_weight": 8 * sum(layer.packed_bytes for layer in layers) / total,
        "sqnr_db": pooled_sqnr_db((layer.weights, layer.sqnr_db) for layer in layers),
    }


def row(source: str, name: str, family: str, *, calibrated: bool = False, **values: float) -> dict:
    """One row of the results."""
    ours = family == OURS
    return {"source": source, "name": name, "family": family, "ours": ours, "calibrated": calibrated, **values}


def measure_layers(
    layers: Iterable[tuple[str, torch.Tensor]], contestants: Sequence[Contestant]
) -> tuple[dict[str, dict[str, Layer]], dict[str, tuple[int, ...]]]:
    """Quantise layers one at a time in every contestant's format; layers with NaN or Inf are skipped with a message.

    Returns:
        The measured layers by contestant and layer name; the layers' shapes.
    """

    def work(job: tuple[str, torch.Tensor]) -> tuple[str, tuple[int, ...], list[Layer]] | None:
        key, weight = job
        try:
            measured = [Layer.of(weight, one.store(weight)) for one in contestants]
        except NFQError as error:
            print(f"  {key} is left out: {error}", flush=True)
            return None
        print(f"  {key} {tuple(weight.shape)}", flush=True)
        return key, tuple(weight.shape), measured

    done = [one for one in ordered_map(work, layers, size=lambda job: 16 * job[1].numel()) if one]
    found = {one.name: {key: row[number] for key, _, row in done} for number, one in enumerate(contestants)}
    return found, {key: shape for key, shape, _ in done}


def mix(found: Mapping[str, Layers], shapes: Shapes, bits: float, effort: str) -> dict[str, Layer] | None:
    """The formats that `allocate` chooses where every weight counts the same; None if there are too few bits.

    `found` has the measured layers by format id and layer name; `bits` is the most packed bits per weight.
    """
    counts = {key: prod(shape) for key, shape in shapes.items()}
    try:
        chosen = allocate(shapes, int(bits * sum(counts.values()) / 8), counts, effort=effort)
    except NFQError:
        return None
    return {key: found[fmt.id][key] for key, (fmt, _) in chosen.items()}


def mix_rows(source: str, contestants: Sequence[Contestant], found: Mapping[str, Layers], shapes: Shapes) -> list[dict]:
    """The mixes of our formats on one source, each of formats of one effort."""
    rows = []
    for effort in dict.fromkeys(one.effort for one in contestants if one.ours):
        ours = [one for one in contestants if one.ours and one.effort == effort]
        layers, before = {one.format: found[one.name] for one in ours}, None
        for bits in MIX_TARGETS:
            chosen = mix(layers, shapes, bits, effort)
            if chosen and chosen != before:
                name = f"{MIX} {bits}{ours[0].name.removeprefix(ours[0].format)}"
                rows.append(row(source, name, OURS, **figures(chosen.values())))
            before = chosen
    return rows


def weight_rows(
    source: str, layers: Iterable[tuple[str, torch.Tensor]], contestants: Sequence[Contestant]
) -> list[dict]:
    """The figures of every contestant, and of the mixes of our formats, on one source."""
    print(source, flush=True)
    found, shapes = measure_layers(layers, contestants)
    if not shapes:
        raise NFQError(f"{source}: no layer could be quantised")
    rows = [row(source, one.name, one.family, **figures(found[one.name].values())) for one in contestants]
    return rows + mix_rows(source, contestants, found, shapes)
