"""Source models, to quantise or to compare with: a safetensors file or a sharded model; scaled weights dequantised."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch

from ..errors import CorruptFileError, NFQError, UnsupportedFileError, reason_of
from .article import is_article_file
from .container import FACTS_KEY
from .prequantized import QUANTIZATION_METADATA, Prequantized, find_prequantized
from .safetensors_io import MAX_HEADER_BYTES, TORCH_DTYPES, Entry, SafetensorsFile
from .untrusted import parse_json

_INDEX = re.compile(r"(?P<model>.+)\.safetensors\.index(?P<variant>\.[^.]+)?\.json")
"""Name of a sharded model's index; diffusers adds a variant, such as `fp16`, after `index`."""

_PART = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
"""Name of a part of a sharded model."""


class Original:
    """A source model opened for reading; fp8 and int8 weights with scales are dequantised.

    Args:
        path: a safetensors file, the index of a sharded model, or the folder that holds the index.

    Raises:
        NFQError: a file is missing or unreadable, or `path` is one part of a sharded model.
        UnsupportedFileError: a file is not a safetensors file.
        AlreadyQuantizedError: weights are quantised in an unsupported form, see `prequantized`.
        CorruptFileError: a file is damaged, or the index and the parts contradict each other.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(os.path.abspath(path)) if os.path.isdir(path) else Path(path)
        self.files: list[SafetensorsFile] = []
        """The files, sorted by name."""
        self.metadata: dict[str, str] = {}
        """Metadata of the first file, without the description of scales."""
        try:
            for part in _parts(self.path):
                self.files.append(SafetensorsFile(part))
            self._file_of = {key: file for file in self.files for key in file.entries}
            if len(self._file_of) < sum(len(file.entries) for file in self.files):
                raise CorruptFileError(f"{self.path}: two of its parts hold the same tensor; fetch it again")
            stored = {key: file.entries[key] for key, file in self._file_of.items()}
            metadata = self.files[0].metadata
            texts = (file.metadata.get(QUANTIZATION_METADATA) for file in self.files)
            descriptions = [text for text in texts if text is not None]
            is_ours = FACTS_KEY in metadata or is_article_file(stored)
            self._quantized = (
                Prequantized() if is_ours else find_prequantized(stored, descriptions, self._stored, str(self.path))
            )
        except BaseException:
            self.close()
            raise
        self.entries: dict[str, Entry] = self._quantized.dequantized_entries(stored)
        """Dtype and shape of every tensor after dequantising; offsets and `nbytes` are those of the stored tensor."""
        self.metadata = {name: text for name, text in metadata.items() if name != QUANTIZATION_METADATA}

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading fails afterwards."""
        for file in self.files:
            file.close()

    @property
    def file_bytes(self) -> int:
        """Total size of the files."""
        return sum(file.file_bytes for file in self.files)

    def is_scaled(self, key: str) -> bool:
        """Whether a tensor is stored with a scale, so that its bytes do not match `entries`."""
        return key in self._quantized.weights

    def stored_dtype(self, key: str) -> str:
        """The safetensors dtype in which a tensor is stored."""
        return self._file_of[key].entries[key].dtype

    def dequantize(self, key: str, stored: torch.Tensor) -> torch.Tensor:
        """A stored tensor multiplied by its scale, in the dtype of `entries`; unchanged if it has no scale."""
        scaled = self._quantized.weights.get(key)
        return scaled.dequantize(stored).to(TORCH_DTYPES[self.entries[key].dtype]) if scaled else stored

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor, dequantised."""
        return self.dequantize(key, self._stored(key))

    def refuse_changed(self) -> None:
        """See `SafetensorsFile.refuse_changed`."""
        for file in self.files:
            file.refuse_changed()

    def sha256(self) -> str:
        """SHA-256 in hexadecimal of the file, or of a sharded model's concatenated parts."""
        if len(self.files) == 1:
            return self.files[0].sha256()
        digest = hashlib.sha256()
        for file in self.files:
            for piece in file.read_whole():
                digest.update(piece)
        return digest.hexdigest()

    def _stored(self, key: str) -> torch.Tensor:
        return self._file_of[key].tensor(key)


def sharded_model(path: str | os.PathLike) -> tuple[str, int, int] | None:
    """Model name, part number and number of parts from a part's file name; None for other names and for 1 of 1."""
    match = _PART.fullmatch(Path(path).name)
    if match is None or int(match["count"]) < 2:
        return None
    return match["model"], int(match["number"]), int(match["count"])


def indexed_model(path: str | os.PathLike) -> str | None:
    """Model name with variant from the file name of an index; None for other names."""
    match = _INDEX.fullmatch(Path(path).name)
    return match and match["model"] + (match["variant"] or "")


def part_refusal(path: Path) -> str:
    """End of the error for a part of a sharded model: which part, and which file to name instead."""
    model, number, count = sharded_model(path)
    base, dot, variant = model.rpartition(".")
    names = [f"{model}.safetensors.index.json", *([f"{base}.safetensors.index.{variant}.json"] if dot else ())]
    index = next((name for name in names if path.with_name(name).exists()), None)
    advice = f"name {index} instead" if index else f"its index {' or '.join(names)} is missing; fetch it too"
    return f"part {number} of {count} of a sharded model; {advice}"


def _parts(path: Path) -> list[Path]:
    """The files of a model."""
    if path.is_dir():
        path = _index_in(path)
    if indexed_model(path):
        return _parts_of(path)
    if sharded_model(path):
        raise NFQError(f"{path} is {part_refusal(path)}")
    return [path]


def _index_in(folder: Path) -> Path:
    """The index in a folder."""
    try:
        names = sorted(path.name for path in folder.iterdir() if indexed_model(path))
    except OSError as error:
        raise NFQError(f"{folder} cannot be read: {reason_of(error)}") from None
    if len(names) == 1:
        return folder / names[0]
    if names:
        raise NFQError(f"{folder} holds {len(names)} sharded models; name one of them: {', '.join(names)}")
    unet = next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), None)
    way_out = f"; name {unet} or a file in it" if unet else "; name the .safetensors file in it"
    raise NFQError(f"{folder} is a directory without the index of a sharded model{way_out}")


def _parts_of(index: Path) -> list[Path]:
    """The parts that an index names; NFQError if one is missing."""
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("it is too long")
        names = parse_json(index.read_text("utf-8"))["weight_map"].values()
        # A damaged or malicious index must not name files elsewhere.
        parts = sorted({str(name) for name in names})
        if not parts or any(Path(name).name != name or name in ("", ".", "..") for name in parts):
            raise ValueError("it names files in another folder, or none")
        absent = [name for name in parts if not (index.parent / name).exists()]
    except FileNotFoundError:
        raise NFQError(f"{index}: no such file") from None
    except OSError as error:
        raise NFQError(f"{index} cannot be read: {reason_of(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UnsupportedFileError(f"{index} is not the index of a sharded model, or is damaged") from None
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise NFQError(f"{index}: its part {absent[0]}{more} is missing; fetch it into the same folder")
    return [index.parent / name for name in parts]
