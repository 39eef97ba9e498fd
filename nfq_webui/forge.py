"""Loading in Forge, which keeps our weights packed in its own layers for quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backend.loader
import torch
from backend.args import dynamic_args
from modules import processing, sd_models, shared

from .loading import KEEP_PACKED, NFQLoading, is_ours
from .packed import keep_packed
from .patching import argument, model_change, wrap

REMEDY = "choose the missing part under 'VAE / Text Encoder', or choose a whole checkpoint"


def install(loading: NFQLoading) -> None:
    """Extend the program's functions that read files and change the model, so that they accept our files."""

    def dense_reader(previous: Callable) -> Callable:
        def load_torch_file(ckpt: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            if not is_ours(ckpt):
                return previous(ckpt, *args, **kwargs)
            return loading.take_dense(ckpt, argument(1, "device", args, kwargs) or "cpu")

        return load_torch_file

    def model_reader(previous: Callable) -> Callable:
        dense = dense_reader(previous)

        def load_torch_file(ckpt: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            if is_ours(ckpt) and _may_stay_packed():
                return keep_packed(loading.take(ckpt))
            return dense(ckpt, *args, **kwargs)

        return load_torch_file

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

    wrap(backend.loader, "load_torch_file", model_reader)
    wrap(sd_models, "load_torch_file", dense_reader)
    for module in (sd_models, processing):
        wrap(module, "forge_model_reload", changer)


def _may_stay_packed() -> bool:
    """Whether our setting is on and 'Diffusion in Low Bits' does not ask for another format."""
    return bool(getattr(shared.opts, KEEP_PACKED, True)) and dynamic_args.get("forge_unet_storage_dtype") is None
