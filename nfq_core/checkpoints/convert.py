"""Converting files: quantise and dequantise. Both stream; neither holds a whole model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter

import torch

from ..calibration.statistics import Calibration, measured_sensitivities
from ..errors import CannotQuantizeError, CorruptFileError, NFQError, UnsupportedFileError, printable
from ..files.article import is_article_file
from ..files.atomic import AtomicFile, is_same_file
from ..files.container import FACTS_KEY, NO_SHA256, Facts, NFQFile, Source, source_name
from ..files.original import Original
from ..files.safetensors_io import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    Entry,
    SafetensorsFile,
    aligned_entries,
    header_bytes,
    tensor_bytes,
    tensor_from_bytes,
)
from ..files.writer import ContainerWriter, Plan
from ..fitting.quantizer import quantize
from ..models.completeness import missing_tensors_message, unet_warnings
from ..models.unet import detect
from ..packed.codec import encode
from ..parallel import IN_FLIGHT_BYTES, Progress, no_progress, ordered_map, threads_for
from ..planning.allocation import SizeSearch
from ..planning.facts import facts_about
from ..planning.policy import DEFAULTS, Settings, plan_tensors
from .extras import recorded_extras, split_extras
from .memory import refuse_beyond_memory
from .targets import PLAIN_SUFFIX, refuse_name

log = logging.getLogger("nfq")

PAGE_METADATA = ("workflow", "prompt")
"""Metadata that the ComfyUI page looks for; it stands in the container as it stood in the source."""

MAX_METADATA_BYTES = 1 << 20
"""So much of a source's metadata finds room in a container's header, as it stands there."""

MAX_METADATA_WARNINGS = 8
"""Entries left out that are named one by one."""


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    settings: Settings = DEFAULTS,
    *,
    device: str | None = None,
    calibration: Calibration | None = None,
    drop_extras: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Convert a safetensors UNet, checkpoint or state dict to `.nfq.safetensors`.

    Weights that are stored in fp8 or int8 are ordinary weights: scales are undone first (see `prequantized`). A tensor
    that turns out to hold NaN, Inf or magnitudes beyond fp16 is kept as it is, with a warning naming it.

    Args:
        source: the file to convert, the index of a sharded model or its folder.
        target: the file to write.
        settings: formats and effort.
        device: where to quantise, such as "cuda"; by default the CPU.
        calibration: statistics of the layers' inputs; a weight that they do not cover is quantised without, with a
            warning naming it. Where one was used, the header records the name and hash of its file.
        drop_extras: whether tensors that no loader uses are left out, see `extras.find_extras`; a warning names them
            either way.
        overwrite: whether an existing target may be replaced.
        progress: see `Progress`.

    Returns:
        `file_bytes`, `original_bytes`, `quantized` and `kept` (counts), `warnings` and `seconds`.

    Raises:
        NFQError: the source is unfit, its UNet is incomplete, the calibration belongs to another architecture, or the
            target cannot be written. Nothing is then left behind.
    """
    started = perf_counter()
    with Original(source) as original, _SourceHash() as source_hash:
        refuse_container(original)
        refuse_same(original.files, target)
        refuse_name(target)
        if is_article_file(original.entries):
            raise UnsupportedFileError(
                f"{original.path} was written by the article's code; `nfq import-article` converts it"
            )
        metadata, extra, warnings = split_metadata(original.metadata)
        entries, about_extras = split_extras(original.entries, drop_extras)
        warnings += about_extras + _about_unet(original, entries)
        dropped = recorded_extras(drop_extras, original.entries)
        total = sum(entry.nbytes for entry in entries.values())

        def jobs() -> Iterator[tuple[str, bytearray]]:
            for file in original.files:
                source_hash.add(file.raw_header)
                for key in file.names_in_order():
                    plan = plans.get(key)
                    if plan and (plan.format or original.is_scaled(key)):
                        raw = file.read(key)
                        source_hash.add(raw)
                        yield key, raw
                    elif plan:
                        writer.write_kept(key, source_hash.over(file.read_chunks(key)))
                        report(key)
                    elif not source_hash.complete:
                        source_hash.pass_over(file.read_chunks(key))
            source_hash.complete = True

        def work(job: tuple[str, bytearray]) -> tuple[str, list[bytes] | None, bytearray | memoryview, str]:
            key, raw = job
            plan, entry = plans[key], original.entries[key]
            stored = tensor_from_bytes(raw, original.stored_dtype(key), entry.shape)
            weight, reason = original.dequantize(key, stored), ""
            if weight.dtype.itemsize == 1:
                weight = weight.to(TORCH_DTYPES[plan.dtype])
            if plan.format:
                try:
                    statistics = inputs[key].arguments() if key in inputs else {}
                    packed = quantize(
                        weight, format=plan.format.id, effort=settings.effort, device=device, **statistics
                    )
                    return key, encode(packed.data.cpu(), plan.format.sections(weight.numel())), raw, ""
                except CannotQuantizeError as error:
                    reason = str(error)
            return key, None, tensor_bytes(weight.to(TORCH_DTYPES[plan.dtype])), reason

        def report(key: str) -> None:
            nonlocal done
            done += original.entries[key].nbytes
            progress(done, total, key)

        measured = measured_sensitivities(entries, settings, calibration)
        size = SizeSearch(settings.target_bytes)
        while True:
            done, unfit = 0, []
            info, plans = plan_tensors(entries, settings, measured, size.packed_bytes)
            inputs, uncalibrated = calibration.for_plans(info, plans) if calibration else ({}, [])
            recorded = settings.as_dict() | (calibration.as_dict() if inputs or measured else {}) | dropped
            made_from = Source(source_name(original.path), original.file_bytes, NO_SHA256, metadata)
            facts = facts_about(info, recorded, made_from)
            with ContainerWriter(target, plans, facts, extra=extra, overwrite=overwrite) as writer:
                for key, frames, raw, reason in ordered_map(
                    work, jobs(), size=lambda job: len(job[1]), threads=threads_for(device)
                ):
                    if frames is None:
                        unfit += [f"tensor {key!r} is kept as it is: {reason}"] if reason else []
                        writer.write_kept(key, [raw])
                    else:
                        writer.write_quantized(key, frames)
                    report(key)
                if not size.accepts(writer.file_bytes, plans):
                    continue
                facts = replace(facts, source=replace(facts.source, sha256=source_hash.hexdigest()))
                original.refuse_changed()
                file_bytes = writer.finish(facts)
                break
        warnings += uncalibrated + unfit + size.warnings
    return conversion_result(source, facts, plans, writer, file_bytes, warnings, started)


def conversion_result(
    source: str | os.PathLike,
    facts: Facts,
    plans: dict[str, Plan],
    writer: ContainerWriter,
    file_bytes: int,
    warnings: list[str],
    started: float,
) -> dict:
    """Log a conversion's warnings; returns what `quantize_file` does. `started` is a `perf_counter` reading."""
    warnings = list(map(printable, warnings))
    for warning in warnings:
        log.warning("%s: %s", source, warning)
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
        refuse_same([file], target)
        refuse_name(target, PLAIN_SUFFIX)
        refuse_beyond_memory(file, max(map(file.dense_bytes, file.keys()), default=0))
        outputs = {key: (file.entries[key].dtype, file.entries[key].shape) for key in file.kept}
        for key, quantized in file.quantized.items():
            outputs[key] = (DTYPE_NAMES[dtype] if dtype else quantized.dtype, quantized.shape)
        entries = aligned_entries(outputs)
        total = sum(entry.nbytes for entry in entries.values())
        page = {name: file.metadata[name] for name in PAGE_METADATA if name in file.metadata}
        # The container's mark would make of the result something that no program reads.
        metadata = {name: text for name, text in file.facts.source.metadata.items() if name != FACTS_KEY}
        header = header_bytes(entries, {"format": "pt", **metadata, **page})

        def work(key: str) -> tuple[str, memoryview]:
            if key in file.kept:
                return key, file.load_kept(key)
            tensor = file.load(key)
            return key, tensor_bytes(tensor.dequantize(dtype or tensor.dtype))

        with AtomicFile(target, overwrite) as out:
            out.write_at(0, header)
            done = 0
            for key, data in ordered_map(work, entries, size=lambda name: entries[name].nbytes):
                out.write_at(len(header) + entries[key].start, data)
                done += entries[key].nbytes
                progress(done, total, key)
            out.commit()
    return {
        "file_bytes": len(header) + total,
        "tensors": len(entries),
        "seconds": round(perf_counter() - started, 3),
    }


def refuse_container(file: SafetensorsFile | Original) -> None:
    """NFQError when a source is itself a container."""
    if FACTS_KEY in file.metadata:
        raise NFQError(f"{file.path} is quantised already; `nfq dequantize` turns it back first")


def refuse_same(sources: Iterable[SafetensorsFile], target: str | os.PathLike) -> None:
    """NFQError when a target is one of its own sources, which overwriting would lose."""
    if os.path.exists(target) and any(is_same_file(source.path, target) for source in sources):
        raise NFQError(f"{target} is the source itself; name another target")


def _about_unet(original: Original, entries: dict[str, Entry]) -> list[str]:
    """Warnings about the UNet of a model, of which `entries` are converted; CorruptFileError when it is incomplete."""
    shapes = {key: entry.shape for key, entry in entries.items()}
    info = detect(shapes)
    lost = missing_tensors_message(info, shapes)
    if lost:
        raise CorruptFileError(f"{original.path} is incomplete: {lost}; fetch the file, or make the merge, again")
    return unet_warnings(info, shapes)


def split_metadata(metadata: dict[str, str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What becomes of a source's metadata.

    Returns:
        What `Source.metadata` records, what stands in the container's own metadata (PAGE_METADATA), and a warning for
        each of the longest texts where all of them are too long for the header: those are left out.
    """
    sizes = {name: _stored_bytes(name) + _stored_bytes(text) for name, text in metadata.items()}
    kept = dict(sorted(metadata.items(), key=lambda item: sizes[item[0]]))
    warnings = []
    total, left_out = sum(sizes.values()), 0
    while total > MAX_METADATA_BYTES:
        name, text = kept.popitem()
        total -= sizes[name]
        left_out += 1
        if left_out <= MAX_METADATA_WARNINGS:
            warnings.append(f"metadata {name!r} is left out: {len(text):,} characters are too many for the header")
    if left_out > MAX_METADATA_WARNINGS:
        warnings.append(f"{left_out - MAX_METADATA_WARNINGS:,} more entries of the metadata are left out")
    page = {name: kept.pop(name) for name in PAGE_METADATA if name in kept}
    return {name: metadata[name] for name in metadata if name in kept}, page, warnings


def _stored_bytes(text: str) -> int:
    """Bytes that a text takes in the header, where it stands in JSON within JSON."""
    return len(json.dumps(json.dumps(text, ensure_ascii=False), ensure_ascii=False).encode())


class _SourceHash:
    """SHA-256 of a whole source, taken on a thread of its own while the file is read in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future, int]] = deque()
        self.complete = False
        """Whether everything was taken in, so that what is read once more does not count; set by the one who reads."""

    def __enter__(self) -> _SourceHash:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, data: bytes | bytearray) -> None:
        """Take in bytes that nobody changes any more; waits when too many are not hashed yet."""
        if self.complete:
            return
        self._waiting.append((self._pool.submit(self._hash.update, data), len(data)))
        while sum(size for _, size in self._waiting) > IN_FLIGHT_BYTES:
            self._waiting.popleft()[0].result()

    def over(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """Take in pieces that are valid for a moment, and pass them on."""
        for piece in pieces:
            if not self.complete:
                self._pool.submit(self._hash.update, piece).result()
            yield piece

    def pass_over(self, pieces: Iterator[memoryview]) -> None:
        """Take in pieces that nothing else is done with."""
        for _ in self.over(pieces):
            pass

    def hexdigest(self) -> str:
        """The digest of all that was taken in."""
        return self._pool.submit(self._hash.hexdigest).result()
