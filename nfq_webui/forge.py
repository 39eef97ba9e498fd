"""Loading in Forge and Forge Neo, which keep our weights packed in their own layers for quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import backend.loader
import backend.state_dict
import backend.utils
import torch
from backend.args import dynamic_args
from modules import extras, processing, sd_models, shared

from .layers import packable_dimensions
from .loading import KEEP_PACKED, NFQLoading, is_ours, metadata_of
from .packed import PackedParameter, dense_only, holds_ours, keep_packed, parameters_for
from .patching import StandIn, argument, model_change, reader_fault, report_limit, stand_in

REMEDY = "choose the missing part under 'VAE / Text Encoder', or choose a whole checkpoint"

READER = ("ckpt", "safe_load", "device", "return_metadata")
"""Parameters of `load_torch_file`; Forge's lacks the last one."""


def install(loading: NFQLoading) -> None:
    """Extend the program's functions that read files and change the model, so that they accept our files."""
    # Only Forge's merger looks its reader up there.
    is_neo = not hasattr(sd_models, "load_torch_file")
    packable = _Packable()

    def changer(previous: Callable) -> Callable:
        def forge_model_reload(*args: Any, **kwargs: Any) -> Any:
            wanted = sd_models.model_data.forge_loading_parameters
            info = wanted.get("checkpoint_info")
            changes = sd_models.model_data.forge_hash != str(wanted)
            with model_change(loading):
                if changes and info is not None and is_ours(info.filename):
                    loading.read_ahead(info.filename, "" if wanted.get("additional_modules") else REMEDY)
                return previous(*args, **kwargs)

        return forge_model_reload

    def reader(packs: Callable[[], Collection[int]]) -> Callable[[Callable], Callable]:
        return lambda previous: _reader(loading, previous, packs)

    merger = extras if is_neo else sd_models
    replaced = stand_in(
        [
            StandIn(backend.loader, "load_torch_file", reader(packable.now), READER, reader_fault),
            StandIn(merger, "load_torch_file", reader(lambda: ()), READER, reader_fault),
            *(
                StandIn(module, "forge_model_reload", changer, fault=_selection_fault)
                for module in (sd_models, processing)
            ),
        ],
        "NFQ checkpoints cannot be loaded here",
    )
    if replaced and is_neo:
        # The refiner may put a file's weights into the layers of the model that is loaded.
        stand_in(
            [
                StandIn(backend.utils, "load_torch_file", reader(packable.in_loaded_model), READER, reader_fault),
                StandIn(
                    backend.state_dict,
                    "load_state_dict",
                    _layer_filler,
                    ("model", "sd", "ignore_errors", "log_name", "ignore_start"),
                ),
            ],
            "The refiner cannot use an NFQ checkpoint with its fast setting",
        )
    if replaced:
        packable.find()


class _Packable:
    """Which weights stay packed in the program's layers, by their number of dimensions."""

    def __init__(self) -> None:
        self._dimensions: Collection[int] = ()

    def find(self) -> None:
        """Try the program's layers; without any, weights are dequantised when a file is read."""
        self._dimensions, obstacle = packable_dimensions()
        if obstacle:
            report_limit("Weights cannot stay packed in memory here", obstacle)

    def now(self) -> Collection[int]:
        """For a model that is loaded now: none if our setting or 'Diffusion in Low Bits' asks for another format."""
        wanted = getattr(shared.opts, KEEP_PACKED, True) and dynamic_args.get("forge_unet_storage_dtype") is None
        return self._dimensions if wanted else ()

    def in_loaded_model(self) -> Collection[int]:
        """For weights that go into the layers of the model that is loaded: as its own are."""
        unet = getattr(getattr(sd_models.model_data.sd_model, "forge_objects", None), "unet", None)
        model = getattr(unet, "model", None)
        return self._dimensions if model is not None and holds_ours(model) else ()


def _reader(loading: NFQLoading, previous: Callable, packs: Callable[[], Collection[int]]) -> Callable:
    """A reader of files that accepts ours: weights with as many dimensions as `packs()` names stay packed."""

    def load_torch_file(ckpt: str, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(ckpt):
            return previous(ckpt, *args, **kwargs)
        device, dimensions = argument(1, "device", args, kwargs) or "cpu", packs()
        tensors = (
            keep_packed(loading.take(ckpt), dimensions, device) if dimensions else loading.take_dense(ckpt, device)
        )
        return (tensors, metadata_of(ckpt)) if argument(2, "return_metadata", args, kwargs) else tensors

    return load_torch_file


def _layer_filler(previous: Callable) -> Callable:
    """The program's function that fills a model's layers, for layers that are packed and files that are not."""

    def load_state_dict(model: torch.nn.Module, sd: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if holds_ours(model):
            sd = parameters_for(sd)
        elif any(isinstance(value, PackedParameter) for value in sd.values()):
            sd = dense_only(sd)
        return previous(model, sd, *args, **kwargs)

    return load_state_dict


def _selection_fault(_: Callable) -> str:
    """What is missing of the program's record of the model that the user chose; empty if nothing is."""
    data = getattr(sd_models, "model_data", None)
    known = hasattr(data, "forge_hash") and isinstance(getattr(data, "forge_loading_parameters", None), dict)
    return "" if known else "keeps the chosen model elsewhere"
