"""Load a diffusers model from an `.nfq.safetensors` file; all but known UNets need a `config.json`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from torch import nn

from ..checkpoints.state_dict import load_tensors
from ..errors import NFQError, missing_package, reason_of
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
from .saving import without_allocation

CONFIG = "config.json"

PARTS = ("unet", "transformer")
"""Folders of the diffusion model in a pipeline's folder."""


def load_unet(
    nfq_path: str | os.PathLike,
    config_dir: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
) -> UNet2DConditionModel:
    """`load_model` for a UNet2DConditionModel.

    Args:
        nfq_path: the `.nfq.safetensors` file; for SDXL's family of a UNet or a whole checkpoint, in any key layout.
        config_dir: see `load_model`, also for the other arguments and the result. Without it, the UNet must be one of
            `unet_keys.KNOWN_ARCHITECTURES`, LCM versions included; pictures then have 1024 × 1024 pixels by default.

    Raises:
        NFQError: as `load_model`, or the config describes another class.
        ValueError: `dtype` or `memory` is not allowed.
    """
    config = _known_config(nfq_path) if config_dir is None else read_unet_config(Path(config_dir))
    return _load(nfq_path, config_dir, config, dtype, device, memory, progress)


def load_model(
    nfq_path: str | os.PathLike,
    config_dir: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
) -> ModelMixin:
    """Load a quantised UNet or transformer for a diffusers pipeline; the original weights are not needed.

    Args:
        nfq_path: the `.nfq.safetensors` file, with diffusers' names.
        config_dir: the folder whose `config.json` describes the model.
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
    config = read_config(Path(config_dir), PARTS, "model")
    if _class_of(config.get("_class_name")) is None:
        kind = config.get("_class_name") or "no model"
        raise NFQError(f"{Path(config_dir) / CONFIG} describes {kind}; name the folder of a diffusers model's config")
    return _load(nfq_path, config_dir, config, dtype, device, memory, progress)


def _load(
    nfq_path: str | os.PathLike,
    config_dir: str | os.PathLike | None,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device | str,
    memory: str,
    progress: Progress,
) -> ModelMixin:
    """`load_model` for a config that was read from `config_dir`, or is known for this file if that is None."""
    check_dtype(dtype)
    described_by = f"the architecture of {nfq_path}" if config_dir is None else os.fspath(Path(config_dir) / CONFIG)
    with NFQFile(nfq_path) as file:
        _refuse_text_encoder(file)
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
    for module in model.modules():
        # Tables of positions are not in the file.
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(device))
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


def _known_config(nfq_path: str | os.PathLike) -> dict[str, Any]:
    """The config of a file's UNet if its architecture is known; NFQError if it is not."""
    with NFQFile(nfq_path) as file:
        _refuse_text_encoder(file)
        info = detect(file.shapes())
    if info is None or info.architecture is None or info.name == UNKNOWN:
        what = "its UNet's architecture is not known" if info else "it has no UNet of SDXL's kind"
        raise NFQError(f"{nfq_path}: {what}; give load_unet the folder of the UNet's config.json as config_dir")
    return diffusers_config(info.architecture)


def read_unet_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`, which must describe a UNet2DConditionModel."""
    config = read_config(folder, PARTS, "UNet")
    kind = config.get("_class_name")
    if kind != UNet2DConditionModel.__name__:
        raise NFQError(
            f"{folder / CONFIG} describes {kind or 'no model'}; name the folder of a {UNet2DConditionModel.__name__}'s "
            "config" + (", or use load_model" if _class_of(kind) else "")
        )
    return config


def read_config(folder: Path, parts: Sequence[str], what: str) -> dict[str, Any]:
    """Read a folder's `config.json`, without what it says about quantisation.

    Args:
        folder: the folder.
        parts: possible names of the model's folder inside a pipeline's, for messages.
        what: the model in words, for messages.

    Raises:
        NFQError: it is missing or no JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        inner = next((folder / part for part in parts if (folder / part / CONFIG).exists()), None)
        advice = f"name {inner}" if inner else f"name the folder of the {what}'s config.json"
        raise NFQError(f"{path}: no such file; {advice}") from None
    except OSError as error:
        raise NFQError(f"{path} cannot be read: {reason_of(error)}") from None
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


def _class_of(name: object) -> type[ModelMixin] | None:
    """diffusers' model class of this name; None if there is none."""
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None


def empty_model(config: dict[str, Any], described_by: str) -> nn.Module:
    """The model that a config describes, with parameters on torch's meta device; `described_by` names the config.

    Transformers compute tables of positions while they are built, which only accelerate keeps off that device.
    """
    kind = config["_class_name"]
    if kind != UNet2DConditionModel.__name__ and not is_accelerate_available():
        raise missing_package(f"loading a {kind} needs accelerate", "accelerate")
    try:
        with without_allocation():
            return _class_of(kind).from_config(config)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise NFQError(f"{described_by}: diffusers cannot build a model from it: {reason}") from None


def recorded_dtype(file: NFQFile, keys: Iterable[str]) -> torch.dtype:
    """The recorded dtype of most of these tensors of a file that are quantised; fp16 if none is."""
    most = Counter(file.quantized[key].dtype for key in keys if key in file.quantized).most_common(1)
    return TORCH_DTYPES[most[0][0]] if most else torch.float16
