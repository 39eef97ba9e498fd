"""Quantising a whole UNet on a GPU, and bringing its file from the page cache into the GPU's memory."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import nfq_core
from nfq_core.checkpoints.state_dict import StateDict
from nfq_core.planning.policy import DEFAULTS

from ...shared import timed
from .part import Part, fan_in_std, layer_formats, measure, synchronize

QUANTISE_ROUNDS = 2
LOAD_ROUNDS = 3

WRITE_SECONDS = 90
"""Time that writing both files may take."""


def files(part: Part) -> None:
    """Quantise SDXL's layers on the device, write both files, load each."""
    weights = _random_weights(part)
    packed = part.attempt("quantise", lambda: _quantise(part, weights))
    if packed is None:
        part.skip("load", "nothing was quantised")
        return
    with tempfile.TemporaryDirectory() as folder:
        part.attempt("load", lambda: _load(part, weights, packed, Path(folder)))


def _random_weights(part: Part) -> dict[str, torch.Tensor]:
    generator = torch.Generator(part.device).manual_seed(0)
    made = {}
    for name, (shape, _) in layer_formats(part.architecture).items():
        std = fan_in_std(shape) if len(shape) > 1 else 1.0
        made[name] = torch.empty(shape, dtype=torch.float16, device=part.device).normal_(0, std, generator=generator)
    return made


def _quantise(part: Part, weights: dict[str, torch.Tensor]) -> StateDict:
    packed: StateDict = {}

    def work() -> None:
        packed.update(nfq_core.quantize_state_dict(weights))

    found = measure(part, {"quantise": work}, QUANTISE_ROUNDS)["quantise"]
    part.note(quantise=found)
    part.target("all layers quantised on the device", found["ms"]["median"] / 1e3, 5, "s")
    return packed


def _load(part: Part, weights: dict[str, torch.Tensor], packed: StateDict, folder: Path) -> None:
    needed = 1.4 * sum(weight.nbytes for weight in weights.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        part.skip("load", f"the files need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
        return
    if part.left() < WRITE_SECONDS and not part.small:
        part.skip("load", f"{part.left():.0f} s are left, making the files may take {WRITE_SECONDS}")
        return
    packed_file, dense_file = folder / "unet.nfq.safetensors", folder / "unet.safetensors"
    nfq_core.save(packed, packed_file, settings=DEFAULTS.as_dict())
    save_file({name: weight.cpu() for name, weight in weights.items()}, dense_file)
    weights.clear()
    packed.clear()
    gc.collect()
    part.note(file_bytes={"NFQ": packed_file.stat().st_size, "fp16": dense_file.stat().st_size})
    works = {
        "NFQ": lambda: nfq_core.load(packed_file, device=part.device),
        "fp16, safetensors": lambda: load_file(dense_file, device=str(part.device)),
    }
    part.note(first_load_s={name: timed(lambda work=work: _to_the_end(part, work)) for name, work in works.items()})
    found = measure(part, works, LOAD_ROUNDS)
    part.note(load=found)
    part.target("file in the page cache to the device", found["NFQ"]["ms"]["median"] / 1e3, 1.5, "s")


def _to_the_end(part: Part, work: Callable[[], object]) -> None:
    work()
    synchronize(part.device)
