"""Calibration: statistics of the inputs of a model's layers, which steer rounding errors to where they matter least.

A calibration is stored as one safetensors file, which fine-tunes of one architecture can share in any key layout.
Layers that read the same tensor (q, k and v; k and v of every cross-attention) share one entry. For SDXL a file takes
3.3 MB without Hessians, and with them 71 MB at rank 32, 143 MB at rank 64 and 286 MB at rank 128. Full Hessians would
take 12 GB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import CorruptFileError, NFQError, UnsupportedFileError
from ..files.atomic import AtomicFile
from ..files.container import UNRECORDED, Source, source_name
from ..files.safetensors_io import DTYPE_NAMES, Entry, SafetensorsFile, aligned_entries, header_bytes, tensor_bytes
from ..files.untrusted import is_count, is_number, parse_error_message, parse_json
from ..files.writer import Plan
from ..fitting.feedback import SecondMoment, expected_gain
from ..models.sensitivities import known_by_layer
from ..models.unet import UNKNOWN, UNetInfo, detect, is_unet_key, known_ldm_names
from ..planning.settings import Formats, Settings

CALIBRATION_KEY = "nfq_calibration"
"""The metadata key that marks a safetensors file as a calibration."""

CALIBRATION_SUFFIX = ".calibration.safetensors"
"""Ending of the names of the calibrations that nodes list."""

CALIBRATION_VERSION = 1

MIN_ROWS = 32
"""Fewest inputs of a layer (tokens or pixels) for its statistics to be used."""

MAX_IMPORTANCE = 1e30
"""Largest importance of a channel. fp16 activations reach 4.3e9; beyond 1e30, products of two roots may overflow."""

MAX_CORRELATION = 1.01
"""1, plus what rounding to fp16 may add."""

MIN_MATCHING = 0.5
"""Smallest share of a model's quantised weights that a calibration of the same architecture fits."""


@dataclass(frozen=True)
class LayerInputs:
    """Statistics of one tensor that one or more layers read.

    Args:
        importance: E[x²] of each input channel, fp32, shape (channels,).
        rows: number of inputs seen, tokens or pixels.
        correlation: correlation of the flattened weight's columns, fp16: the whole matrix (columns, columns), or a
            factor (columns, rank) whose product with its transpose gives it except for the diagonal, or None.
    """

    importance: torch.Tensor
    rows: int
    correlation: torch.Tensor | None = None

    def fault(self) -> str:
        """Why the statistics cannot be used; empty if they can."""
        if not torch.isfinite(self.importance).all() or (self.importance < 0).any():
            return "its importance holds NaN, Inf or negative numbers"
        if self.importance.amax() > MAX_IMPORTANCE:
            return f"its importance holds numbers beyond {MAX_IMPORTANCE:g}"
        if not self.importance.any():
            return "its inputs were all zero"
        if self.correlation is not None and not torch.isfinite(self.correlation).all():
            return "its correlation holds NaN or Inf"
        if self.correlation is not None and self.correlation.abs().amax() > MAX_CORRELATION:
            return "its correlation holds numbers beyond 1"
        return f"only {self.rows} inputs were seen, {MIN_ROWS} are needed" if self.rows < MIN_ROWS else ""

    def second_moment(self) -> SecondMoment | None:
        """E[x xᵀ] of the flattened weight's columns, for error feedback; None if it was not collected."""
        if self.correlation is None:
            return None
        return SecondMoment(self.importance.repeat_interleave(self.taps), self.correlation)

    @cached_property
    def feedback_gain(self) -> float | None:
        """See `feedback.expected_gain`; None if no Hessian was collected."""
        moment = self.second_moment()
        return None if moment is None else expected_gain(moment)

    def arguments(self) -> dict[str, Any]:
        """These statistics as keyword arguments of `quantize`."""
        return {"importance": self.importance, "hessian": self.second_moment()}

    @property
    def taps(self) -> int:
        """Columns of the flattened weight per input channel: 1 for Linear, the kernel's size for a convolution."""
        return 1 if self.correlation is None else len(self.correlation) // len(self.importance)


@dataclass(frozen=True)
class Calibration:
    """Statistics of the inputs of a model's layers; weight names are in the LDM layout for UNets of the SDXL family.

    Args:
        inputs: statistics by weight name; layers that read the same tensor share one object.
        architecture: name of the UNet's architecture, or `unet.UNKNOWN`.
        prompts: number of prompts sampled; None if unknown.
        steps: number of steps per prompt; None if unknown.
        faults: why the statistics of a weight cannot be used, by weight name.
        source: the file that the calibration was read from.
        sensitivities: sensitivities by weight name, see `allocation.allocate`; empty if they were not measured.
    """

    inputs: Mapping[str, LayerInputs]
    architecture: str = UNKNOWN
    prompts: int | None = None
    steps: int | None = None
    faults: Mapping[str, str] = field(default_factory=dict)
    source: Source = UNRECORDED
    sensitivities: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        sampled = "" if self.prompts is None else f", {self.prompts} prompts"
        return f"Calibration({self.architecture}, {len(self.inputs)} weights{sampled})"

    def as_dict(self) -> dict[str, str]:
        """Name and hash of the calibration, as the header of a file quantised with it records them."""
        return {"calibration": self.source.name, "calibration_sha256": self.source.sha256}

    def changes_result(self, settings: Settings) -> bool:
        """Whether this calibration changes the result."""
        if any(inputs.correlation is not None for inputs in self.inputs.values()):
            return True
        choice = settings.choice
        if isinstance(choice, Formats):
            return not (choice.linear.window and choice.convolution.window)
        return bool(self.sensitivities)

    def for_weights(
        self, info: UNetInfo | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, LayerInputs], list[str]]:
        """Statistics for the weights of one model.

        Args:
            info: the UNet that was detected in the model; None for a plain state dict.
            shapes: shapes of the weights to quantise, by the model's key.

        Returns:
            Statistics by the model's key, and a warning for each weight without usable ones.

        Raises:
            NFQError: the calibration belongs to another architecture.
        """
        usable, warnings, matching = {}, [], 0
        for key, name in self._names(info, shapes).items():
            shape = shapes[key]
            reason = self.faults.get(name) or self._mismatch(name, shape)
            if reason:
                warnings.append(f"tensor {key!r} is quantised without calibration: {reason}")
            else:
                usable[key] = self.inputs[name]
            matching += not reason or name in self.faults
        if matching < MIN_MATCHING * len(shapes):
            raise NFQError(
                f"the calibration belongs to another model: it fits {len(usable):,} of {len(shapes):,} weights; "
                f"{warnings[0]}"
            )
        if usable and self.prompts == 1:
            warnings.append("the calibration saw only one prompt; sample several that differ")
        return usable, warnings

    def sensitivities_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Measured sensitivities of one model's weights by the model's key, for `allocation.allocate`.

        Args:
            shapes: shapes of all tensors of the model, by key.

        Raises:
            NFQError: the calibration belongs to another architecture.
        """
        names = self._names(detect(shapes), shapes)
        return {key: self.sensitivities[name] for key, name in names.items() if name in self.sensitivities}

    def _names(self, info: UNetInfo | None, keys: Iterable[str]) -> dict[str, str]:
        """Weight name in this calibration for each key of a model; NFQError if the architectures differ."""
        architecture = info.name if info else UNKNOWN
        if UNKNOWN not in (architecture, self.architecture) and architecture != self.architecture:
            raise NFQError(f"the calibration was made with {self.architecture}, this model is {architecture}")
        renamed = known_ldm_names(info, keys)
        return {key: renamed.get(key, key) for key in keys}

    def _mismatch(self, name: str, shape: tuple[int, ...]) -> str:
        """Why the statistics do not fit a weight; empty if they do."""
        if name not in self.inputs:
            return "the calibration lacks it"
        inputs = self.inputs[name]
        if len(inputs.importance) != shape[1]:
            return f"the calibration has {len(inputs.importance):,} input channels, the weight {shape[1]:,}"
        columns = torch.Size(shape[1:]).numel()
        if inputs.correlation is not None and len(inputs.correlation) != columns:
            return f"the calibration has {len(inputs.correlation):,} columns, the weight {columns:,}"
        return ""

    def for_plans(self, info: UNetInfo | None, plans: Mapping[str, Plan]) -> tuple[dict[str, LayerInputs], list[str]]:
        """`for_weights` for the UNet's tensors that `plans` quantise, without those that need Hessians but have none.

        If formats were chosen by size, a warning names the weights without a measured sensitivity, unless none has one
        and SDXL's apply layer by layer.
        """
        quantized = {key: plan for key, plan in plans.items() if plan.format and (not info or is_unet_key(info, key))}
        usable, warnings = self.for_weights(info, {key: plan.shape for key, plan in quantized.items()})
        without = [key for key, inputs in usable.items() if inputs.correlation is None]
        unused = {key for key in without if quantized[key].format.window or quantized[key].sensitivity is not None}
        if unused:
            usable = {key: inputs for key, inputs in usable.items() if key not in unused}
            warnings.append(
                f"the calibration has no Hessians, so it has no effect on {len(unused):,} weights in trellis formats "
                "or in formats chosen by size; collect it with hessians=True"
            )
        sized = [key for key, plan in quantized.items() if plan.sensitivity is not None]
        names = self._names(info, sized)
        missing = [key for key in sized if names[key] not in self.sensitivities]
        nothing_measured = len(missing) == len(sized)
        if missing and not (nothing_measured and known_by_layer(info)):
            which = "" if nothing_measured else f" for {len(missing):,} weights, such as {missing[0]!r}"
            warnings.append(f"the calibration has no sensitivities{which}; they are estimated from SDXL's")
        return usable, warnings

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> int:
        """Write one safetensors file, completely or not at all; returns its size in bytes.

        Raises:
            NFQError: the target exists or cannot be written.
        """
        distinct = {id(inputs): inputs for inputs in self.inputs.values()}
        number = {identity: index for index, identity in enumerate(distinct)}
        tensors: dict[str, torch.Tensor] = {}
        for index, inputs in enumerate(distinct.values()):
            tensors[f"importance.{index}"] = inputs.importance.float()
            if inputs.correlation is not None:
                tensors[f"correlation.{index}"] = inputs.correlation.half()
        facts = {
            "version": CALIBRATION_VERSION,
            "architecture": self.architecture,
            "prompts": self.prompts,
            "steps": self.steps,
            "rows": [inputs.rows for inputs in distinct.values()],
            "weights": {name: number[id(inputs)] for name, inputs in self.inputs.items()},
            **({"sensitivities": dict(self.sensitivities)} if self.sensitivities else {}),
        }
        entries = aligned_entries({name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
        header = header_bytes(entries, {CALIBRATION_KEY: json.dumps(facts), "format": "pt"})
        with AtomicFile(path, overwrite) as file:
            file.write_at(0, header)
            for name, entry in entries.items():
                file.write_at(len(header) + entry.start, tensor_bytes(tensors[name]))
            file.commit()
        return len(header) + sum(entry.nbytes for entry in entries.values())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read a calibration; unusable statistics, see `LayerInputs.fault`, become `faults`.

        Raises:
            NFQError: the file is missing, damaged, not a calibration, or from a newer version.
        """
        with SafetensorsFile(path) as file:
            if CALIBRATION_KEY not in file.metadata:
                raise UnsupportedFileError(f"{file.path} is not a calibration; collect one with `nfq_core.collect`")
            sha256 = file.sha256()
            try:
                facts = parse_json(file.metadata[CALIBRATION_KEY])
                if is_count(facts["version"]) and facts["version"] > CALIBRATION_VERSION:
                    raise UnsupportedFileError(
                        f"{file.path} is a calibration of version {facts['version']}, this code reads "
                        f"{CALIBRATION_VERSION}; update the plugin"
                    )
                _check_facts(facts, file.entries)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CorruptFileError(
                    f"{file.path}: its facts are damaged ({parse_error_message(error)}); fetch it again"
                ) from None
            loaded = [
                LayerInputs(
                    file.tensor(f"importance.{index}"),
                    rows,
                    file.tensor(f"correlation.{index}") if f"correlation.{index}" in file.entries else None,
                )
                for index, rows in enumerate(facts["rows"])
            ]
            source = Source(source_name(file.path), file.file_bytes, sha256)
        faults = [inputs.fault() for inputs in loaded]
        return cls(
            {name: loaded[index] for name, index in facts["weights"].items() if not faults[index]},
            facts["architecture"],
            facts["prompts"],
            facts["steps"],
            {name: faults[index] for name, index in facts["weights"].items() if faults[index]},
            source,
            facts.get("sensitivities", {}),
        )


def measured_sensitivities(
    entries: Mapping[str, Entry], settings: Settings, calibration: Calibration | None
) -> dict[str, float] | None:
    """Sensitivities from a calibration, for `plan_tensors`; None unless the settings choose formats by size.

    Raises:
        NFQError: the calibration belongs to another architecture.
    """
    if calibration is None or isinstance(settings.choice, Formats):
        return None
    return calibration.sensitivities_of({key: entry.shape for key, entry in entries.items()})


def recorded_settings(settings: Settings, calibration: Calibration | None) -> dict[str, Any]:
    """The settings that a file's header will record, as far as they are known before a model is read."""
    if calibration is None or not calibration.changes_result(settings):
        return settings.as_dict()
    return settings.as_dict() | calibration.as_dict()


def _check_facts(facts: Mapping, entries: Mapping[str, Entry]) -> None:
    """Raise ValueError, KeyError or TypeError if a file's facts do not describe its tensors."""
    counts = [facts["version"], *facts["rows"], *facts["weights"].values()]
    counts += [facts[name] for name in ("prompts", "steps") if facts[name] is not None]
    if not all(map(is_count, counts)) or not isinstance(facts["architecture"], str):
        raise ValueError("a count or name is invalid")
    if any(index >= len(facts["rows"]) for index in facts["weights"].values()):
        raise ValueError("a weight's statistics are missing")
    for name, value in facts.get("sensitivities", {}).items():
        if name not in facts["weights"]:
            raise ValueError(f"there is a sensitivity of {name!r}, which has no statistics")
        if not is_number(value) or value < 0:
            raise ValueError(f"the sensitivity of {name!r} must be a number that is not negative")
    for index in range(len(facts["rows"])):
        importance = entries[f"importance.{index}"]
        if importance.dtype != "F32" or len(importance.shape) != 1 or not importance.shape[0]:
            raise ValueError(f"importance.{index} must be 1-D F32, not empty")
        correlation = entries.get(f"correlation.{index}")
        if correlation is None:
            continue
        fits = len(correlation.shape) == 2 and correlation.shape[0] and not correlation.shape[0] % importance.shape[0]
        if correlation.dtype != "F16" or not fits or not 0 < correlation.shape[1] <= correlation.shape[0]:
            raise ValueError(f"correlation.{index} must be 2-D F16, its rows a multiple of the input channels")
