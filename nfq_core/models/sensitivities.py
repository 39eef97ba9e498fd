"""How sensitive each layer of a model is to noise in its weight, without a measurement of the model itself.

A layer's *sensitivity* is the relative noise power of the model's output ÷ that of the layer's weight.

`sdxl_sensitivities.json` holds the sensitivity of every layer of SDXL's UNet in dB. It is derived by
`benchmarks.quality.sdxl_sensitivities` from measurements of SDXL-Turbo with 32 captions and one step, which the authors
of MixDQ (ECCV 2024, arXiv 2405.17873) publish with their code.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from .roles import OTHER_CONVOLUTION, OTHER_LINEAR, ROLES, role
from .unet import UNKNOWN, UNetInfo, diffusers_names
from .unet_keys import SDXL_BASE, UNetArchitecture, tensor_shapes

SDXL_SENSITIVITIES = Path(__file__).with_name("sdxl_sensitivities.json")

BY_LAYER = "SDXL's, layer by layer"
BY_BLOCK = "SDXL's, by role and block"
BY_ROLE = "SDXL's, by role"
BY_WEIGHT = "SDXL's, by role and number of weights"
MEASURED = "measured"

SPREAD = 0.75
"""Sensitivities by role and measured ones count for bits as if they were this many times as far apart, in dB.

Another model's roles differ less than SDXL's, and coarse rounding disturbs a layer more than a measurement with little
noise says. By role on the demo model at 4.1 and 4.9 bits, 0.75 gives 0 to 0.8 dB more output than 1, and 0.5 up to 2.8
dB less. Measured on the demo model, it gives 1.3 dB more output than 1 at 2.8 bits, and the same at 4.1.
"""


@dataclass(frozen=True)
class Sensitivities:
    """Sensitivity of each layer by weight name, and where they come from.

    Args:
        values: sensitivities by weight name.
        basis: one of BY_LAYER, BY_BLOCK, BY_ROLE, BY_WEIGHT and MEASURED.
    """

    values: Mapping[str, float]
    basis: str

    @property
    def priorities(self) -> Mapping[str, float]:
        """By how much a layer's noise counts when formats are chosen, see SPREAD."""
        if self.basis not in (BY_ROLE, BY_WEIGHT, MEASURED):
            return self.values
        return {key: value**SPREAD for key, value in self.values.items()}

    @property
    def absolute(self) -> bool:
        """Whether the values predict the model's output; if not, only their ratios have a meaning."""
        return self.basis in (BY_LAYER, MEASURED)


def layer_sensitivities(
    info: UNetInfo | None, shapes: Mapping[str, Sequence[int]], measured: Mapping[str, float] | None = None
) -> Sensitivities:
    """Find a sensitivity for each layer of a model.

    A layer gets the first of these values that exists:

    1. the measured one;
    2. that of the same layer of SDXL, if the model has SDXL's layers: fine-tunes, Turbo, Lightning, LCM, inpainting;
    3. the mean over SDXL's layers of the same role in the same block, if the model is a known relative of SDXL;
    4. in a UNet, the mean over SDXL's layers of the same role; in another model, whose layers have other sizes, the
       mean per weight over these layers, times its number of weights. A layer of several `Role.parts` gets their mean;
    5. the same over SDXL's Linear layers, or over its convolutions.

    If some layers are measured, the values of the others are scaled to them.

    Args:
        info: the UNet that was detected in the model; None for a plain state dict.
        shapes: shape of each layer's weight by name, in any layout.
        measured: measured sensitivities by weight name.
    """
    architecture = info.architecture if info else None
    names = diffusers_names(info, shapes) if info and architecture else {}
    if architecture and _has_layers_of_sdxl(architecture):
        basis = BY_LAYER
    elif architecture and architecture.name != UNKNOWN:
        basis = BY_BLOCK
    else:
        basis = BY_ROLE if info else BY_WEIGHT
    table, values = _sdxl_table(per_weight=basis == BY_WEIGHT), {}
    for key, shape in shapes.items():
        name = names.get(key, key).removesuffix(".weight")
        if basis == BY_BLOCK:
            name = _block_of_sdxl(name, architecture)
        has_place = name in table and basis in (BY_LAYER, BY_BLOCK)
        value = table[name if has_place else role(name, shape).name]
        values[key] = value * prod(shape) if basis == BY_WEIGHT else value
    known = {key: value for key, value in (measured or {}).items() if key in shapes}
    if not known:
        return Sensitivities(values, basis)
    unit = sum(known.values()) / sum(values[key] for key in known)
    return Sensitivities({key: known.get(key, value * unit) for key, value in values.items()}, MEASURED)


def known_by_layer(info: UNetInfo | None) -> bool:
    """Whether SDXL's sensitivities apply layer by layer to a model; `info` is the UNet that was detected in it."""
    return layer_sensitivities(info, {}).basis == BY_LAYER


def _has_layers_of_sdxl(architecture: UNetArchitecture) -> bool:
    """Whether all layers but the first, the last and the embeddings have SDXL's names and widths."""
    return all(
        getattr(architecture, part) == getattr(SDXL_BASE, part)
        for part in ("channels", "down_depths", "middle_depth", "up_depths")
    )


@lru_cache
def _sdxl_table(per_weight: bool = False) -> dict[str, float]:
    """SDXL's sensitivities by layer, and their means by role and block (see `_block`), by role and by kind of layer.

    With `per_weight`, the means are sums divided by the number of weights instead of the number of layers.
    """
    decibels = json.loads(SDXL_SENSITIVITIES.read_text("utf-8"))["decibels"]
    layers = {name: 10 ** (value / 10) for name, value in decibels.items()}
    shapes, groups = tensor_shapes(SDXL_BASE, "diffusers"), defaultdict(list)
    for name, value in layers.items():
        shape = shapes[f"{name}.weight"]
        part, kind = role(name, shape), OTHER_LINEAR if len(shape) <= 2 else OTHER_CONVOLUTION
        if part != kind:  # The first and last convolution have no role, and are like no other layer.
            for group in (_block(name), part.name, kind.name):
                groups[group].append((value, prod(shape) if per_weight else 1))
    means = {group: sum(v for v, _ in members) / sum(n for _, n in members) for group, members in groups.items()}
    composed = {each.name: sum(means[part] for part in each.parts) / len(each.parts) for each in ROLES if each.parts}
    return means | composed | layers


def _block(name: str) -> str:
    """A name without the number of its transformer layer: the same for the layers of one role in one block."""
    return re.sub(r"\.transformer_blocks\.\d+", "", name)


def _block_of_sdxl(name: str, architecture: UNetArchitecture) -> str:
    """`_block` of the layer of SDXL that has the place of another UNet's layer.

    Places are counted from the input on the way down and from the output on the way up, in levels of resolution and in
    blocks of a level. Levels below SDXL's coarsest have the place of that one.
    """
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", name)
    if not match:
        return _block(name)
    side, level, part, number = match[1], int(match[2]), match[3], int(match[4])
    coarsest = len(SDXL_BASE.channels) - 1
    if side == "up":
        if part in ("resnets", "attentions"):
            number += len(SDXL_BASE.up_depths[0]) - len(architecture.up_depths[level])
        level = coarsest - min(len(architecture.channels) - 1 - level, coarsest)
    else:
        level = min(level, coarsest)
    return _block(f"{side}_blocks.{level}.{part}.{number}.{name[match.end() :]}")
