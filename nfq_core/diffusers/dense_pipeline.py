"""Load a pipeline of SDXL from a checkpoint file or a diffusers folder, to sample it without decoding pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints.kinds import kind_of
from ..checkpoints.memory import check_device
from ..errors import NFQError, missing_package
from ..files.original import Original
from ..files.pipeline_folder import INDEX, refuse_other_folders
from ..files.untrusted import LOADING_ERRORS, loading_error_message
from ..models.unet import detect
from ..models.unet_keys import SDXL_BASE, UNetArchitecture
from .loading import CONFIG, empty_model, read_unet_config

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

_SECOND_TEXT_ENCODER = "conditioner.embedders.1."
"""Start of the names of an SDXL checkpoint's second text encoder; the first one precedes it."""


def load_dense_pipeline(
    source: str | os.PathLike, device: str | None = None, config: str | None = None, *, v_prediction: bool = False
) -> StableDiffusionXLPipeline:
    """Load a pipeline of the SDXL family without its VAE: fp32 on a CPU, fp16 on other devices.

    Args:
        source: a `.safetensors` checkpoint with text encoders, a diffusers folder, or the UNet in one.
        device: where the pipeline is put; by default a CUDA device if there is one.
        config: for a checkpoint, a diffusers folder of the same kind of model, of which settings and tokenisers are
            read, no weights; by default diffusers fetches those of SDXL.
        v_prediction: whether the model in a checkpoint predicts v; always so if the file has the marker `v_pred`.

    Raises:
        NFQError: the source is no such model or quantised, or the settings cannot be fetched or do not fit.
        ImportError: diffusers or transformers is missing.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        needed = ("diffusers", "transformers")
        raise missing_package(f"sampling a model needs {' and '.join(needed)}", *needed) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device, torch.float16)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    path = Path(source)
    folder = _folder_of(path)
    pipeline = _from_folder(folder, dtype) if folder else _from_checkpoint(path, dtype, config, v_prediction)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def predict_v(pipeline: StableDiffusionXLPipeline, zero_terminal_snr: bool) -> None:
    """Give a pipeline a scheduler for a model that predicts v, whose last noise level may hold no signal at all."""
    changes = {"prediction_type": "v_prediction"}
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)


def _folder_of(path: Path) -> Path | None:
    """The diffusers folder that a path means: itself, or the one around a UNet; None for another file."""
    unet = path if path.is_dir() else path.parent
    if unet.name == "unet" and (unet.parent / INDEX).exists():
        return unet.parent
    return path if path.is_dir() else None


def _from_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    refuse_other_folders(folder)
    weights = [file.name for file in (folder / "unet").glob("diffusion_pytorch_model*")]
    variant = "fp16" if weights and all(".fp16" in name for name in weights) else None
    with quiet(), _errors_in_words(folder):
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, vae=None, local_files_only=True, add_watermarker=False
        )


def _from_checkpoint(
    path: Path, dtype: torch.dtype, config: str | None, v_prediction: bool
) -> StableDiffusionXLPipeline:
    with Original(path) as file:
        _refuse_other_settings(path, _sampled_architecture(file), config)
        names = set(file.entries)
    with quiet(), _errors_in_words(path):
        from diffusers import StableDiffusionXLPipeline
        from huggingface_hub.utils import LocalEntryNotFoundError

        try:
            pipeline = StableDiffusionXLPipeline.from_single_file(
                path,
                torch_dtype=dtype,
                config=config,
                vae=None,
                local_files_only=config is not None,
                add_watermarker=False,
            )
        except LocalEntryNotFoundError:
            raise NFQError(
                "SDXL's settings and tokenisers cannot be fetched; go online once, or name a diffusers folder of an "
                "SDXL model with --config"
            ) from None
    if v_prediction or "v_pred" in names:
        predict_v(pipeline, "ztsnr" in names)
    return pipeline


def _sampled_architecture(file: Original) -> UNetArchitecture:
    """The architecture of a checkpoint's UNet; NFQError if prompts cannot sample the checkpoint."""
    kind = kind_of(file)
    if not kind.is_family_unet:
        raise NFQError(f"{file.path}: a calibration needs a whole SDXL checkpoint, this is: {kind.name}")
    if any(map(file.is_scaled, file.entries)):
        raise NFQError(f"{file.path} is quantised already; calibrate the model that it was made from")
    if not any(key.startswith(_SECOND_TEXT_ENCODER) for key in file.entries):
        raise NFQError(
            f"{file.path} lacks SDXL's text encoders, which prompts need; give the whole checkpoint, or a diffusers "
            "folder"
        )
    architecture = detect({key: entry.shape for key, entry in file.entries.items()}).architecture
    if architecture.in_channels != architecture.out_channels:
        raise NFQError(
            f"{file.path}: its UNet needs a picture besides the prompt; record a calibration with nfq_core.collect "
            "while you sample it"
        )
    return architecture


def _refuse_other_settings(path: Path, architecture: UNetArchitecture, config: str | None) -> None:
    """Raise NFQError if the settings that a checkpoint is loaded with are those of another architecture."""
    described: UNetArchitecture | None = SDXL_BASE
    if config is not None:
        folder = Path(config)
        refuse_other_folders(folder)
        unet = empty_model(read_unet_config(folder / "unet"), str(folder / "unet" / CONFIG))
        info = detect({name: tuple(weight.shape) for name, weight in unet.state_dict().items()})
        described = info and info.architecture
    if architecture != described:
        other = config or "SDXL"
        raise NFQError(
            f"{path}: its UNet ({architecture.name}) differs from that of {other}; name a diffusers folder of the same "
            "kind of model with --config"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of diffusers and transformers, which would mix with those of the command."""
    import transformers
    from diffusers.utils import logging

    loggers = (logging, transformers.logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggers]
    for each in loggers:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 renames `torch_dtype`, which older versions need.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for each, (verbosity, had_bars) in zip(loggers, before, strict=True):
            each.set_verbosity(verbosity)
            if had_bars:
                each.enable_progress_bar()


@contextmanager
def _errors_in_words(path: Path) -> Iterator[None]:
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        yield
    except (*LOADING_ERRORS, SingleFileComponentError) as error:
        raise NFQError(f"{path} cannot be loaded as an SDXL pipeline: {loading_error_message(error)}") from None
