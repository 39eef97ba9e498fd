"""Reading our files when the program asks for a checkpoint; independent of the program."""

from __future__ import annotations

import os

import torch

from ..nfq_core import NFQError, NFQFile
from ..nfq_core.checkpoints.state_dict import StateDict, load_tensors
from ..nfq_core.checkpoints.whole_checkpoint import (
    checkpoint_names,
    dequantize_state_dict,
    missing_companions,
    rename_tensors,
    unet_names,
)
from ..nfq_core.files.container import HASH_KEY, SUFFIX
from ..nfq_core.models.text_encoders import find_text_encoders
from ..nfq_core.models.unet import detect

KEEP_PACKED = "nfq_keep_packed"
"""The name of the setting that keeps weights packed in programs that support it."""

MARK_BYTES = 256
"""Our writer puts HASH_KEY first in the header, so it is in the first bytes of a file of any name."""


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a file is one of ours, by its name or its first bytes."""
    name = os.fspath(path).lower()
    if name.endswith(SUFFIX):
        return True
    try:
        with open(path, "rb") as file:
            return name.endswith(".safetensors") and HASH_KEY.encode() in file.read(MARK_BYTES)
    except OSError:
        return False


def metadata_of(path: str) -> dict[str, str]:
    """The texts in a file's header, as a reader of safetensors files returns them next to the tensors."""
    with NFQFile(path) as file:
        return dict(file.metadata)


def refuse_incomplete(file: NFQFile, remedy: str) -> None:
    """Raise NFQError, ending in `remedy`, if a file lacks its text encoder or VAE."""
    missing = missing_companions(file)
    if missing:
        raise NFQError(f"{file.path} has no {' and no '.join(missing)}; {remedy}")


class NFQLoading:
    """Reads our files completely before the program drops its model, and hands them over when it asks.

    The program drops its model before it reads the next one. An error at that point would leave it without a model.
    """

    def __init__(self) -> None:
        self._ahead: tuple[tuple, StateDict] | None = None

    def read_ahead(self, path: str, remedy: str = "") -> None:
        """Read and check every tensor of a file; the UNet's weights stay packed.

        Args:
            path: the file.
            remedy: advice for a file without text encoder or VAE; if empty, such a file is accepted.

        Raises:
            NFQError: the file is missing, damaged, foreign, newer, or incomplete.
        """
        self.forget()
        with NFQFile(path) as file:
            tensors = _read_model(file, remedy)
        self._ahead = _fingerprint(path), tensors

    def forget(self) -> None:
        """Free what was read ahead."""
        self._ahead = None

    def take(self, path: str, remedy: str = "") -> StateDict:
        """All tensors of a file under the names of a whole LDM checkpoint; the UNet's weights are packed.

        Uses the tensors read ahead, or reads the file now; arguments and errors as for `read_ahead`. Without a
        `remedy`, the file may also be a text encoder, whose names stay as they are.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == _fingerprint(path):
            return ahead[1]
        with NFQFile(path) as file:
            shapes = file.shapes()
            if not remedy and detect(shapes) is None and find_text_encoders(shapes):
                return load_tensors(file, dense=shapes)
            return _read_model(file, remedy)

    def take_dense(self, path: str, device: torch.device | str, remedy: str = "") -> dict[str, torch.Tensor]:
        """`take`, with the UNet's weights dequantised to fp16."""
        return dequantize_state_dict(self.take(path, remedy), device=device)


def _fingerprint(path: str) -> tuple[str, int, int]:
    facts = os.stat(path)
    return os.path.realpath(path), facts.st_mtime_ns, facts.st_size


def _read_model(file: NFQFile, remedy: str) -> StateDict:
    if remedy:
        refuse_incomplete(file, remedy)
    names, unet = checkpoint_names(file), unet_names(file)
    # The program's text encoders have no packed layers.
    others = {key for key in names if key not in unet}
    return rename_tensors(load_tensors(file, dense=others), names)
