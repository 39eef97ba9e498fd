"""Loading in Automatic1111's web UI, which dequantises our checkpoints when it reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modules import devices, sd_models, shared

from .loading import NFQLoading, is_ours
from .patching import StandIn, argument, model_change, reader_fault, stand_in

REMEDY = "this program needs a whole checkpoint: quantise one with its text encoder and VAE"


def install(loading: NFQLoading) -> None:
    """Extend the program's functions that read checkpoints and change the model, so that they accept our files."""

    def reader(previous: Callable) -> Callable:
        def read_state_dict(checkpoint_file: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            if not is_ours(checkpoint_file):
                return previous(checkpoint_file, *args, **kwargs)
            location = argument(1, "map_location", args, kwargs)
            device = location or shared.weight_load_location or devices.get_optimal_device_name()
            return loading.take_dense(checkpoint_file, device, REMEDY)

        return read_state_dict

    def changer(previous: Callable) -> Callable:
        def reload_model_weights(*args: Any, **kwargs: Any) -> Any:
            info = argument(1, "info", args, kwargs) or sd_models.select_checkpoint()
            forced = argument(2, "forced_reload", args, kwargs)
            with model_change(loading):
                if is_ours(info.filename) and (forced or not _is_loaded(info)):
                    loading.read_ahead(info.filename, REMEDY)
                return previous(*args, **kwargs)

        return reload_model_weights

    stand_in(
        [
            StandIn(
                sd_models,
                "read_state_dict",
                reader,
                ("checkpoint_file", "print_global_state", "map_location"),
                lambda read: reader_fault(read, map_location="cpu"),
            ),
            StandIn(sd_models, "reload_model_weights", changer, ("sd_model", "info", "forced_reload"), _list_fault),
        ],
        "NFQ checkpoints cannot be loaded here",
    )


def _list_fault(_: Callable) -> str:
    """What is missing of the lists in which the program keeps its models; empty if nothing is."""
    data = getattr(sd_models, "model_data", None)
    known = hasattr(data, "loaded_sd_models") and hasattr(sd_models, "checkpoints_loaded")
    return "" if known else "keeps its models elsewhere"


def _is_loaded(info: Any) -> bool:
    """Whether the program has a checkpoint's model or its tensors in memory."""
    loaded = [model.sd_checkpoint_info.filename for model in sd_models.model_data.loaded_sd_models]
    return info.filename in loaded or info in sd_models.checkpoints_loaded
