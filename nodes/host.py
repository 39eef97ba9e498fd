"""The nodes' access to ComfyUI, the host: its folders and progress bar, and what our MODELs carry."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from server import PromptServer

from ..nfq_core import NFQError
from ..nfq_core.calibration.statistics import CALIBRATION_SUFFIX
from ..nfq_core.errors import reason_of
from ..nfq_core.files.container import SUFFIX, Source
from ..nfq_core.parallel import seconds_left
from ..nfq_core.sizes import size_in_words
from .patcher import NFModelPatcher

UNET = "diffusion_model."
"""Prefix of the UNet's parameters in the host's model."""

BYPASS_LORA = "bypass_lora"
"""Key of the injections by which the host's LoraLoaderBypass adds adapters to layers instead of patching weights."""

UNETS = "diffusion_models"
"""The host's folder for files with only a UNet."""

CHECKPOINTS = "checkpoints"
"""The host's folder for files with UNet, CLIP and VAE."""

TEXT_ENCODERS = "text_encoders"
"""The host's folder for files with a text encoder."""

FOLDERS = (UNETS, CHECKPOINTS, TEXT_ENCODERS)
"""The host's folders for our files."""

CALIBRATIONS = "nfq_calibrations"
"""Our folder for calibrations, inside the host's models folder and inside its output folder."""

PROVENANCE = "nfq"
"""Key of a MODEL's `Provenance` among its attachments."""

COLLECTOR = "nfq_collected"
"""Key of a MODEL's `calibration.SamplingCollector` among its attachments and sampling wrappers."""


@dataclass(frozen=True)
class Provenance:
    """How the packed weights of a MODEL were made; attached to the MODEL."""

    settings: Mapping[str, Any]
    source: Source
    file_name: str = ""
    """The file that the weights were loaded from; empty if they were quantised in this workflow."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """What is expected of the model's output, see `expectation`."""
    sqnr: Mapping[str, float] = field(default_factory=dict)
    """Measured signal-to-quantisation-noise ratios in dB by LDM name."""


def provenance(model: Any, refusal: str) -> Provenance:
    """How a MODEL's packed weights were made.

    Args:
        model: any MODEL.
        refusal: the error message for a MODEL that was never quantised.

    Raises:
        NFQError: the MODEL is not packed.
    """
    if isinstance(model, NFModelPatcher):
        return model.get_attachment(PROVENANCE)
    if hasattr(model, "get_attachment") and model.get_attachment(PROVENANCE) is not None:
        raise NFQError("this MODEL was dequantised when it was loaded; set memory to packed in its NFQ loader")
    raise NFQError(refusal)


def file_names(folder: str) -> list[str]:
    """Names of our files in one of the host's folders, as its own loaders list them."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIX)]


def register_folders() -> None:
    """Add our folders of calibrations, and the output folder of text encoders, to those that the host lists."""
    output = folder_paths.get_output_directory()
    for parent in (folder_paths.models_dir, output):
        folder_paths.add_model_folder_path(CALIBRATIONS, os.path.join(parent, CALIBRATIONS))
    folder_paths.add_model_folder_path(TEXT_ENCODERS, os.path.join(output, TEXT_ENCODERS))


def calibration_names() -> list[str]:
    """Names of the calibrations that the host lists."""
    names = folder_paths.get_filename_list(CALIBRATIONS)
    return [name for name in names if name.lower().endswith(CALIBRATION_SUFFIX)]


def calibration_path(name: str) -> str:
    """The path of one of `calibration_names`.

    Raises:
        NFQError: there is no calibration of this name.
    """
    return _path(CALIBRATIONS, name, calibration_names(), CALIBRATION_SUFFIX)


def original_names(folder: str) -> list[str]:
    """Names of the safetensors files in one of the host's folders that are not ours."""
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if name.lower().endswith(".safetensors") and not name.lower().endswith(SUFFIX)]


def names_with_folder(names: Callable[[str], list[str]]) -> list[str]:
    """Files of FOLDERS as "folder/name".

    Args:
        names: lists the names in a folder, such as `file_names`.
    """
    return [f"{folder}/{name}" for folder in FOLDERS for name in names(folder)]


def split_folder(name: object) -> tuple[str, object]:
    """Split one of `names_with_folder` into its folder and the name in that folder."""
    folder, _, rest = name.partition("/") if isinstance(name, str) else ("", "", name)
    return (folder, rest) if folder in FOLDERS else (UNETS, name)


def listed_name(folder: str, name: str) -> str | None:
    """Find a name among `file_names`, whichever slashes it has; None if there is no such file."""
    return _find_name(file_names(folder), name)


def _find_name(names: list[str], name: str) -> str | None:
    return next((known for known in names if _slashes(known) == _slashes(name)), None)


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def file_path(folder: str, name: str) -> str:
    """The path of a listed file.

    Raises:
        NFQError: there is no file of this name, or it is not one of ours.
    """
    return _path(folder, name, file_names(folder), SUFFIX)


def original_path(folder: str, name: str) -> str:
    """The path of one of `original_names`.

    Raises:
        NFQError: there is no file of this name.
    """
    return _path(folder, name, original_names(folder), ".safetensors")


def _path(folder: str, name: str, names: list[str], suffix: str) -> str:
    known = _find_name(names, name)
    path = folder_paths.get_full_path(folder, known) if known else None
    if path is None:
        raise NFQError(
            f"{name!r} is not in models/{folder}, or its name does not end in {suffix}; put it there, or choose another"
        )
    return path


def output_path(filename_prefix: str, folder: str, suffix: str) -> str:
    """The path of a new file in an output folder that the host lists.

    Missing folders are created.

    Args:
        filename_prefix: as the user typed it.
        folder: the folder inside the host's output folder.
        suffix: the ending of the file's name.

    Raises:
        NFQError: the prefix contains no name, leads out of the folder, or the folder cannot be written.
    """
    prefix = filename_prefix.replace("\\", "/").removesuffix(suffix)
    if not prefix.startswith(f"{folder}/"):
        prefix = f"{folder}/{prefix}"
    if not prefix.rpartition("/")[2].strip(". "):
        raise NFQError(f"filename_prefix {filename_prefix!r} has no file name; add one, such as 'my-model-small'")
    output = folder_paths.get_output_directory()
    listed = os.path.join(os.path.abspath(output), folder)
    # The host replaces %…% in a prefix, so only the host knows where the prefix leads.
    try:
        directory, name, *_ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise NFQError(f"cannot write into {listed}: {reason_of(error)}") from None
    except Exception as error:
        if "outside the output folder" not in str(error):
            raise
        directory, name = output, ""
    if os.path.commonpath([listed, os.path.abspath(directory)]) != listed:
        raise NFQError(f"filename_prefix {filename_prefix!r} leads out of {listed}; remove the '..'")
    return os.path.join(directory, name + suffix)


def listed_output(path: str, folder: str) -> str:
    """The name under which the host lists a file that was written to one of its output folders."""
    return os.path.relpath(path, os.path.join(folder_paths.get_output_directory(), folder))


def refuse_existing(path: str) -> None:
    """Raise NFQError if the path exists."""
    if os.path.exists(path):
        raise NFQError(f"{path} exists; choose another filename_prefix, or switch overwrite on")


def output_name_and_size(path: str) -> str:
    """A written file as shown to users: its path from the output folder on, and its size."""
    name = os.path.relpath(path, folder_paths.get_output_directory())
    return f"output/{_slashes(name)} ({size_in_words(os.path.getsize(path))})"


def fingerprint(folder: str, name: object) -> str:
    """A text that changes when the file does; empty if the file is missing or its name comes from another node."""
    known = _find_name([*file_names(folder), *original_names(folder)], name) if isinstance(name, str) else None
    path = folder_paths.get_full_path(folder, known) if known else None
    if path is None:
        return ""
    facts = os.stat(path)
    return f"{path}|{facts.st_mtime_ns}|{facts.st_size}"


def json_decibels(decibels: float | None) -> float | None:
    """A ratio for JSON, rounded to 0.001 dB; None if it is infinite or was not measured."""
    return round(decibels, 3) if decibels is not None and math.isfinite(decibels) else None


class NodeProgress:
    """The core's progress callback for a node: moves the host's bar and stops when the user interrupts."""

    def __init__(self) -> None:
        self._bar: comfy.utils.ProgressBar | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        """See `parallel.Progress`."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(max(1, total))
        # The page divides by the total, which must not be 0.
        self._bar.update_absolute(*((done, total) if total else (1, 1)))


class LayerProgress(NodeProgress):
    """`NodeProgress` that also sends each quantised layer to the page, at most every `SECONDS`."""

    EVENT = "nfq.layer"
    SECONDS = 0.1
    """Minimum time between two events."""

    def __init__(self, node_id: str | None, describe: Callable[[str], Mapping[str, Any] | None]) -> None:
        """Prepare for one run of a node.

        Args:
            node_id: the node that shows the layers.
            describe: returns the facts that the page shows with a tensor's name; None to send no event for it.
        """
        super().__init__()
        self._node_id, self._describe = node_id, describe
        self._started, self._sent_at = time.monotonic(), 0.0

    def __call__(self, done: int, total: int, name: str) -> None:
        """See `parallel.Progress`."""
        super().__call__(done, total, name)
        facts, now = self._describe(name), time.monotonic()
        server = getattr(PromptServer, "instance", None)
        # Without a client the event would go to every page, and no page would learn how the run ended.
        client = getattr(server, "client_id", None)
        if facts is None or client is None or now - self._sent_at < self.SECONDS:
            return
        self._sent_at = now
        left = seconds_left(now - self._started, done, total)
        event = {"node": self._node_id, "done": done, "total": total, "name": name, "seconds_left": left, **facts}
        server.send_sync(self.EVENT, event, client)
