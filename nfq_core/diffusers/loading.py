"""Load a UNet2DConditionModel from an `.nfq.safetensors` file; unknown architectures need a `config.json`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..checkpoints.state_dict import load_tensors
from ..errors import NFQError
from ..files.container import NFQFile
from ..files.safetensors_io import TORCH_DTYPES
from ..layers.packing import assign_state, packed_layers
from ..models.diffusers_config import diffusers_config
from ..models.text_encoders import find_text_encoders
from ..models.unet import UNKNOWN, detect
from ..packed.tensor import QUANTIZABLE_DTYPES, NFTensor
from ..parallel import Progress, no_progress
from ..planning.settings import of_unet
from .config import NFQConfig
from .model import check_fits, make_packed, names_in_model

CONFIG = "config.json"


def load_unet(
    nfq_path: str | os.PathLike,
    config_dir: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
) -> UNet2DConditionModel:
    """Load a quantised UNet for a diffusers pipeline; the original weights are not needed.

    Args:
        nfq_path: the `.nfq.safetensors` file, of a UNet or a whole checkpoint, in any key layout.
        config_dir: the folder whose `config.json` describes the UNet. Without it, the UNet must be one of
            `unet_keys.KNOWN_ARCHITECTURES`, LCM versions included; pictures then have 1024 × 1024 pixels by default.
        dtype: dtype of kept tensors and of the computation: fp16, bf16, fp32 or fp64; by default that of the weights
            before they were quantised.
        device: device of the model.
        memory: "packed", "resident" (a stock model, each weight dequantised once) or "auto", see `nfq_core.load`.
        progress: see `parallel.Progress`.

    Returns:
        The model, in evaluation mode. A packed model can be saved by `save_pretrained` and loaded by `from_pretrained`.

    Raises:
        NFQError: the file or config is missing, damaged or newer, or the two do not match.
        ValueError: `dtype` or `memory` is not allowed.
    """
    check_dtype(dtype)
    if config_dir is not None:
        config = read_unet_config(Path(config_dir))
    with NFQFile(nfq_path) as file:
        _refuse_text_encoder(file)
        if config_dir is None:
            config = _known_config(file)
        described_by = (
            f"the architecture of {file.path}" if config_dir is None else os.fspath(Path(config_dir) / CONFIG)
        )
        model = empty_model(config, described_by)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = names_in_model(file, shapes)
        check_fits(file, names, shapes, described_by)
        dtype = dtype or recorded_dtype(file, names)
        loaded = load_tensors(file, names, device=device, memory=memory, progress=progress)
        facts = replace(file.facts, settings=of_unet(file.facts.settings))
    state = {}
    for key, name in names.items():
        # Removing each tensor frees its memory once it is cast.
        tensor = loaded.pop(key)
        state[name] = tensor.to(dtype) if not isinstance(tensor, NFTensor) and tensor.is_floating_point() else tensor
    assign_state(model, state)
    model.register_to_config(_name_or_path=os.fspath(nfq_path if config_dir is None else config_dir))
    model.eval()
    if not packed_layers(model):
        return model
    quantizer = NFQConfig.from_dict(facts.settings).quantizer(pre_quantized=True)
    quantizer.facts = facts
    return make_packed(model, quantizer)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError if models cannot be loaded in this dtype; None: the recorded one."""
    if dtype is not None and dtype not in QUANTIZABLE_DTYPES:
        raise ValueError(f"dtype must be fp16, bf16, fp32 or fp64, got {dtype}")


def _known_config(file: NFQFile) -> dict[str, Any]:
    """The config of a file's UNet if its architecture is known; NFQError if it is not."""
    info = detect(file.shapes())
    if info is None or info.architecture is None or info.name == UNKNOWN:
        what = "its UNet's architecture is not known" if info else "it has no UNet of SDXL's kind"
        raise NFQError(f"{file.path}: {what}; give load_unet the folder of the UNet's config.json as config_dir")
    return diffusers_config(info.architecture)


def read_unet_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`, which must describe a UNet2DConditionModel."""
    config = read_config(folder, "unet")
    kind = config.get("_class_name")
    if kind != UNet2DConditionModel.__name__:
        raise NFQError(
            f"{folder / CONFIG} describes {kind or 'no model'}; name the folder of a {UNet2DConditionModel.__name__}'s "
            "config"
        )
    return config


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """Read a folder's `config.json`, without what it says about quantisation.

    Args:
        folder: the folder.
        part: name of the model's folder in a pipeline's, for messages.

    Raises:
        NFQError: it is missing or no JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        inner = folder / part / CONFIG
        model = "UNet" if part == "unet" else "text encoder"
        advice = f"name {inner.parent}" if inner.exists() else f"name the folder of the {model}'s config.json"
        raise NFQError(f"{path}: no such file; {advice}") from None
    except OSError as error:
        raise NFQError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise NFQError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        config = {}
    return {name: value for name, value in config.items() if name != "quantization_config"}


def _refuse_text_encoder(file: NFQFile) -> None:
    """Raise NFQError if a file holds only text encoders."""
    shapes = file.shapes()
    encoders = [] if detect(shapes) else find_text_encoders(shapes)
    if encoders:
        names = " and ".join(encoder.name for encoder in encoders)
        raise NFQError(f"{file.path} is a text encoder ({names}), not a UNet; load_text_encoder reads it")


def empty_model(config: dict[str, Any], described_by: str) -> nn.Module:
    """The model that a config describes, on torch's meta device; `described_by` names the config."""
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise NFQError(f"{described_by}: diffusers cannot build a UNet from it: {reason}") from None


def recorded_dtype(file: NFQFile, keys: Iterable[str]) -> torch.dtype:
    """The recorded dtype of most of these tensors of a file that are quantised; fp16 if none is."""
    most = Counter(file.quantized[key].dtype for key in keys if key in file.quantized).most_common(1)
    return TORCH_DTYPES[most[0][0]] if most else torch.float16
