"""The `.nfq.safetensors` container: its header, and reading a file; see `writer` for writing.

Specified in `docs/FORMAT.md`. A quantised tensor `key` is stored as the U8 tensor `nfq.key`, which holds zstd frames; a
kept tensor has its own name. The metadata entry `nfq` is JSON; `nfq_header_sha256` is a hash of the raw header in which
its own digits are replaced by zeros.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CorruptFileError, NFQError, UnsupportedFileError, command
from ..packed.codec import decode, frame_count
from ..packed.formats import format_by_id
from ..packed.layout import BlockFormat, Sections
from ..packed.tensor import QUANTIZABLE_DTYPES, NFTensor
from .safetensors_io import METADATA_KEY, TORCH_DTYPES, SafetensorsFile, dtype_bytes
from .untrusted import element_count, is_count, is_number, parse_error_message, parse_json

SUFFIX = ".nfq.safetensors"
"""File name ending of containers."""

CONTAINER_VERSION = 1

MAX_CONTAINER_HEADER_BYTES = 4 << 20
"""Header limit in bytes: ComfyUI's page reads no more of a file dropped on it."""

PREFIX = "nfq."
"""Prefix of quantised tensors' names, so that stock loaders do not mistake them for weights."""

_local = threading.local()

FACTS_KEY = "nfq"
HASH_KEY = "nfq_header_sha256"

NO_SHA256 = "0" * 64
"""Placeholder for a SHA-256 that is not known yet."""


@dataclass(frozen=True)
class Source:
    """The file from which a container was made."""

    name: str = ""
    bytes: int = 0
    sha256: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def source_name(path: str | os.PathLike) -> str:
    """The name of a source file as valid UTF-8 for the header."""
    return Path(path).name.encode("utf-8", "replace").decode("utf-8")


UNRECORDED = Source()
"""An unknown source, such as a model in memory."""

BAKED = "baked"
"""Setting that lists what was applied to the weights before quantising: LoRAs with strengths, merged models."""

IMPORTED = "imported"
"""Setting of files that were converted from another quantised format."""


@dataclass(frozen=True)
class Facts:
    """What a container's header records about the model as a whole; see `docs/FORMAT.md`."""

    settings: dict[str, Any] = field(default_factory=dict)
    layout: str = "plain"
    architecture: str = "unknown"
    source: Source = UNRECORDED
    expected: dict[str, float] = field(default_factory=dict)
    """What was expected of the model's output, in dB, see `calibration.expectation`; empty if unknown."""


@dataclass(frozen=True)
class QuantizedEntry:
    """A quantised tensor's header entry: format, shape, original dtype, length of each frame in bytes, checksum."""

    format: BlockFormat
    shape: tuple[int, ...]
    dtype: str
    frames: tuple[int, ...]
    crc32: str
    sensitivity: float | None = None
    """See `writer.Plan`."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def sections(self) -> Sections:
        """Where each section of the packed buffer begins; without levels of its own it has one frame less."""
        sections = self.format.sections(self.weights)
        if not self.format.has_common_levels or len(self.frames) == frame_count(sections):
            return sections
        return self.format.sections(self.weights, own_levels=False)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed buffer."""
        return self.sections.end


def checksum_text(crc32: int) -> str:
    """A CRC-32 as the header writes it."""
    return f"{crc32:08x}"


def header_hash(raw_header: bytes, recorded: str) -> str:
    """SHA-256 in hexadecimal of a raw header in which the recorded hash is replaced by zeros.

    Empty if the header does not contain `recorded` exactly once as its hash.
    """
    field_text = f'"{HASH_KEY}":"{recorded}"'.encode()
    if len(recorded) != 64 or not recorded.isascii() or raw_header.count(field_text) != 1:
        return ""
    blank = field_text.replace(recorded.encode(), NO_SHA256.encode())
    return hashlib.sha256(raw_header.replace(field_text, blank)).hexdigest()


def _count(value: object) -> int:
    if not is_count(value):
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _number(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object")
    return value


def _source(fields: Mapping[str, Any]) -> Source:
    metadata = {name: _text(value) for name, value in fields["metadata"].items()}
    return Source(_text(fields["name"]), _count(fields["bytes"]), _text(fields["sha256"]), metadata)


def _scratch(nbytes: int) -> memoryview:
    """Memory for a tensor's frames, reused by each thread, because allocating costs more than reading."""
    if len(getattr(_local, "scratch", b"")) < nbytes:
        _local.scratch = bytearray(nbytes)
    return memoryview(_local.scratch)[:nbytes]


class NFQFile(SafetensorsFile):
    """An `.nfq.safetensors` file opened for reading, its header checked; tensors are read one at a time.

    Raises:
        NFQError, CorruptFileError: as for SafetensorsFile.
        UnsupportedFileError: the file is not a container, or was written by a newer version.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        try:
            self._parse_container()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"NFQFile({os.fspath(self.path)!r}, {len(self.quantized)} quantised and {len(self.kept)} kept tensors)"

    max_header_bytes = MAX_CONTAINER_HEADER_BYTES - 8

    @property
    def header_sha256(self) -> str:
        """The hash of the header, which identifies the file: the header holds every tensor's checksum."""
        return self.metadata[HASH_KEY]

    def keys(self) -> list[str]:
        """Original names of all tensors, kept ones first."""
        return [*self.kept, *self.quantized]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its original name, in the order of `keys`."""
        kept = {key: self.entries[key].shape for key in self.kept}
        return kept | {key: entry.shape for key, entry in self.quantized.items()}

    def stored_bytes(self, key: str) -> int:
        """Bytes that a tensor takes in the file, by its original name."""
        return self.entries[PREFIX + key if key in self.quantized else key].nbytes

    def packed_bytes(self, key: str) -> int:
        """Bytes that a tensor takes in memory when `load` has read it."""
        return self.quantized[key].packed_bytes if key in self.quantized else self.entries[key].nbytes

    def dense_bytes(self, key: str) -> int:
        """Bytes of a tensor in the dtype that it had before it was quantised."""
        entry = self.quantized.get(key)
        return entry.weights * dtype_bytes(entry.dtype) if entry else self.entries[key].nbytes

    def load(self, key: str) -> NFTensor | torch.Tensor:
        """Read one tensor by its original name and verify its checksum.

        Raises:
            CorruptFileError: its bytes are damaged.
        """
        if key in self.quantized:
            return self._load_quantized(key)
        return self._as_tensor(key, self.load_kept(key))

    def load_kept(self, key: str) -> memoryview:
        """The bytes of one kept tensor, checksum verified."""
        view = memoryview(bytearray(self.entries[key].nbytes))
        self.read_into(key, view)
        self._verify_checksum(key, zlib.crc32(view), self.kept[key])
        return view

    def verify(self, key: str) -> None:
        """Read one tensor and check it completely; CorruptFileError if it is damaged."""
        if key in self.quantized:
            self._load_quantized(key, codes=True)
            return
        checksum = 0
        for piece in self.read_chunks(key):
            checksum = zlib.crc32(piece, checksum)
        self._verify_checksum(key, checksum, self.kept[key])

    def _load_quantized(self, key: str, codes: bool = False) -> NFTensor:
        entry = self.quantized[key]
        stored = _scratch(self.stored_bytes(key))
        self.read_into(PREFIX + key, stored)
        self._verify_checksum(key, zlib.crc32(stored), entry.crc32)
        try:
            data = decode(stored, list(entry.frames), entry.sections)
            tensor = NFTensor(data, entry.format, entry.shape, TORCH_DTYPES[entry.dtype])
            tensor.validate(codes=codes)
        except NFQError as error:
            raise type(error)(f"{self.path}: tensor {key!r}: {error}") from None
        return tensor

    def _verify_checksum(self, key: str, actual: int, recorded: str) -> None:
        if checksum_text(actual) != recorded:
            raise CorruptFileError(f"{self.path}: tensor {key!r} is damaged (checksum mismatch); fetch the file again")

    def _parse_container(self) -> None:
        if FACTS_KEY not in self.metadata:
            raise UnsupportedFileError(
                f"{self.path} is not an .nfq.safetensors file; {command('quantize')} converts it"
            )
        try:
            header = parse_json(self.metadata[FACTS_KEY])
            self.container_version = _count(header["container_version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptFileError(f"{self.path}: the nfq part of its header is damaged; fetch it again") from None
        if self.container_version < 1:
            raise CorruptFileError(
                f"{self.path}: container version {self.container_version} does not exist; fetch it again"
            )
        if self.container_version > CONTAINER_VERSION:
            raise UnsupportedFileError(
                f"{self.path} has container version {self.container_version}, this version reads up to "
                f"{CONTAINER_VERSION}; update the plugin"
            )
        self._check_header_hash()
        try:
            self.writer = _text(header["writer"])
            self.facts = Facts(
                _object(header["settings"]),
                _text(header["layout"]),
                _text(header["architecture"]),
                _source(header["source"]),
                {name: _number(value) for name, value in header.get("expected", {}).items()},
            )
            self.quantized = {key: self._quantized_entry(key, item) for key, item in header["quantized"].items()}
            self.kept = {key: _text(checksum) for key, checksum in header["kept"].items()}
        except UnsupportedFileError as error:
            raise UnsupportedFileError(f"{self.path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"{self.path}: the nfq part of its header is damaged ({parse_error_message(error)})"
            ) from None
        reserved = min((key for key in self.keys() if key.startswith(PREFIX) or key == METADATA_KEY), default=None)
        if reserved is not None:
            raise CorruptFileError(f"{self.path}: its header breaks the format: no tensor may be called {reserved!r}")
        listed = {PREFIX + key for key in self.quantized} | self.kept.keys()
        inconsistent = min((listed ^ self.entries.keys()) | (self.quantized.keys() & self.kept.keys()), default=None)
        if inconsistent is not None:
            raise CorruptFileError(f"{self.path}: its header disagrees with itself about tensor {inconsistent!r}")

    def _check_header_hash(self) -> None:
        recorded = self.metadata.get(HASH_KEY, "")
        if not recorded or header_hash(self.raw_header, recorded) != recorded:
            raise CorruptFileError(f"{self.path}: its header is damaged (checksum mismatch); fetch it again")

    def _quantized_entry(self, key: str, item: Mapping[str, Any]) -> QuantizedEntry:
        entry = QuantizedEntry(
            format_by_id(item["format"]),
            tuple(map(_count, item["shape"])),
            item["dtype"],
            tuple(map(_count, item["frames"])),
            _text(item["crc32"]),
            None if item.get("sensitivity") is None else _number(item["sensitivity"]),
        )
        # Refuse impossible shapes before anything is computed from them.
        element_count(entry.shape)
        stored = self.entries[PREFIX + key]
        if stored.dtype != "U8" or len(stored.shape) != 1:
            raise ValueError(f"tensor {key!r} is stored as {stored.dtype} {list(stored.shape)}, not as 1-D U8")
        if entry.weights == 0 or TORCH_DTYPES.get(entry.dtype) not in QUANTIZABLE_DTYPES:
            raise ValueError(f"tensor {key!r} has an impossible shape or dtype")
        spans = frame_count(entry.sections)
        if len(entry.frames) != spans or min(entry.frames) <= 0 or sum(entry.frames) != stored.nbytes:
            either = f"{spans} or {spans + 1}" if entry.format.has_common_levels else spans
            raise ValueError(
                f"tensor {key!r} needs {either} frames for {entry.format.id} {entry.shape}, found {len(entry.frames)} "
                f"of {sum(entry.frames):,} bytes in {stored.nbytes:,}"
            )
        return entry
