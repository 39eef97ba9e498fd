"""Converting files: quantise and dequantise. Both stream; neither holds a whole model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from ..calibration.expectation import expectation
from ..calibration.statistics import Calibration, LayerInputs, measured_sensitivities
from ..errors import CannotQuantizeError, printable
from ..files.atomic import AtomicFile
from ..files.container import FACTS_KEY, NO_SHA256, Facts, NFQFile, Source, source_name
from ..files.original import Original
from ..files.safetensors_io import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    Entry,
    aligned_entries,
    header_bytes,
    tensor_bytes,
    tensor_from_bytes,
)
from ..files.source_hash import SourceHash
from ..files.writer import ContainerWriter, Plan
from ..fitting.quantizer import quantize
from ..models.unet import UNetInfo
from ..packed.codec import encode
from ..parallel import Progress, no_progress, ordered_map, threads_for
from ..planning.allocation import SizeSearch
from ..planning.facts import facts_about
from ..planning.policy import estimate_warnings, plan_tensors, recorded_text_encoders
from ..planning.settings import FileSize, Settings
from .extras import recorded_extras, split_extras
from .memory import refuse_beyond_memory
from .metadata import PAGE_METADATA, split_metadata
from .sources import about_model, refuse_same, refuse_unconvertible
from .targets import PLAIN_SUFFIX, container_target, dense_target, refuse_name

log = logging.getLogger("nfq")


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike | None = None,
    settings: Settings | None = None,
    *,
    preset: str | None = None,
    device: str | None = None,
    calibration: Calibration | None = None,
    drop_extras: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Convert a safetensors UNet, checkpoint, text encoder or state dict to `.nfq.safetensors`.

    fp8 and int8 weights are dequantised first (see `prequantized`). A tensor that contains NaN, Inf or magnitudes
    beyond fp16 is kept, with a warning that names it.

    Args:
        source: the file to convert; for a sharded model its index or folder.
        target: the file to write, or a folder for it; by default next to the source, named after it and the settings.
        settings: a size or formats, and effort, see `Settings.of`; by default the preset "balanced".
        preset: a size instead of settings, one of `settings.PRESETS`; ValueError if both are given.
        device: device to quantise on, such as "cuda"; by default the CPU.
        calibration: statistics of the layers' inputs. A weight without statistics is quantised without them, with a
            warning that names it. If it was used, the header records the name and hash of its file.
        drop_extras: omit tensors that no loader uses, see `extras.find_extras`; a warning names them in any case.
        overwrite: replace an existing target.
        progress: see `Progress`.

    Returns:
        `target`, `architecture`, `file_bytes`, `original_bytes`, `quantized` and `kept` (counts), `expected` (see
        `expectation`), `warnings` and `seconds`.

    Raises:
        NFQError: the source cannot be converted, its UNet is incomplete, the calibration belongs to another
            architecture, or the target cannot be written. No file is left behind then.
    """
    started = perf_counter()
    settings = Settings.given(settings, preset)
    target = container_target(target, source, settings)
    with Original(source) as original, SourceHash() as source_hash:
        refuse_unconvertible(original, target)
        metadata, extra, warnings = split_metadata(original.metadata)
        entries, about_extras = split_extras(original.entries, drop_extras)
        warnings += about_extras + about_model(original, entries)
        made_from = Source(source_name(original.path), original.file_bytes, NO_SHA256, metadata)
        conversion = _Conversion(original, entries, settings, source_hash, device, calibration, progress)
        choice = settings.choice
        size = SizeSearch(choice.nbytes if isinstance(choice, FileSize) else None, settings.effort)
        while True:
            info, plans = conversion.plan(size.packed_bytes)
            recorded = conversion.recorded_settings() | recorded_extras(drop_extras, original.entries)
            expected = expectation(entries, settings, info, plans, calibration, size.packed_bytes)
            facts = facts_about(info, plans, recorded, made_from, expected)
            with ContainerWriter(target, plans, facts, extra=extra, overwrite=overwrite) as writer:
                conversion.write(writer)
                if not size.accepts(writer.file_bytes, plans):
                    continue
                facts = replace(facts, source=replace(made_from, sha256=source_hash.hexdigest()))
                original.refuse_changed()
                file_bytes = writer.finish(facts)
                break
        warnings += conversion.warnings + size.warnings
    return conversion_result(source, facts, plans, writer, file_bytes, warnings, started)


class _Conversion:
    """Quantises one open source. Call `plan`, then `write`, as often as the search for a file size needs.

    Args:
        original: the source, open.
        entries: the tensors of the source that are converted.
        settings: a size or formats, and effort.
        source_hash: hashes the source during the first pass.
        device: where to quantise; None: on the CPU.
        calibration: statistics of the layers' inputs, if any.
        progress: see `parallel.Progress`.
    """

    def __init__(
        self,
        original: Original,
        entries: dict[str, Entry],
        settings: Settings,
        source_hash: SourceHash,
        device: str | None,
        calibration: Calibration | None,
        progress: Progress,
    ) -> None:
        self._original = original
        self._entries = entries
        self._settings = settings
        self._hash = source_hash
        self._device = device
        self._calibration = calibration
        self._progress = progress
        self._total = sum(entry.nbytes for entry in entries.values())
        self._sensitivities = measured_sensitivities(entries, settings, calibration)
        self._plans: dict[str, Plan] = {}
        self._inputs: dict[str, LayerInputs] = {}
        self._estimated: list[str] = []
        self._uncalibrated: list[str] = []
        self._unfit: list[str] = []
        self._done = 0

    @property
    def warnings(self) -> list[str]:
        """Of the last pass: estimated sensitivities, weights without calibration, tensors kept unexpectedly."""
        return self._estimated + self._uncalibrated + self._unfit

    def plan(self, packed_bytes: int | None) -> tuple[UNetInfo | None, dict[str, Plan]]:
        """Choose the formats of the next pass; see `policy.plan_tensors`."""
        info, self._plans = plan_tensors(self._entries, self._settings, self._sensitivities, packed_bytes)
        self._estimated = estimate_warnings(info, self._plans, self._sensitivities)
        if self._calibration:
            self._inputs, self._uncalibrated = self._calibration.for_plans(info, self._plans)
        return info, self._plans

    def recorded_settings(self) -> dict[str, Any]:
        """The settings for the header, with those of text encoders if there are some, and the calibration if used."""
        used = self._inputs or self._sensitivities
        recorded = self._settings.as_dict() | recorded_text_encoders(self._settings, self._entries)
        return recorded | (self._calibration.as_dict() if used else {})

    def write(self, writer: ContainerWriter) -> None:
        """One pass: read the source in order, quantise on several threads, write in order."""
        self._done, self._unfit = 0, []
        jobs = self._read(writer)
        threads = threads_for(self._device)
        for key, frames, raw, reason in ordered_map(
            self._quantize, jobs, size=lambda job: len(job[1]), threads=threads
        ):
            if frames is None:
                self._unfit += [f"tensor {key!r} is kept as it is: {reason}"] if reason else []
                writer.write_kept(key, [raw])
            else:
                writer.write_quantized(key, frames)
            self._report(key)

    def _read(self, writer: ContainerWriter) -> Iterator[tuple[str, bytearray]]:
        """Yield name and bytes of each tensor to change; write the others at once."""
        for file in self._original.files:
            self._hash.add(file.raw_header)
            for key in file.names_in_order():
                plan = self._plans.get(key)
                if plan and (plan.format or self._original.is_scaled(key)):
                    raw = file.read(key)
                    self._hash.add(raw)
                    yield key, raw
                elif plan:
                    writer.write_kept(key, self._hash.over(file.read_chunks(key)))
                    self._report(key)
                elif not self._hash.complete:
                    self._hash.consume(file.read_chunks(key))
        self._hash.complete = True

    def _quantize(self, job: tuple[str, bytearray]) -> tuple[str, list[bytes] | None, bytearray | memoryview, str]:
        """Name, frames, source bytes ""; of a kept tensor name, None, its bytes, and why if that is surprising."""
        key, raw = job
        plan, entry = self._plans[key], self._original.entries[key]
        stored = tensor_from_bytes(raw, self._original.stored_dtype(key), entry.shape)
        weight, reason = self._original.dequantize(key, stored), ""
        if weight.dtype.itemsize == 1:
            weight = weight.to(TORCH_DTYPES[plan.dtype])
        if plan.format:
            try:
                statistics = self._inputs[key].arguments() if key in self._inputs else {}
                packed = quantize(
                    weight, format=plan.format.id, effort=self._settings.effort, device=self._device, **statistics
                )
                return key, encode(packed.data.cpu(), packed.sections), raw, ""
            except CannotQuantizeError as error:
                reason = str(error)
        return key, None, tensor_bytes(weight.to(TORCH_DTYPES[plan.dtype])), reason

    def _report(self, key: str) -> None:
        self._done += self._original.entries[key].nbytes
        self._progress(self._done, self._total, key)


def conversion_result(
    source: str | os.PathLike,
    facts: Facts,
    plans: dict[str, Plan],
    writer: ContainerWriter,
    file_bytes: int,
    warnings: list[str],
    started: float,
) -> dict:
    """Log a conversion's warnings, and return the result of `quantize_file`. `started` is a `perf_counter` reading."""
    for warning in (warnings := list(map(printable, warnings))):
        log.warning("%s: %s", source, warning)
    return {
        "target": os.fspath(writer.path),
        "architecture": facts.architecture,
        "file_bytes": file_bytes,
        "original_bytes": facts.source.bytes,
        "quantized": len(writer.quantized_keys),
        "kept": len(plans) - len(writer.quantized_keys),
        "expected": facts.expected,
        "warnings": warnings,
        "seconds": round(perf_counter() - started, 3),
    }


def dequantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """Write a container's tensors as plain safetensors under their original names.

    Args:
        source: the `.nfq.safetensors` file.
        target: the file to write, or a folder for it; by default next to the source, named after it and the dtype.
        dtype: dtype of dequantised tensors; by default the dtype of each before it was quantised. Kept tensors do not
            change.
        overwrite: replace an existing target.
        progress: see `Progress`.

    Returns:
        `target`, `file_bytes`, `tensors` and `seconds`.

    Raises:
        NFQError: the source is not a valid container, or the target cannot be written. No file is left behind then.
    """
    started = perf_counter()
    target = dense_target(target, source, dtype)
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
        # A file with the container's own entry would be taken for a container.
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
        "target": os.fspath(target),
        "file_bytes": len(header) + total,
        "tensors": len(entries),
        "seconds": round(perf_counter() - started, 3),
    }
