"""The `.nfq.safetensors` container: what its header says and how a file is read; `writer` writes one.

`docs/FORMAT.md` specifies it. A quantised tensor `key` is the U8 tensor `nfq.key` of zstd frames; a kept tensor stands
under its own name. The metadata entry `nfq` is JSON, and `nfq_header_sha256` is a hash over the raw header with its own
digits zeroed.
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

from ..errors import CorruptFileError, NFQError, UnsupportedFileError
from ..packed.codec import decode, frame_count
from ..packed.formats import BlockFormat, format_by_id
from ..packed.tensor import QUANTIZABLE_DTYPES, NFTensor
from .safetensors_io import METADATA_KEY, TORCH_DTYPES, SafetensorsFile, dtype_bytes
from .untrusted import element_count, is_count, is_number, parse_error_message, parse_json

SUFFIX = ".nfq.safetensors"
"""What the names of containers end in."""

CONTAINER_VERSION = 1

MAX_CONTAINER_HEADER_BYTES = 4 << 20
"""The ComfyUI page reads no more of a file dropped on it."""

PREFIX = "nfq."
"""What the names of quantised tensors start with: stock loaders then do not mistake them for weights."""

_local = threading.local()

FACTS_KEY = "nfq"
HASH_KEY = "nfq_header_sha256"

NO_SHA256 = "0" * 64
"""Stands where a SHA-256 will be known later."""


@dataclass(frozen=True)
class Source:
    """The file a container was made from."""

    name: str = ""
    bytes: int = 0
    sha256: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def source_name(path: str | os.PathLike) -> str:
    """The name of a source file, fit for the header whatever its bytes are."""
    return Path(path).name.encode("utf-8", "replace").decode("utf-8")


UNRECORDED = Source()
"""Stands for a source that is not known, such as a model in memory."""


BAKED = "baked"
"""The setting that lists what was applied to the weights before: LoRAs with their strengths, models merged in."""

IMPORTED = "imported"
"""The setting of files that were not quantised here, but converted from another format."""


@dataclass(frozen=True)
class Facts:
    """What a container's header says about the whole of it."""

    settings: dict[str, Any] = field(default_factory=dict)
    layout: str = "plain"
    architecture: str = "unknown"
    source: Source = UNRECORDED


@dataclass(frozen=True)
class QuantizedEntry:
    """A quantised tensor in the header: its format, shape and former dtype, the lengths of its frames, its checksum."""

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
    def packed_bytes(self) -> int:
        """Bytes of the packed buffer."""
        return self.format.packed_bytes(self.weights)


def checksum_text(crc32: int) -> str:
    """A CRC-32 as the header spells it."""
    return f"{crc32:08x}"


def header_hash(raw_header: bytes, recorded: str) -> str:
    """SHA-256 in hexadecimal over a raw header whose recorded hash, `recorded`, is replaced by as many zeros.

    The header must name the hash exactly once; otherwise the result is empty.
    """
    field_text = f'"{HASH_KEY}":"{recorded}"'.encode()
    if len(recorded) != 64 or not recorded.isascii() or raw_header.count(field_text) != 1:
        return ""
    blank = field_text.replace(recorded.encode(), NO_SHA256.encode())
    return hashlib.sha256(raw_header.replace(field_text, blank)).hexdigest()


def _count(value: object) -> int:
    if not is_count(value):
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no object")
    return value


def _source(fields: Mapping[str, Any]) -> Source:
    metadata = {name: _text(value) for name, value in fields["metadata"].items()}
    return Source(_text(fields["name"]), _count(fields["bytes"]), _text(fields["sha256"]), metadata)


def _scratch(nbytes: int) -> memoryview:
    """Memory for a tensor's frames, one piece a thread: fresh memory would cost more than reading into it."""
    if len(getattr(_local, "scratch", b"")) < nbytes:
        _local.scratch = bytearray(nbytes)
    return memoryview(_local.scratch)[:nbytes]


class NFQFile(SafetensorsFile):
    """An `.nfq.safetensors` file opened for reading, everything its header says checked; tensors are read one by one.

    Raises:
        NFQError, CorruptFileError, UnsupportedFileError: as SafetensorsFile, and for what is no container or newer.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        try:
            self._parse_container()
        except BaseException:
            self.close()
            raise

    max_header_bytes = MAX_CONTAINER_HEADER_BYTES - 8

    @property
    def header_sha256(self) -> str:
        """The hash recorded in the header; the header holds every tensor's checksum, so it tells files apart."""
        return self.metadata[HASH_KEY]

    def keys(self) -> list[str]:
        """Original names of all tensors, the kept ones first."""
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
        """Bytes that a tensor takes in the dtype it had before it was quantised."""
        entry = self.quantized.get(key)
        return entry.weights * dtype_bytes(entry.dtype) if entry else self.entries[key].nbytes

    def load(self, key: str) -> NFTensor | torch.Tensor:
        """One tensor by its original name, its checksum verified.

        Raises:
            CorruptFileError: its bytes are damaged.
        """
        if key in self.quantized:
            return self._load_quantized(key)
        return self._as_tensor(key, self.load_kept(key))

    def load_kept(self, key: str) -> memoryview:
        """The bytes of one kept tensor, see `load`."""
        view = memoryview(bytearray(self.entries[key].nbytes))
        self.read_into(key, view)
        self._check_sum(key, zlib.crc32(view), self.kept[key])
        return view

    def verify(self, key: str) -> None:
        """Read one tensor and check all that can be checked; CorruptFileError when it is damaged."""
        if key in self.quantized:
            self._load_quantized(key, codes=True)
            return
        checksum = 0
        for piece in self.read_chunks(key):
            checksum = zlib.crc32(piece, checksum)
        self._check_sum(key, checksum, self.kept[key])

    def _load_quantized(self, key: str, codes: bool = False) -> NFTensor:
        entry = self.quantized[key]
        sections = entry.format.sections(entry.weights)
        stored = _scratch(self.stored_bytes(key))
        self.read_into(PREFIX + key, stored)
        self._check_sum(key, zlib.crc32(stored), entry.crc32)
        try:
            data = decode(stored, list(entry.frames), sections)
            tensor = NFTensor(data, entry.format, entry.shape, TORCH_DTYPES[entry.dtype])
            tensor.validate(codes=codes)
        except NFQError as error:
            raise type(error)(f"{self.path}: tensor {key!r}: {error}") from None
        return tensor

    def _check_sum(self, key: str, found: int, wanted: str) -> None:
        if checksum_text(found) != wanted:
            raise CorruptFileError(f"{self.path}: tensor {key!r} is damaged (checksum mismatch); fetch the file again")

    def _parse_container(self) -> None:
        if FACTS_KEY not in self.metadata:
            raise UnsupportedFileError(
                f"{self.path} is not an .nfq.safetensors file; `nfq quantize` or `nfq import-article` makes one of it"
            )
        try:
            header = parse_json(self.metadata[FACTS_KEY])
            self.container_version = _count(header["container_version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptFileError(f"{self.path}: the nfq part of its header is damaged; fetch it again") from None
        if self.container_version < 1:
            raise CorruptFileError(f"{self.path}: container version {self.container_version} is none; fetch it again")
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
            )
            self.quantized = {key: self._quantized_entry(key, item) for key, item in header["quantized"].items()}
            self.kept = {key: _text(checksum) for key, checksum in header["kept"].items()}
        except UnsupportedFileError as error:
            raise UnsupportedFileError(f"{self.path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"{self.path}: the nfq part of its header is damaged ({parse_error_message(error)})"
            ) from None
        told = {PREFIX + key for key in self.quantized} | self.kept.keys()
        taken = min((key for key in self.keys() if key.startswith(PREFIX) or key == METADATA_KEY), default=None)
        if taken is not None:
            raise CorruptFileError(f"{self.path}: its header breaks the format: no tensor may be called {taken!r}")
        odd = min((told ^ self.entries.keys()) | (self.quantized.keys() & self.kept.keys()), default=None)
        if odd is not None:
            raise CorruptFileError(f"{self.path}: its header disagrees with itself about tensor {odd!r}")

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
        # Refuses what no tensor can be, before anything is multiplied.
        element_count(entry.shape)
        stored = self.entries[PREFIX + key]
        if stored.dtype != "U8" or len(stored.shape) != 1:
            raise ValueError(f"tensor {key!r} is stored as {stored.dtype} {list(stored.shape)}, not as 1-D U8")
        if entry.weights == 0 or TORCH_DTYPES.get(entry.dtype) not in QUANTIZABLE_DTYPES:
            raise ValueError(f"tensor {key!r} has an impossible shape or dtype")
        spans = frame_count(entry.format.sections(entry.weights))
        if len(entry.frames) != spans or min(entry.frames) <= 0 or sum(entry.frames) != stored.nbytes:
            raise ValueError(
                f"tensor {key!r} needs {spans} frames for {entry.format.id} {entry.shape}, found {len(entry.frames)} "
                f"of {sum(entry.frames):,} bytes in {stored.nbytes:,}"
            )
        return entry
