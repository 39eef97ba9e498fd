"""Writing an `.nfq.safetensors` file tensor by tensor, before compressed sizes are known."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod

from ..errors import NFQError
from ..packed.codec import frame_spans, max_frame_bytes
from ..packed.layout import BlockFormat
from ..version import __version__
from .atomic import AtomicFile
from .container import (
    CONTAINER_VERSION,
    FACTS_KEY,
    HASH_KEY,
    MAX_CONTAINER_HEADER_BYTES,
    NO_SHA256,
    PREFIX,
    Facts,
    checksum_text,
    header_hash,
)
from .safetensors_io import METADATA_KEY, Entry, aligned_entries, dtype_bytes, header_bytes
from .untrusted import parse_json


@dataclass(frozen=True)
class Plan:
    """A tensor to be written.

    Args:
        dtype: safetensors dtype before quantising.
        shape: shape of the tensor.
        format: the block format; None: the tensor is kept as it is.
        sensitivity: the layer's sensitivity by which the format was chosen, see `allocation.allocate`; else None.
    """

    dtype: str
    shape: tuple[int, ...]
    format: BlockFormat | None = None
    sensitivity: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor before it is quantised."""
        return prod(self.shape) * dtype_bytes(self.dtype)


class ContainerWriter:
    """Writes one container. Use it as a context manager and call `finish`; otherwise no file appears.

    The header precedes the data, but its sizes are known last. Space for the longest possible header is therefore
    reserved, and padded with spaces. Kept tensors, whose sizes are known, follow, then quantised ones in any order.

    Args:
        path: the file to write.
        plans: every tensor by its original name.
        facts: what the header records about the model as a whole.
        extra: further metadata, such as `workflow` and `prompt`.
        overwrite: whether an existing file may be replaced.

    Raises:
        NFQError: a tensor has a reserved name, a name or fact cannot be written as UTF-8 JSON, the header would exceed
            4 MiB, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        plans: Mapping[str, Plan],
        facts: Facts,
        *,
        extra: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        reserved = next((key for key in plans if key.startswith(PREFIX)), None)
        if reserved is not None:
            raise NFQError(f"tensor {reserved!r} has a name that starts with {PREFIX!r}, which marks quantised tensors")
        if METADATA_KEY in plans:
            raise NFQError(f"a tensor is named {METADATA_KEY!r}, which is the name of safetensors' own metadata")
        self._plans = plans
        self._facts = facts
        self._extra = dict(extra or {})
        self._quantized: dict[str, dict] = {}
        self._kept: dict[str, str] = {}
        try:
            # Do not write what the reader would refuse.
            parse_json(_facts_text(facts, {}, {}))
            self._reserved = longest_header_bytes(plans, facts, self._extra)
        except (TypeError, ValueError, RecursionError) as error:
            raise NFQError(f"{path}: a name or setting cannot be written to the header: {error}") from None
        if self._reserved > MAX_CONTAINER_HEADER_BYTES:
            advice = "leave out the workflow" if self._extra else "there are too many tensors"
            raise NFQError(
                f"{path}: the header may need {self._reserved:,} bytes of the {MAX_CONTAINER_HEADER_BYTES:,} allowed; "
                f"{advice}"
            )
        self._entries = aligned_entries(
            {key: (plan.dtype, plan.shape) for key, plan in plans.items() if not plan.format}
        )
        self._end = max((entry.end for entry in self._entries.values()), default=0)
        self._file = AtomicFile(path, overwrite)
        self.path = self._file.path

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.discard()

    def write_kept(self, key: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a tensor as it is, given as consecutive pieces of its bytes.

        A tensor that was planned to be quantised may be kept instead; it is then appended to the data written so far.
        """
        if key not in self._entries:
            plan = self._plans[key]
            self._entries[key] = self._next_entry(plan.dtype, plan.shape, plan.nbytes)
        position, checksum = self._entries[key].start, 0
        for piece in pieces:
            self._file.write_at(self._reserved + position, piece)
            checksum = zlib.crc32(piece, checksum)
            position += len(piece)
        assert position == self._entries[key].end
        self._kept[key] = checksum_text(checksum)

    def write_quantized(self, key: str, frames: list[bytes]) -> None:
        """Write the frames of a quantised tensor, in the planned format."""
        plan = self._plans[key]
        stored = b"".join(frames)
        entry = self._entries[PREFIX + key] = self._next_entry("U8", (len(stored),), len(stored))
        self._file.write_at(self._reserved + entry.start, stored)
        self._quantized[key] = _described(plan, [len(frame) for frame in frames], zlib.crc32(stored))

    @property
    def quantized_keys(self) -> list[str]:
        """Original names of the quantised tensors written so far."""
        return list(self._quantized)

    @property
    def file_bytes(self) -> int:
        """Size of the file with all data written so far."""
        return self._reserved + self._end

    def finish(self, facts: Facts | None = None) -> int:
        """Write the header, flush the file and rename it to its target.

        Args:
            facts: replacement for the facts given before; its text must not be longer.

        Returns:
            Size of the file in bytes.
        """
        self._facts = facts or self._facts
        text = _facts_text(self._facts, self._quantized, self._kept)
        header = _header(self._entries, text, self._extra, self._reserved)
        assert len(header) == self._reserved and len(self._entries) == len(self._plans)
        recorded = header_hash(header, NO_SHA256)
        self._file.write_at(0, header.replace(NO_SHA256.encode(), recorded.encode(), 1))
        self._file.commit()
        return self.file_bytes

    def _next_entry(self, dtype: str, shape: tuple[int, ...], nbytes: int) -> Entry:
        entry = Entry(dtype, shape, self._end, self._end + nbytes)
        self._end = entry.end
        return entry


def longest_header_bytes(plans: Mapping[str, Plan], facts: Facts, extra: Mapping[str, str]) -> int:
    """Bytes of the header that a writer reserves: as if every number in it had as many digits as possible.

    Args:
        plans: see `ContainerWriter`, also for `facts`.
        extra: further metadata.
    """
    bound = {
        key: [max_frame_bytes(end - start) for start, end in frame_spans(plan.format.sections(prod(plan.shape)))]
        for key, plan in plans.items()
        if plan.format
    }
    last = sum(sum(frames) for frames in bound.values()) + sum(plan.nbytes for plan in plans.values())
    entries, quantized, kept = {}, {}, {}
    for key, plan in plans.items():
        if plan.format:
            entries[PREFIX + key] = Entry("U8", (last,), last, last)
            quantized[key] = _described(plan, bound[key], 0)
        else:
            entries[key] = Entry(plan.dtype, plan.shape, last, last)
            kept[key] = checksum_text(0)
    return len(_header(entries, _facts_text(facts, quantized, kept), extra, 0))


def _header(entries: Mapping[str, Entry], facts_text: str, extra: Mapping[str, str], reserve: int) -> bytes:
    metadata = {HASH_KEY: NO_SHA256, "format": "pt", FACTS_KEY: facts_text, **extra}
    return header_bytes(entries, metadata, reserve)


def _facts_text(facts: Facts, quantized: Mapping[str, dict], kept: Mapping[str, str]) -> str:
    described = {"container_version": CONTAINER_VERSION, "writer": f"ComfyUI-NFQ {__version__}"}
    described |= asdict(facts) | {"quantized": quantized, "kept": kept}
    return json.dumps(described, separators=(",", ":"), ensure_ascii=False)


def _described(plan: Plan, frames: list[int], crc32: int) -> dict:
    return {
        "format": plan.format.id,
        "shape": plan.shape,
        "dtype": plan.dtype,
        "frames": frames,
        "crc32": checksum_text(crc32),
        **({} if plan.sensitivity is None else {"sensitivity": plan.sensitivity}),
    }
