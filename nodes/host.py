"""What the nodes ask of the host: its folders and its progress bar; what a MODEL of ours carries with it."""

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
from ..nfq_core.files.container import SUFFIX, Source
from ..nfq_core.parallel import seconds_left
from .patcher import NFModelPatcher

UNET = "diffusion_model."
"""What precedes a UNet's parameters in the host's model."""

BYPASS_LORA = "bypass_lora"
"""The name under which the host's LoraLoaderBypass puts adapters into a MODEL's layers, instead of into its patches."""

UNETS = "diffusion_models"
"""The host's folder of files that hold a UNet alone."""

CHECKPOINTS = "checkpoints"
"""The host's folder of files that hold UNet, CLIP and VAE."""

CALIBRATIONS = "nfq_calibrations"
"""Our folder of calibrations, below the host's models and below its output."""

MADE = "nfq"
"""The name under which a MODEL carries its `Made`."""

COLLECTED = "nfq_collected"
"""The name under which a MODEL carries its `collecting.Collected`, and its wrapper around sampling."""


@dataclass(frozen=True)
class Made:
    """How the packed weights of a MODEL were made; it travels with the MODEL."""

    settings: Mapping[str, Any]
    source: Source
    file_name: str = ""
    """The file they were loaded from; empty where they were quantised in this graph."""
    sqnr: Mapping[str, float] = field(default_factory=dict)
    """Signal-to-quantisation-noise ratio in dB by LDM name, where it was measured."""


def made(model: Any, otherwise: str) -> Made:
    """How a MODEL's packed weights were made.

    Raises:
        NFQError: it has none. The text is `otherwise`, but for a MODEL that an NFQ loader dequantised.
    """
    if isinstance(model, NFModelPatcher):
        return model.get_attachment(MADE)
    if hasattr(model, "get_attachment") and model.get_attachment(MADE) is not None:
        raise NFQError("this MODEL was dequantised when it was loaded; set memory to packed in its NFQ loader")
    raise NFQError(otherwise)


def file_names(folder: str) -> list[str]:
    """The names of our files in one of the host's folders, as its own loaders list them."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIX)]


def register_calibrations() -> None:
    """Have the host list the files in our folder of calibrations."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(CALIBRATIONS, os.path.join(parent, CALIBRATIONS))


def calibration_names() -> list[str]:
    """The names of the calibrations that the host lists."""
    names = folder_paths.get_filename_list(CALIBRATIONS)
    return [name for name in names if name.lower().endswith(CALIBRATION_SUFFIX)]


def calibration_path(name: str) -> str:
    """The path of one of `calibration_names`.

    Raises:
        NFQError: there is none of this name.
    """
    return _path(CALIBRATIONS, name, calibration_names(), CALIBRATION_SUFFIX)


def original_names(folder: str) -> list[str]:
    """The names of the safetensors files in one of the host's folders that are not ours."""
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if name.lower().endswith(".safetensors") and not name.lower().endswith(SUFFIX)]


def names_with_folder(names: Callable[[str], list[str]]) -> list[str]:
    """What `names` gives for the folders of UNets and of checkpoints, each behind its folder and a slash."""
    return [f"{folder}/{name}" for folder in (UNETS, CHECKPOINTS) for name in names(folder)]


def parted(name: object) -> tuple[str, object]:
    """One of `names_with_folder` as its folder and its name in there."""
    folder, _, rest = name.partition("/") if isinstance(name, str) else ("", "", name)
    return (folder, rest) if folder in (UNETS, CHECKPOINTS) else (UNETS, name)


def listed_name(folder: str, name: str) -> str | None:
    """One of `file_names`, given with slashes of either kind; None where there is no such file."""
    return _among(file_names(folder), name)


def _among(names: list[str], name: str) -> str | None:
    return next((known for known in names if _slashes(known) == _slashes(name)), None)


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def file_path(folder: str, name: str) -> str:
    """The path of a listed file.

    Raises:
        NFQError: there is none of this name, or it is not one of ours.
    """
    return _path(folder, name, file_names(folder), SUFFIX)


def original_path(folder: str, name: str) -> str:
    """The path of one of `original_names`.

    Raises:
        NFQError: there is none of this name.
    """
    return _path(folder, name, original_names(folder), ".safetensors")


def _path(folder: str, name: str, names: list[str], kind: str) -> str:
    known = _among(names, name)
    path = folder_paths.get_full_path(folder, known) if known else None
    if path is None:
        raise NFQError(f"{name!r} is no {kind} file in models/{folder}; put it there, or choose another")
    return path


def target(filename_prefix: str, folder: str, suffix: str) -> str:
    """The path for a prefix, below an output folder that the host lists; folders on the way are made."""
    prefix = filename_prefix.replace("\\", "/").removesuffix(suffix)
    if not prefix.startswith(f"{folder}/"):
        prefix = f"{folder}/{prefix}"
    if not prefix.rpartition("/")[2].strip(". "):
        raise NFQError(f"filename_prefix {filename_prefix!r} names no file; give it a name, such as 'my-model-NF16'")
    output = folder_paths.get_output_directory()
    listed = os.path.join(os.path.abspath(output), folder)
    # The host replaces what stands in %…% of a prefix, so that it has to be asked where it leads.
    try:
        directory, name, *_ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise NFQError(f"cannot write into {listed}: {error.strerror}") from None
    except Exception as error:
        if "outside the output folder" not in str(error):
            raise
        directory, name = output, ""
    if os.path.commonpath([listed, os.path.abspath(directory)]) != listed:
        raise NFQError(f"filename_prefix {filename_prefix!r} leads out of {listed}; remove the '..'")
    return os.path.join(directory, name + suffix)


def refuse_existing(path: str) -> None:
    """NFQError where a target is there already."""
    if os.path.exists(path):
        raise NFQError(f"{path} exists; choose another filename_prefix, or switch overwrite on")


def output_name(path: str) -> str:
    """A file that was written, as people name it: from the output folder on, with its size."""
    name = os.path.relpath(path, folder_paths.get_output_directory())
    return f"output/{_slashes(name)} ({os.path.getsize(path) / 1e6:,.0f} MB)"


def fingerprint(folder: str, name: object) -> str:
    """Changes when the file does; empty for a file that is not there, or whose name another node will give."""
    known = _among([*file_names(folder), *original_names(folder)], name) if isinstance(name, str) else None
    path = folder_paths.get_full_path(folder, known) if known else None
    if path is None:
        return ""
    facts = os.stat(path)
    return f"{path}|{facts.st_mtime_ns}|{facts.st_size}"


def finite(decibels: float | None) -> float | None:
    """A ratio for JSON, to a thousandth: None where it is infinite, or was not measured."""
    return round(decibels, 3) if decibels is not None and math.isfinite(decibels) else None


class NodeProgress:
    """The core's progress callback for a node: moves the host's bar, and stops when the user interrupts."""

    def __init__(self) -> None:
        self._bar: comfy.utils.ProgressBar | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        """See `parallel.Progress`."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(max(1, total))
        # The page divides by the total.
        self._bar.update_absolute(*((done, total) if total else (1, 1)))


class LayerProgress(NodeProgress):
    """`NodeProgress` that also tells the page each layer as it is quantised, as often as one can read it."""

    EVENT = "nfq.layer"
    SECONDS = 0.1
    """Least time between two events."""

    def __init__(self, node_id: str | None, describe: Callable[[str], Mapping[str, Any] | None]) -> None:
        """`describe` gives what the page is told of a tensor beside its name; None for one that is not worth it."""
        super().__init__()
        self._node_id, self._describe = node_id, describe
        self._started, self._told = time.monotonic(), 0.0

    def __call__(self, done: int, total: int, name: str) -> None:
        """See `parallel.Progress`."""
        super().__call__(done, total, name)
        facts, now = self._describe(name), time.monotonic()
        server = getattr(PromptServer, "instance", None)
        # Without a client the host would tell every page, and none of them how the run ended.
        client = getattr(server, "client_id", None)
        if facts is None or client is None or now - self._told < self.SECONDS:
            return
        self._told = now
        left = seconds_left(now - self._started, done, total)
        event = {"node": self._node_id, "done": done, "total": total, "name": name, "seconds_left": left, **facts}
        server.send_sync(self.EVENT, event, client)
