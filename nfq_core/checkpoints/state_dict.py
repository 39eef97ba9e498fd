"""Quantise, save and load state dicts in memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import closing, nullcontext
from typing import Any

import torch

from ..calibration.statistics import Calibration, measured_sensitivities
from ..decibels import sqnr_db
from ..errors import CannotQuantizeError, NFQError
from ..files.container import UNRECORDED, NFQFile, Source
from ..files.prequantized import find_prequantized
from ..files.safetensors_io import TORCH_DTYPES, Entry, describe, tensor_bytes
from ..files.writer import ContainerWriter, Plan
from ..fitting.quantizer import quantize
from ..models.unet import detect
from ..packed.backends import backend_for
from ..packed.codec import encode
from ..packed.tensor import NFTensor
from ..packed.torch_decode import MAX_TEMPORARY_BYTES
from ..parallel import Progress, no_progress, ordered_map, threads_for
from ..planning.facts import facts_about
from ..planning.policy import estimate_warnings, plan_tensors
from ..planning.settings import Settings
from .memory import (
    check_device,
    choose_memory_mode,
    free_bytes,
    is_out_of_memory,
    needed_bytes,
    out_of_memory_message,
    refuse_beyond_memory,
)

log = logging.getLogger("nfq")

StateDict = dict[str, NFTensor | torch.Tensor]


def quantize_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    levels: int | None = None,
    *,
    conv_levels: int | None = None,
    effort: str = "fast",
    quantize_first_last: bool = False,
    format: str | None = None,
    conv_format: str | None = None,
    preset: str | None = None,
    target_bpw: float | None = None,
    text_encoders: str | None = None,
    device: torch.device | str | None = None,
    calibration: Calibration | None = None,
) -> StateDict:
    """Quantise the weights of a model in memory, by the same rules as `nfq quantize`.

    Args:
        state_dict: tensors by name, which stay unchanged; kept tensors are shared with the result. fp8 and int8 weights
            with scales are dequantised first, see `prequantized`.
        levels: levels of 2-D weights, instead of a preset: 32, 24, 16, 12 or 7.
        conv_levels: levels of weights of three and more dimensions.
        effort: see `Settings`.
        quantize_first_last: whether a UNet's first and last convolution are quantised too.
        format: the format of 2-D weights instead of `levels`, one of `formats.WRITABLE_IDS`.
        conv_format: the format of weights of more dimensions instead of `conv_levels`.
        preset: a size, one of `settings.PRESETS`; by default "balanced".
        target_bpw: most packed bits per weight, instead of a preset.
        text_encoders: see `Settings`.
        device: device to quantise on; by default the tensor's own.
        calibration: statistics of the layers' inputs; weights without any are quantised without it, and logged.

    Returns:
        The same names except for scales, in the same order: an NFTensor for each quantised weight, the same tensor for
        a kept one. Weights that cannot be quantised (NaN, Inf, beyond fp16) are kept, and logged.

    Raises:
        ValueError: a setting is not allowed.
        NFQError: safetensors lacks a tensor's dtype, or the calibration belongs to another architecture.
    """
    settings = Settings.of(
        preset=preset,
        target_bpw=target_bpw,
        levels=levels,
        conv_levels=conv_levels,
        format=format,
        conv_format=conv_format,
        effort=effort,
        quantize_first_last=quantize_first_last,
        text_encoders=text_encoders,
    )
    stored = describe(state_dict)
    found = find_prequantized(stored, (), state_dict.__getitem__, "the state dict")
    others = (tensor.device for tensor in state_dict.values() if tensor.device.type != "cpu")

    def read(key: str) -> torch.Tensor:
        scaled = found.weights.get(key)
        return scaled.dequantize(state_dict[key]).to(TORCH_DTYPES[found.dtype]) if scaled else state_dict[key]

    return quantize_tensors(
        found.dequantized_entries(stored),
        read,
        settings,
        device=device,
        calibration=calibration,
        threads=threads_for(device or next(others, None)),
    )


def quantize_tensors(
    entries: Mapping[str, Entry],
    read: Callable[[str], torch.Tensor],
    settings: Settings,
    *,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
    sqnr: dict[str, float] | None = None,
    calibration: Calibration | None = None,
    threads: int | None = None,
) -> StateDict:
    """Quantise a model whose tensors are read one at a time, so that few are in memory at once.

    Args:
        entries: dtype and shape of every tensor by name, see `describe`. They alone decide which tensors are quantised,
            and with which recorded dtype.
        read: returns a tensor by name, in any floating dtype; called from several threads.
        settings: a size or formats, and effort.
        device: device to quantise on; by default the tensor's own.
        progress: see `parallel.Progress`; an error raised in it ends the work.
        sqnr: receives the signal-to-quantisation-noise ratio in dB of each quantised weight, by name.
        calibration: see `quantize_state_dict`.
        threads: number of threads; by default `parallel.threads_for` of `device`.

    Returns:
        As `quantize_state_dict`; packed weights are on the CPU if `device` is given.
    """
    measured = measured_sensitivities(entries, settings, calibration)
    info, plans = plan_tensors(entries, settings, measured)
    inputs, warnings = calibration.for_plans(info, plans) if calibration else ({}, [])
    for warning in estimate_warnings(info, plans, measured) + warnings:
        log.warning("%s", warning)

    def work(key: str) -> tuple[NFTensor | torch.Tensor, float | None]:
        tensor, plan = read(key), plans[key].format
        if plan is None:
            return tensor, None
        if tensor.dtype.itemsize == 1:
            tensor = tensor.to(TORCH_DTYPES[plans[key].dtype])
        try:
            statistics = inputs[key].arguments() if key in inputs else {}
            packed = quantize(tensor, format=plan.id, effort=settings.effort, device=device, **statistics)
        except CannotQuantizeError as error:
            log.warning("tensor %r is kept as it is: %s", key, error)
            return tensor, None
        ratio = None
        if sqnr is not None:
            ratio = sqnr_db(tensor.to(packed.device), packed.dequantize(torch.float32))
        if device is not None:
            packed = packed.to("cpu")
        return NFTensor(packed.data, packed.format, packed.shape, TORCH_DTYPES[plans[key].dtype]), ratio

    result: StateDict = {}
    done, total = 0, sum(plan.nbytes for plan in plans.values())
    threads = threads_for(device) if threads is None else threads
    with closing(ordered_map(work, entries, size=lambda key: plans[key].nbytes, threads=threads)) as results:
        for key, (value, ratio) in zip(entries, results, strict=True):
            result[key] = value
            if sqnr is not None and ratio is not None:
                sqnr[key] = ratio
            done += plans[key].nbytes
            progress(done, total, key)
    return result


def save(
    state_dict: Mapping[str, NFTensor | torch.Tensor],
    path: str | os.PathLike,
    *,
    settings: Settings | Mapping[str, Any] | None = None,
    preset: str | None = None,
    source: Source = UNRECORDED,
    expected: Mapping[str, float] | None = None,
    workflow: Any = None,
    prompt: Any = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> int:
    """Write quantised and kept tensors as `.nfq.safetensors`; the file is written completely or not at all.

    Args:
        state_dict: tensors by their original names, on any device.
        path: the file to write.
        settings: how they were quantised, for the header.
        preset: the preset that they were quantised with, instead of settings.
        source: the file that they were quantised from, for the header.
        expected: what is expected of the model's output, for the header, see `expectation`.
        workflow: a ComfyUI workflow, as JSON-ready objects, for the header.
        prompt: a ComfyUI prompt, as JSON-ready objects, for the header.
        overwrite: whether an existing file may be replaced.
        progress: see `parallel.Progress`; an error raised in it leaves no file.

    Returns:
        Size of the file in bytes.

    Raises:
        NFQError: the target exists or cannot be written, or safetensors lacks a tensor's dtype.
        ValueError: the preset is unknown, or given next to settings.
    """
    info = detect({key: tuple(tensor.shape) for key, tensor in state_dict.items()})
    plans = {
        key: Plan(entry.dtype, entry.shape, value.format if isinstance(value, NFTensor) else None)
        for (key, entry), value in zip(describe(state_dict).items(), state_dict.values(), strict=True)
    }
    settings = settings if preset is None else Settings.given(settings, preset)
    recorded = settings.as_dict() if isinstance(settings, Settings) else settings or {}
    facts = facts_about(info, plans, recorded, source, expected)
    extra = {name: json.dumps(value) for name, value in (("workflow", workflow), ("prompt", prompt)) if value}

    def work(key: str) -> tuple[str, list[bytes]]:
        tensor = state_dict[key]
        return key, encode(tensor.data.cpu(), tensor.sections)

    done, total = 0, sum(value.nbytes for value in state_dict.values())

    def report(key: str) -> None:
        nonlocal done
        done += state_dict[key].nbytes
        progress(done, total, key)

    with ContainerWriter(path, plans, facts, extra=extra, overwrite=overwrite) as writer:
        for key, value in state_dict.items():
            if not isinstance(value, NFTensor):
                writer.write_kept(key, [tensor_bytes(value)])
                report(key)
        quantized = [key for key in state_dict if plans[key].format]
        with closing(ordered_map(work, quantized, size=lambda key: state_dict[key].nbytes)) as results:
            for key, frames in results:
                writer.write_quantized(key, frames)
                report(key)
        return writer.finish()


def load(
    path: str | os.PathLike,
    keys: Iterable[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
) -> StateDict:
    """Read an `.nfq.safetensors` file into memory; the file is not mapped.

    Args:
        path: the file.
        keys: original names of the tensors to read; by default all.
        device: device of the result.
        memory: "packed", "resident" (quantised weights are dequantised once, to their recorded dtype) or "auto"
            (resident if the device has enough free memory, see `memory.choose_memory_mode`; the choice is logged).
        progress: see `parallel.Progress`; an error raised in it ends the work.

    Returns:
        An NFTensor (resident: a tensor) for each quantised weight and a tensor for each kept one, by original name. On
        a CUDA device they are ready for work on its current stream.

    Raises:
        NFQError: the file is missing, damaged, not an NFQ file or from a newer version, or the device is missing or
            lacks memory.
        KeyError: a wanted tensor is not in the file.
        ValueError: `memory` is not one of the three.
    """
    with NFQFile(path) as file:
        return load_tensors(file, keys, device=device, memory=memory, progress=progress)


def load_tensors(
    file: NFQFile,
    keys: Iterable[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    memory: str = "packed",
    dense: Container[str] = (),
    progress: Progress = no_progress,
) -> StateDict:
    """`load` from an open file. Tensors named in `dense` are dequantised to their recorded dtype in any mode."""
    wanted = list(file.keys() if keys is None else keys)
    # The check reads a number, which torch's meta device cannot give; that device exists everywhere.
    if str(device) != "meta":
        check_device(device)
    device = _with_index(device)
    always_dense = {key for key in wanted if key in dense}
    dense_bytes, packed_bytes = needed_bytes(file, wanted)
    sizes = dense_bytes, packed_bytes + sum(file.dense_bytes(key) - file.packed_bytes(key) for key in always_dense)
    mode, reason = choose_memory_mode(memory, *sizes, free_bytes(device) if memory == "auto" else None)
    if memory == "auto":
        log.info("%s: weights are held %s on %s: %s", file.path, mode, device, reason)
    if device.type == "cpu":
        refuse_beyond_memory(file, sizes[0] if mode == "resident" else sizes[1])
    result: StateDict = {}
    try:
        _load_into(result, file, wanted, device, set(wanted) if mode == "resident" else always_dense, progress)
        return result
    except BaseException as error:
        # The traceback keeps this frame alive; free its tensors.
        result.clear()
        if not is_out_of_memory(error):
            raise
    # Raise outside `except`, so that the new error does not keep the worker threads' frames alive.
    raise NFQError(out_of_memory_message(file.path, device, mode, *sizes))


def _load_into(
    result: StateDict,
    file: NFQFile,
    wanted: list[str],
    device: torch.device,
    dense: set[str],
    progress: Progress,
) -> None:
    """Fill `result` with the wanted tensors, in order; those named in `dense` are dequantised."""
    if dense:
        # Tried once here, not by all threads at once.
        backend_for(device)
    threads = threads_for(device, MAX_TEMPORARY_BYTES)
    # A new thread has its own current stream.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work(key: str) -> NFTensor | torch.Tensor:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            tensor = file.load(key).to(device)
            return tensor.dequantize(tensor.dtype) if key in dense and isinstance(tensor, NFTensor) else tensor

    done, total = 0, sum(map(file.stored_bytes, wanted))
    with closing(ordered_map(work, wanted, size=file.stored_bytes, threads=threads)) as tensors:
        for key, tensor in zip(wanted, tensors, strict=True):
            result[key] = tensor
            done += file.stored_bytes(key)
            progress(done, total, key)


def _with_index(device: torch.device | str) -> torch.device:
    """The device; a CUDA device without a number becomes the calling thread's current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
