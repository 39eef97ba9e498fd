"""Reading safetensors files piece by piece, without loading or mapping them whole, and headers for writing them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..errors import CorruptFileError, NFQError, UnsupportedFileError, reason_of
from ..packed.tensor import NFTensor
from .sniff import HEAD_BYTES, describe_foreign_file
from .untrusted import element_count, is_count, parse_error_message, parse_json

MAX_HEADER_BYTES = 100_000_000
"""Header limit of the safetensors library, in bytes."""

METADATA_KEY = "__metadata__"
"""Name of the header entry that holds text about the file instead of a tensor."""

COPY_BYTES = 8 << 20
"""Bytes per piece when tensors are copied."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_LATER_DTYPES = {"U64": "uint64", "U32": "uint32", "U16": "uint16", "F8_E8M0": "float8_e8m0fnu"}
# torch has these since 2.3 and 2.7; older versions can read files without them.
TORCH_DTYPES |= {name: getattr(torch, dtype) for name, dtype in _LATER_DTYPES.items() if hasattr(torch, dtype)}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors header; `start` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.start


class SafetensorsFile:
    """A safetensors file opened for reading, its header checked; tensors are read one at a time.

    Thread-safe. The file stays open, so that data of a file that replaces it are never mixed in.

    Raises:
        NFQError: the file is missing, a directory, a pipe or device, or unreadable.
        UnsupportedFileError: it is not a safetensors file.
        CorruptFileError: it is truncated, or its header contradicts itself or the file's size.
    """

    max_header_bytes = MAX_HEADER_BYTES
    """Largest accepted header in bytes, without its eight length bytes; a longer one is not read."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._file = open(self.path, "rb", buffering=0, opener=_open_non_blocking)  # noqa: SIM115
        except IsADirectoryError:
            raise NFQError(f"{self.path} is a directory; name the .safetensors file in it") from None
        except FileNotFoundError:
            raise NFQError(f"{self.path}: no such file") from None
        except PermissionError:
            reason = "is a directory; name the .safetensors file in it" if os.path.isdir(path) else "cannot be read"
            raise NFQError(f"{self.path} {reason} (permission denied)") from None
        except OSError as error:
            raise NFQError(f"{self.path} cannot be opened: {reason_of(error)}") from None
        except ValueError as error:
            raise NFQError(f"{self.path} cannot be opened: {error}") from None
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise NFQError(f"{self.path} is not a regular file; name a .safetensors file")
            self.file_bytes = status.st_size
            self._version = self._version_now()
            self.raw_header = self._read_header()
            self.entries, self.metadata = self._parse_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading fails afterwards."""
        self._file.close()

    def refuse_changed(self) -> None:
        """NFQError if the file at this path changed in size or modification time since it was opened."""
        now = self._version_now()
        if now is not None and now != self._version:
            raise NFQError(f"{self.path} changed while it was read; nothing was written, try again")

    def _version_now(self) -> tuple[int, int] | None:
        """Size and modification time of the file at this path; None if there is none.

        Inode and device numbers are ignored, because network file systems may change them at any time.
        """
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NFQError(f"{self.path} cannot be examined: {reason_of(error)}") from None
        return status.st_size, status.st_mtime_ns

    def read(self, name: str) -> bytearray:
        """The bytes of one tensor."""
        buffer = bytearray(self.entries[name].nbytes)
        self.read_into(name, memoryview(buffer))
        return buffer

    def read_into(self, name: str, view: memoryview) -> None:
        """Read the bytes of one tensor into memory of exactly their length."""
        self._read_at(view, self._data_start + self.entries[name].start)

    def read_chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor, piece by piece; each piece is valid until the next one is requested."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(entry.nbytes, COPY_BYTES)))
        for start in range(entry.start, entry.end, COPY_BYTES):
            piece = buffer[: min(COPY_BYTES, entry.end - start)]
            self._read_at(piece, self._data_start + start)
            yield piece

    def names_in_order(self) -> list[str]:
        """Names of all tensors in the order of their data."""
        return sorted(self.entries, key=lambda name: self.entries[name].start)

    def sha256(self) -> str:
        """SHA-256 of the whole file in hexadecimal; reads the file once more."""
        digest = hashlib.sha256()
        for piece in self.read_whole():
            digest.update(piece)
        return digest.hexdigest()

    def read_whole(self) -> Iterator[bytes | memoryview]:
        """Every byte of the file, piece by piece; each piece is valid until the next one is requested."""
        yield self.raw_header
        for name in self.names_in_order():
            yield from self.read_chunks(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into new memory.

        Raises:
            UnsupportedFileError: its dtype has no counterpart in torch.
        """
        return self._as_tensor(name, self.read(name))

    def _as_tensor(self, name: str, buffer: bytearray | memoryview) -> torch.Tensor:
        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise UnsupportedFileError(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which torch lacks")
        return tensor_from_bytes(buffer, entry.dtype, entry.shape)

    @property
    def _data_start(self) -> int:
        return len(self.raw_header)

    def _read_at(self, view: memoryview, offset: int) -> None:
        try:
            done = 0
            while done < len(view):
                count = self._read_some(view[done:], offset + done)
                if not count:
                    raise CorruptFileError(f"{self.path} became shorter while it was read")
                done += count
        except OSError as error:
            raise NFQError(f"{self.path} cannot be read: {reason_of(error)}") from None

    def _read_some(self, view: memoryview, offset: int) -> int:
        """Read up to a whole view; threads read in parallel if the operating system supports it."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view)

    def _read_header(self) -> bytes:
        """The raw header: eight bytes of length, then JSON."""
        head = bytearray(min(HEAD_BYTES, self.file_bytes))
        self._read_at(memoryview(head), 0)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or length > MAX_HEADER_BYTES or head[8:9] != b"{":
            kind = describe_foreign_file(bytes(head), self.path.name, self.file_bytes)
            reason = f"it is {kind}" if kind else "it is damaged, or of another kind; fetch it again"
            raise UnsupportedFileError(f"{self.path} is not a safetensors file: {reason}")
        if length > self.max_header_bytes:
            raise UnsupportedFileError(
                f"{self.path} is not an .nfq.safetensors file: its header has {8 + length:,} bytes, that of one at "
                f"most {8 + self.max_header_bytes:,}"
            )
        if 8 + length > self.file_bytes:
            raise CorruptFileError(
                f"{self.path} is cut short: it has {self.file_bytes:,} bytes, its header alone needs {8 + length:,}; "
                "fetch it again"
            )
        header = bytearray(8 + length)
        self._read_at(memoryview(header), 0)
        return bytes(header)

    def _parse_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        try:
            header = parse_json(self.raw_header[8:].decode("utf-8"))
            if not isinstance(header, dict):
                raise ValueError("it is not a JSON object")
            # Some writers leave null there, which the safetensors library accepts as no metadata.
            metadata = {} if (stored := header.pop(METADATA_KEY, None)) is None else stored
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError(f"{METADATA_KEY} holds something other than text")
            entries = {name: _entry(name, fields) for name, fields in header.items()}
        except UnsupportedFileError as error:
            raise UnsupportedFileError(f"{self.path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(
                f"{self.path}: its header is damaged ({parse_error_message(error)}); fetch it again"
            ) from None
        position = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != position:
                raise CorruptFileError(f"{self.path}: tensor {name!r} starts at {entry.start}, expected {position}")
            position = entry.end
        if self._data_start + position > self.file_bytes:
            raise CorruptFileError(
                f"{self.path} is cut short: it has {self.file_bytes:,} bytes, its header needs "
                f"{self._data_start + position:,}; fetch it again"
            )
        excess = self.file_bytes - self._data_start - position
        if excess > 0:
            raise CorruptFileError(f"{self.path} has {excess:,} bytes more than its header describes")
        return entries, metadata


def _open_non_blocking(path: str, flags: int) -> int:
    """Opener for `open` that does not block on a pipe without a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def tensor_from_bytes(buffer: bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that shares the memory of `buffer`."""
    if not buffer:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="cpu")
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of a safetensors dtype; UnsupportedFileError for an unknown or sub-byte dtype."""
    bits = "8" if dtype == "BOOL" else dtype.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ").split("_")[0]
    # Compared as text, because `int` fails on some Unicode digits and on very long numbers.
    if bits not in ("8", "16", "32", "64", "128"):
        raise UnsupportedFileError(f"dtype {dtype!r} is unknown to this version; update the plugin")
    return int(bits) // 8


def _entry(name: str, fields: object) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    if len(offsets) != 2 or not all(map(is_count, offsets + shape)):
        raise ValueError(f"tensor {name!r} has impossible sizes")
    start, end = offsets
    if end - start != element_count(shape) * dtype_bytes(dtype):
        raise ValueError(f"tensor {name!r} of {dtype} {shape} does not fit its {end - start} bytes")
    return Entry(dtype, tuple(shape), start, end)


def aligned_entries(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Header entries for consecutive tensors, given as dtype and shape, each aligned to its own dtype.

    Sorted by dtype width, widest first; the order is kept among equal widths.
    """
    entries: dict[str, Entry] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: -dtype_bytes(tensors[name][0])):
        dtype, shape = tensors[name]
        start, end = end, end + prod(shape) * dtype_bytes(dtype)
        entries[name] = Entry(dtype, shape, start, end)
    return entries


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str], reserve: int = 0) -> bytes:
    """A safetensors header with its length prefix, padded with spaces to `reserve` bytes or a multiple of eight."""
    fields: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        fields[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * max(-len(text) % 8, reserve - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def describe(state_dict: Mapping[str, NFTensor | torch.Tensor]) -> dict[str, Entry]:
    """Header entries of a state dict's tensors, with offsets 0."""
    unknown = next((key for key, value in state_dict.items() if value.dtype not in DTYPE_NAMES), None)
    if unknown is not None:
        raise NFQError(f"tensor {unknown!r} has dtype {state_dict[unknown].dtype}, which safetensors cannot hold")
    return {key: Entry(DTYPE_NAMES[value.dtype], tuple(value.shape), 0, 0) for key, value in state_dict.items()}
