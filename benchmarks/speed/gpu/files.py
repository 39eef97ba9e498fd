"""Quantising a whole UNet on a GPU, and loading its file from the page cache into the GPU's memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

import nfq_core
from nfq_core.planning.settings import DEFAULTS

from ...shared import milliseconds, synchronize, timed
from .part import Part, random_state
from .step import dense_state

ROUNDS = 3


def files(part: Part) -> None:
    """Quantise SDXL's layers on the device, write both files (6.5 GB), load each."""
    weights, packed = dense_state(random_state(part)), {}
    quantise = {"quantise": lambda: packed.update(nfq_core.quantize_state_dict(weights))}
    part.results |= milliseconds(quantise, part.device, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        packed_file, dense_file = Path(folder) / "unet.nfq.safetensors", Path(folder) / "unet.safetensors"
        nfq_core.save(packed, packed_file, settings=DEFAULTS.as_dict())
        save_file({name: weight.cpu() for name, weight in weights.items()}, dense_file)
        weights.clear()
        packed.clear()

        def load_packed() -> None:
            nfq_core.load(packed_file, device=part.device)
            synchronize(part.device)

        def load_dense() -> None:
            load_file(dense_file, device=str(part.device))
            synchronize(part.device)

        works = {"NFQ": load_packed, "fp16, safetensors": load_dense}
        part.results["first_load_s"] = {name: timed(work) for name, work in works.items()}
        part.results["load"] = milliseconds(works, part.device, ROUNDS)
