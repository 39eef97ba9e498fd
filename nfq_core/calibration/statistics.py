"""Calibration: what a model's layers are fed, so that weights are rounded where it is heard least.

A file of one calibration is a safetensors file; fine-tunes of the same architecture can share it, in any key layout.
Layers that read the very same tensor (q, k and v; all cross-attention's k and v) share one entry. For SDXL it takes
3.3 MB without Hessians, and with them 71 MB at rank 32, 143 MB at rank 64 and 286 MB at rank 128; whole they would
take 12 GB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CorruptFileError, NFQError, UnsupportedFileError
from ..files.atomic import AtomicFile
from ..files.container import UNRECORDED, Source, source_name
from ..files.safetensors_io import DTYPE_NAMES, Entry, SafetensorsFile, aligned_entries, header_bytes, tensor_bytes
from ..files.untrusted import is_count, is_number, parse_error_message, parse_json
from ..files.writer import Plan
from ..fitting.feedback import SecondMoment
from ..models.unet import UNKNOWN, UNetInfo, detect, known_ldm_names
from ..packed.formats import BlockFormat
from ..planning.policy import Settings

CALIBRATION_KEY = "nfq_calibration"
"""The metadata entry that makes a safetensors file a calibration."""

CALIBRATION_SUFFIX = ".calibration.safetensors"
"""What the names of calibrations end in that nodes list."""

CALIBRATION_VERSION = 1

MIN_ROWS = 32
"""Inputs of a layer, tokens or pixels, below which its statistics are not used."""

MAX_IMPORTANCE = 1e30
"""Of a channel; fp16 activations reach 4.3e9, and beyond this no product of two roots is sure to be finite."""

MAX_CORRELATION = 1.01
"""1, and what rounding to fp16 may add to it."""

MIN_MATCHING = 0.5
"""Share of a model's quantised weights that a calibration must fit, to be taken for one of its architecture."""


@dataclass(frozen=True)
class LayerInputs:
    """What the layers that read one tensor are fed.

    Args:
        importance: E[x²] of each input channel, fp32 of shape (channels,).
        rows: how many inputs were seen, tokens or pixels.
        correlation: of the columns of the flattened weight, fp16: a factor of shape (columns, rank) whose product with
            its transpose is the correlation but for the diagonal, or the whole matrix (columns, columns), or None.
    """

    importance: torch.Tensor
    rows: int
    correlation: torch.Tensor | None = None

    def fault(self) -> str:
        """What is wrong with the numbers; nothing where they are sound."""
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
        """E[x xᵀ] of the flattened weight's columns, as error feedback uses it; None where it was not collected."""
        if self.correlation is None:
            return None
        return SecondMoment(self.importance.repeat_interleave(self.taps), self.correlation)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments by which `quantize` is given these statistics."""
        return {"importance": self.importance, "hessian": self.second_moment()}

    @property
    def taps(self) -> int:
        """Columns of the flattened weight for each input channel: 1, or a convolution's kernel size."""
        return 1 if self.correlation is None else len(self.correlation) // len(self.importance)


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model's inputs by the names of its weights, in LDM's layout if it is a UNet of the family.

    Args:
        inputs: by weight name; names of layers that read the same tensor lead to the same object.
        architecture: the UNet's name, or `unet.UNKNOWN`.
        prompts: number of prompts that were sampled; None: not known.
        steps: number of steps each was sampled with; None: not known.
        faults: why the statistics of a weight cannot be used, by its name.
        source: the file it was read from.
        sensitivities: by weight name, how much noise in it disturbs the model's output, as `allocation.allocate` takes
            it; empty where that was not measured.
    """

    inputs: Mapping[str, LayerInputs]
    architecture: str = UNKNOWN
    prompts: int | None = None
    steps: int | None = None
    faults: Mapping[str, str] = field(default_factory=dict)
    source: Source = UNRECORDED
    sensitivities: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, str]:
        """What the header of a file quantised with it records among the settings."""
        return {"calibration": self.source.name, "calibration_sha256": self.source.sha256}

    def helps(self, formats: Iterable[BlockFormat], by_size: bool) -> bool:
        """Whether weights in these formats, or where a size is asked for in those chosen then, come out otherwise."""
        if by_size and self.sensitivities:
            return True
        if any(inputs.correlation is not None for inputs in self.inputs.values()):
            return True
        return not by_size and not all(fmt.window for fmt in formats)

    def for_weights(
        self, info: UNetInfo | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, LayerInputs], list[str]]:
        """The statistics for the weights of one model.

        Args:
            info: what was recognised in the model (None: a plain state dict).
            shapes: the weights to quantise, by the model's own names.

        Returns:
            Statistics by the model's names, and a warning for each weight that lacks them or cannot use them.

        Raises:
            NFQError: the calibration belongs to another architecture.
        """
        found, warnings, matching = {}, [], 0
        for key, name in self._names(info, shapes).items():
            shape = shapes[key]
            reason = self.faults.get(name) or self._misfit(name, shape)
            if reason:
                warnings.append(f"tensor {key!r} is quantised without calibration: {reason}")
            else:
                found[key] = self.inputs[name]
            matching += not reason or name in self.faults
        if matching < MIN_MATCHING * len(shapes):
            raise NFQError(
                f"the calibration belongs to another model: it fits {len(found):,} of {len(shapes):,} weights; "
                f"{warnings[0]}"
            )
        if found and self.prompts == 1:
            warnings.append("the calibration saw one prompt only; sample several, as different as those to come")
        return found, warnings

    def sensitivities_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Those measured for the weights of one model, by its own names, as `allocation.allocate` takes them.

        Args:
            shapes: shape of every tensor of the model by its name.

        Raises:
            NFQError: the calibration belongs to another architecture.
        """
        names = self._names(detect(shapes), shapes)
        return {key: self.sensitivities[name] for key, name in names.items() if name in self.sensitivities}

    def _names(self, info: UNetInfo | None, keys: Iterable[str]) -> dict[str, str]:
        """The names of a model's weights here; NFQError where it is of another architecture."""
        architecture = info.name if info else UNKNOWN
        if UNKNOWN not in (architecture, self.architecture) and architecture != self.architecture:
            raise NFQError(f"the calibration was made with {self.architecture}, this model is {architecture}")
        renamed = known_ldm_names(info, keys)
        return {key: renamed.get(key, key) for key in keys}

    def _misfit(self, name: str, shape: tuple[int, ...]) -> str:
        """Why statistics do not fit a weight; nothing where they do."""
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
        """`for_weights` of those that are to be quantised, but for what gains nothing without Hessians.

        Where formats were chosen by size, another warning tells what was chosen without a measured sensitivity.
        """
        quantized = {key: plan for key, plan in plans.items() if plan.format}
        found, warnings = self.for_weights(info, {key: plan.shape for key, plan in quantized.items()})
        without = [key for key, inputs in found.items() if inputs.correlation is None]
        idle = {key for key in without if quantized[key].format.window or quantized[key].sensitivity is not None}
        if idle:
            found = {key: inputs for key, inputs in found.items() if key not in idle}
            warnings.append(
                f"the calibration has no Hessians, so that it does not help {len(idle):,} weights in trellis formats "
                "or in formats chosen by size; collect it with hessians=True"
            )
        sized = [key for key, plan in quantized.items() if plan.sensitivity is not None]
        names = self._names(info, sized)
        missing = [key for key in sized if names[key] not in self.sensitivities]
        if missing:
            what = "none" if len(missing) == len(sized) else f"none of {len(missing):,} weights, {missing[0]!r} first"
            warnings.append(f"sensitivities: the calibration has {what}; how sensitive such layers are is estimated")
        return found, warnings

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> int:
        """Write one safetensors file, whole or not at all; returns its size in bytes.

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
        """Read a calibration; statistics that hold NaN, Inf or negative numbers become `faults`.

        Raises:
            NFQError: the file is missing or damaged, no calibration, or a newer version's.
        """
        with SafetensorsFile(path) as file:
            if CALIBRATION_KEY not in file.metadata:
                raise UnsupportedFileError(f"{file.path} is no calibration; `nfq_core.collect` makes one")
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
    """What `plan_tensors` is given of a calibration: measured sensitivities, where a size is asked for.

    Raises:
        NFQError: the calibration belongs to another architecture.
    """
    if calibration is None or not settings.has_target:
        return None
    return calibration.sensitivities_of({key: entry.shape for key, entry in entries.items()})


def recorded_settings(settings: Settings, calibration: Calibration | None) -> dict[str, Any]:
    """What the header of a file will record, as far as that is known before a model is looked at."""
    if calibration is None or not calibration.helps(settings.formats(), settings.has_target):
        return settings.as_dict()
    return settings.as_dict() | calibration.as_dict()


def _check_facts(facts: Mapping, entries: Mapping[str, Entry]) -> None:
    """ValueError, KeyError or TypeError where a file's facts do not describe its tensors."""
    counts = [facts["version"], *facts["rows"], *facts["weights"].values()]
    counts += [facts[name] for name in ("prompts", "steps") if facts[name] is not None]
    if not all(map(is_count, counts)) or not isinstance(facts["architecture"], str):
        raise ValueError("a number or name is none")
    if any(index >= len(facts["rows"]) for index in facts["weights"].values()):
        raise ValueError("a weight's statistics are missing")
    for name, value in facts.get("sensitivities", {}).items():
        if name not in facts["weights"]:
            raise ValueError(f"there is a sensitivity of {name!r}, which is no weight in it")
        if not is_number(value) or value < 0:
            raise ValueError(f"the sensitivity of {name!r} is no number from 0 up")
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
