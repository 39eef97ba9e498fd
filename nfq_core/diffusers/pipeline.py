"""Load text encoders, and whole SDXL pipelines, from `.nfq.safetensors` files and a diffusers folder of settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.state_dict import load_tensors
from ..checkpoints.whole_checkpoint import COMPANIONS, MARKERS, missing_companions
from ..errors import NFQError, missing_package, reason_of
from ..files.container import NFQFile
from ..files.pipeline_folder import INDEX
from ..files.untrusted import LOADING_ERRORS, loading_error_message
from ..layers.packing import assign_state, packed_layers
from ..packed.tensor import NFTensor
from ..parallel import Progress, no_progress
from .config import NFQConfig
from .dense_pipeline import predict_v, quiet
from .loading import CONFIG, check_dtype, load_unet, read_config, recorded_dtype

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Folders of SDXL's text encoders in a pipeline's folder."""


def load_text_encoder(
    nfq_path: str | os.PathLike,
    config_dir: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
) -> PreTrainedModel:
    """Load a quantised CLIP or T5 text encoder for a pipeline; the original weights are not needed.

    Args:
        nfq_path: the `.nfq.safetensors` file, of text encoders or a whole checkpoint.
        config_dir: the folder whose `config.json` describes a CLIPTextModel, CLIPTextModelWithProjection or
            T5EncoderModel. Of several text encoders in the file, the one that it describes is loaded.
        dtype: see `load_unet`.
        device: device of the model.
        memory: see `load_unet`.
        progress: see `parallel.Progress`.

    Returns:
        The model, in evaluation mode. A packed model can be saved by `save_pretrained` and loaded by `from_pretrained`.

    Raises:
        NFQError: the file or config is missing, damaged or newer, or the two do not match.
        ValueError: `dtype` or `memory` is not allowed.
        ImportError: transformers is missing.
    """
    check_dtype(dtype)
    try:
        from .text_model import dtype_of, make_packed_text_encoder, shapes_of
        from .text_names import find_text_encoder
    except ImportError as error:
        raise missing_package("text encoders need transformers", "transformers") from error
    folder = Path(config_dir)
    model = _empty_text_encoder(read_config(folder, _TEXT_ENCODERS[:1], "text encoder"), folder / CONFIG)
    with NFQFile(nfq_path) as file:
        _, renamed = find_text_encoder(file, shapes_of(model), os.fspath(folder / CONFIG))
        keys = [each.key for each in renamed]
        dtype = dtype or recorded_dtype(file, keys)
        loaded = load_tensors(file, keys, device=device, memory=memory, progress=progress)
        facts = file.facts
    state = {}
    for each in renamed:
        # Removing each tensor frees its memory once it is cast.
        for name, tensor in each.tensors(loaded.pop(each.key)).items():
            is_float = not isinstance(tensor, NFTensor) and tensor.is_floating_point()
            state[name] = tensor.to(dtype_of(model, name, dtype)) if is_float else tensor
    assign_state(model, state)
    for name, layer in packed_layers(model).items():
        layer.compute_dtype = dtype_of(model, name, dtype)
    _fill_positions(model, device)
    model.tie_weights()
    model.config.name_or_path = os.fspath(config_dir)
    model.eval()
    if not packed_layers(model):
        return model
    quantizer = NFQConfig.from_dict(facts.settings).text_quantizer(pre_quantized=True)
    quantizer.facts = facts
    return make_packed_text_encoder(model, quantizer)


def _empty_text_encoder(config: Mapping[str, Any], path: Path) -> PreTrainedModel:
    """The model that a config describes, on torch's meta device."""
    from .text_model import CLASSES

    kind = next(iter(config.get("architectures") or ()), None)
    if kind not in CLASSES:
        raise NFQError(f"{path} describes {kind or 'no text encoder'}; name the folder of a {' or '.join(CLASSES)}")
    stock = CLASSES[kind]
    try:
        with torch.device("meta"):
            return stock(stock.config_class.from_dict(dict(config)))
    except (*LOADING_ERRORS, IndexError, _config_error()) as error:
        reason = " ".join(str(error).split())
        raise NFQError(f"{path}: transformers cannot build a text encoder from it: {reason}") from None


def _config_error() -> type[Exception]:
    """The error of newer versions of transformers for a config's values."""
    from huggingface_hub import errors

    return getattr(errors, "StrictDataclassError", ValueError)


def _fill_positions(model: PreTrainedModel, device: torch.device | str) -> None:
    """Fill the indices of positions, which files do not have and the meta device left empty."""
    for module in list(model.modules()):
        positions = module._buffers.get("position_ids")
        if positions is not None and positions.is_meta:
            values = torch.arange(positions.shape[-1], device=device).expand(positions.shape).contiguous()
            module.register_buffer("position_ids", values, persistent=False)


def load_pipeline(
    nfq_path: str | os.PathLike,
    config_dir: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
) -> DiffusionPipeline:
    """Load a pipeline of the SDXL family from one whole quantised checkpoint; the original weights are not needed.

    UNet and text encoders stay packed, the VAE is as in the file. A model that predicts v is recognised by the marker
    `v_pred` in the file.

    Args:
        nfq_path: the `.nfq.safetensors` file of a whole checkpoint.
        config_dir: a folder of a pipeline with `model_index.json`, configs, tokenisers and scheduler; weights in it are
            not read.
        dtype: see `load_unet`; for every model of the pipeline. By default fp32 on a CPU, where diffusers refuses fp16.
        device: device of the pipeline.
        memory: see `load_unet`.
        progress: see `parallel.Progress`; counts each model by itself.

    Raises:
        NFQError: the file or folder is missing, damaged or newer, the file lacks a model that the folder describes, or
            the two do not match.
        ValueError: `dtype` or `memory` is not allowed.
        ImportError: transformers is missing.
    """
    import diffusers

    check_dtype(dtype)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    folder = Path(config_dir)
    described = _read_index(folder)
    options = {"dtype": dtype, "device": device, "memory": memory, "progress": progress}
    with NFQFile(nfq_path) as file:
        missing = missing_companions(file)
        if missing:
            raise NFQError(
                f"{file.path} has no {' and no '.join(missing)}; name a whole checkpoint, or load its parts with "
                "load_unet and load_text_encoder"
            )
        markers = set(MARKERS).intersection(file.keys())
    parts = {"unet": load_unet(nfq_path, folder / "unet", **options)}
    for part in _TEXT_ENCODERS:
        if described.get(part, [None])[0] is not None:
            parts[part] = load_text_encoder(nfq_path, folder / part, **options)
    parts["vae"] = _load_vae(nfq_path, folder, dtype or parts["unet"].dtype)
    try:
        stock = getattr(diffusers, described["_class_name"])
        pipeline = stock.from_pretrained(folder, local_files_only=True, **parts)
    except LOADING_ERRORS as error:
        raise NFQError(f"{folder} cannot be loaded as a pipeline: {loading_error_message(error)}") from None
    if "v_pred" in markers:
        predict_v(pipeline, "ztsnr" in markers)
    return pipeline.to(device)


def _read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's `model_index.json`, which must describe a pipeline of diffusers with a UNet."""
    import diffusers

    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NFQError(
            f"{path} cannot be read: {reason_of(error)}; give a local folder with a pipeline's configs and tokenisers"
        ) from None
    except ValueError as error:
        raise NFQError(f"{path} is not valid JSON ({error}); fetch it again") from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str) or not hasattr(diffusers, kind) or "unet" not in index:
        raise NFQError(f"{path} describes {kind or 'no pipeline'}; name the folder of an SDXL pipeline")
    parts = [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    missing = next((name for name in parts if not (folder / name).is_dir()), None)
    if missing is not None:
        raise NFQError(f"{folder} has no folder {missing!r}, which its {INDEX} names; fetch it again")
    return index


def _load_vae(nfq_path: str | os.PathLike, folder: Path, dtype: torch.dtype) -> Any:
    """The VAE of a whole checkpoint, on the CPU."""
    from diffusers import AutoencoderKL

    with NFQFile(nfq_path) as file:
        keys = [key for key in file.shapes() if key.startswith(COMPANIONS["VAE"])]
        tensors = load_tensors(file, keys, dense=set(keys))
    try:
        # Hides diffusers' warnings: one is about a cast that diffusers makes itself.
        with quiet():
            return AutoencoderKL.from_single_file(
                tensors, config=os.fspath(folder), subfolder="vae", torch_dtype=dtype, local_files_only=True
            )
    except LOADING_ERRORS as error:
        raise NFQError(
            f"{nfq_path}: its VAE does not fit {folder / 'vae' / CONFIG}: {loading_error_message(error)}"
        ) from None
