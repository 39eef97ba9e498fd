"""Converting files: quantise, dequantise, import the article's. All stream; none holds a whole model."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from .atomic import AtomicFile
from .codec import encode
from .container import FACTS_KEY, Facts, NFQFile, Source
from .errors import CannotQuantizeError, NFQError
from .parallel import ordered_map
from .policy import DEFAULTS, Settings, plan_tensors
from .safefile import DTYPE_NAMES, Entry, SafetensorsFile, dtype_bytes, header_bytes, tensor_bytes, tensor_from_bytes
from .tensor import NFTensor, quantize
from .writer import ContainerWriter, Plan

log = logging.getLogger("nfq")

IN_FLIGHT_BYTES = 256 << 20
"""Bytes of tensors that are read ahead of the writer."""

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all, and the name of the tensor that was finished."""


def no_progress(done: int, total: int, name: str) -> None:
    """The progress callback that shows nothing."""


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    settings: Settings = DEFAULTS,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Convert a safetensors UNet, checkpoint or state dict to `.nfq.safetensors`.

    A tensor that turns out to hold NaN, Inf or magnitudes beyond fp16 is kept as it is, with a warning naming it.

    Args:
        source: the file to convert.
        target: the file to write.
        settings: levels and effort.
        device: where to quantise, such as "cuda"; by default the CPU.
        overwrite: whether an existing target may be replaced.
        progress: see `Progress`.

    Returns:
        `file_bytes`, `original_bytes`, `quantized` and `kept` (counts), `warnings` and `seconds`.

    Raises:
        NFQError: the source is unfit, or the target cannot be written. Nothing is then left behind.
    """
    started = perf_counter()
    with SafetensorsFile(source) as file, _SourceHash(file) as source_hash:
        refuse_container(file)
        refuse_same(source, target)
        info, plans = plan_tensors(file.entries, settings)
        facts = Facts(
            settings.as_dict(),
            info.layout if info else "plain",
            info.name if info else "unknown",
            Source(Path(source).name, file.file_bytes, source_hash.blank, file.metadata),
        )
        warnings = _surprising(file.entries)
        total = sum(entry.nbytes for entry in file.entries.values())
        done = 0

        def jobs() -> Iterator[tuple[str, bytearray]]:
            for key in sorted(file.entries, key=lambda name: file.entries[name].start):
                if plans[key].format is None:
                    writer.write_kept(key, source_hash.over(file.read_chunks(key)))
                    report(key)
                else:
                    raw = file.read(key)
                    source_hash.add(raw)
                    yield key, raw

        def work(job: tuple[str, bytearray]) -> tuple[str, list[bytes] | None, bytearray, str]:
            key, raw = job
            plan = plans[key]
            try:
                weight = tensor_from_bytes(raw, plan.dtype, plan.shape)
                packed = quantize(weight, plan.format.levels, effort=settings.effort, device=device)
            except CannotQuantizeError as error:
                return key, None, raw, str(error)
            return key, encode(packed.data.cpu(), plan.format.sections(weight.numel())), raw, ""

        def report(key: str) -> None:
            nonlocal done
            done += file.entries[key].nbytes
            progress(done, total, key)

        with ContainerWriter(target, plans, facts, overwrite=overwrite) as writer:
            for key, frames, raw, reason in ordered_map(
                work, jobs(), size=lambda job: len(job[1]), max_in_flight=IN_FLIGHT_BYTES
            ):
                if frames is None:
                    warnings.append(f"tensor {key!r} is kept as it is: {reason}")
                    writer.write_kept(key, [raw])
                else:
                    writer.write_quantized(key, frames)
                report(key)
            facts = replace(facts, source=replace(facts.source, sha256=source_hash.hexdigest()))
            file_bytes = writer.finish(facts)
    for warning in warnings:
        log.warning("%s: %s", source, warning)
    return conversion_result(facts, plans, writer, file_bytes, warnings, started)


def conversion_result(
    facts: Facts, plans: dict[str, Plan], writer: ContainerWriter, file_bytes: int, warnings: list[str], started: float
) -> dict:
    """What a conversion to a container returns, see `quantize_file`; `started` is a `perf_counter` reading."""
    return {
        "file_bytes": file_bytes,
        "original_bytes": facts.source.bytes,
        "quantized": len(writer.quantized_keys),
        "kept": len(plans) - len(writer.quantized_keys),
        "warnings": warnings,
        "seconds": round(perf_counter() - started, 3),
    }


def dequantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Write a container's tensors as plain safetensors under their original names.

    Args:
        source: the `.nfq.safetensors` file.
        target: the file to write.
        dtype: dtype of the tensors that were quantised; by default the one each had. Kept tensors stay as they are.
        overwrite: whether an existing target may be replaced.
        progress: see `Progress`.

    Returns:
        `file_bytes`, `tensors` and `seconds`.

    Raises:
        NFQError: the source is no sound container, or the target cannot be written. Nothing is then left behind.
    """
    started = perf_counter()
    with NFQFile(source) as file:
        refuse_same(source, target)
        outputs = {key: (file.entries[key].dtype, file.entries[key].shape) for key in file.kept}
        for key, quantized in file.quantized.items():
            outputs[key] = (DTYPE_NAMES[dtype] if dtype else quantized.dtype, quantized.shape)
        entries = {}
        end = 0
        for key in sorted(outputs, key=lambda name: -dtype_bytes(outputs[name][0])):
            plan = Plan(*outputs[key])
            entries[key] = Entry(plan.dtype, plan.shape, end, end + plan.nbytes)
            end += plan.nbytes
        header = header_bytes(entries, {"format": "pt", **file.facts.source.metadata})

        def work(key: str) -> tuple[str, memoryview]:
            tensor = file.load(key)
            if isinstance(tensor, NFTensor):
                tensor = tensor.dequantize(dtype or tensor.dtype)
            return key, tensor_bytes(tensor)

        with AtomicFile(target, overwrite) as out:
            out.write_at(0, header)
            done = 0
            for key, data in ordered_map(
                work, entries, size=lambda name: entries[name].nbytes, max_in_flight=IN_FLIGHT_BYTES
            ):
                out.write_at(len(header) + entries[key].start, data)
                done += entries[key].nbytes
                progress(done, end, key)
            out.commit()
    return {
        "file_bytes": len(header) + end,
        "tensors": len(entries),
        "seconds": round(perf_counter() - started, 3),
    }


def refuse_container(file: SafetensorsFile) -> None:
    """NFQError when a source is itself a container."""
    if FACTS_KEY in file.metadata:
        raise NFQError(f"{file.path} is quantised already; `nfq dequantize` turns it back first")


def refuse_same(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """NFQError when a target is the source itself, which overwriting would lose."""
    if os.path.exists(target) and os.path.samefile(source, target):
        raise NFQError(f"{target} is the source itself; name another target")


def _surprising(entries: dict[str, Entry]) -> list[str]:
    """Warnings about weights that one would expect to be quantised, and that are not."""
    return [
        f"tensor {key!r} is kept as it is: it has eight-bit floats already ({entry.dtype})"
        for key, entry in entries.items()
        if entry.dtype.startswith("F8") and len(entry.shape) >= 2
    ]


class _SourceHash:
    """SHA-256 of a whole source file, taken on a thread of its own while the file is read in order."""

    blank = "0" * 64

    def __init__(self, file: SafetensorsFile) -> None:
        self._hash = hashlib.sha256(file.raw_header)
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> _SourceHash:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, data: bytearray) -> None:
        """Take in bytes that nobody changes any more."""
        self._pool.submit(self._hash.update, data)

    def over(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """Take in pieces that are valid for a moment, and pass them on."""
        for piece in pieces:
            self._pool.submit(self._hash.update, piece).result()
            yield piece

    def hexdigest(self) -> str:
        """The digest of all that was taken in."""
        return self._pool.submit(self._hash.hexdigest).result()
