"""Collect a calibration while a model is sampled, with forward hooks on its Linear and Conv2d layers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional

from ..errors import NFQError
from ..files.safetensors_io import DTYPE_NAMES, describe
from ..fitting.feedback import SecondMoment, low_rank
from ..models.unet import UNKNOWN, detect, known_ldm_names
from ..planning.policy import plan_tensors
from ..planning.settings import DEFAULTS
from .sensitivity import PASSES, SensitivityProbe
from .statistics import Calibration, LayerInputs

RANK = 64
"""Rank of the factors that approximate Hessians. At 7 levels this costs the demo model's layers 0.35 dB of output."""

PATCHES_PER_CALL = 2048
"""Most positions of a convolution's input that one call adds to its Hessian; all positions add to its importance."""


@contextmanager
def collect(
    model: nn.Module,
    names: Mapping[str, str] | None = None,
    *,
    hessians: bool = False,
    rank: int = RANK,
    sensitivities: bool = False,
    passes: int = PASSES,
) -> Iterator[Collector]:
    """Collect statistics of the inputs of a model's Linear and Conv2d layers while the `with` block runs the model.

    ::

        with collect(pipeline.unet, hessians=True, sensitivities=True) as collected:
            for prompt in prompts:
                pipeline(prompt, num_inference_steps=20)
        collected.calibration(prompts=len(prompts), steps=20).save("sdxl.calibration.safetensors")

    Both halves of a CFG batch count. The model may be on any device and have any floating dtype.

    Args:
        model: the UNet itself, not the pipeline around it.
        names: weight names by module name; by default the module's name with `.weight`, in the LDM layout if the model
            is a UNet of the SDXL family.
        hessians: whether to collect second moments between columns, which error feedback needs.
        rank: rank of the factors that approximate Hessians; Hessians of up to twice as many columns are kept whole.
        sensitivities: whether to measure how much noise in each weight to be quantised disturbs the model's output,
            for choosing formats by size. The model then takes ``1 + passes`` times as long. It must give the same
            output when called again. Count steps outside it: hooks and wrappers inside it run on every extra pass too.
        passes: number of layers tried per call of the model, in turn. Sample long enough to try each a few times.
    """
    collector = Collector(model, names, hessians=hessians, rank=rank, passes=passes if sensitivities else 0)
    with collector.watching():
        yield collector


class Collector:
    """Collects statistics over one or more `watching` blocks; `calibration` returns the result.

    Args:
        model: see `collect`, also for `names`, `hessians` and `rank`.
        passes: number of layers tried for their sensitivity per call of the model; 0 measures none.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str] | None = None,
        *,
        hessians: bool = False,
        rank: int = RANK,
        passes: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if passes < 0:
            raise ValueError(f"passes must not be negative, got {passes}")
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
        tensors = model.state_dict()
        info = detect({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        self._architecture = info.name if info else UNKNOWN
        if names is None:
            own = {name: f"{name}.weight" for name in layers}
            renamed = known_ldm_names(info, own.values())
            names = {name: renamed.get(key, key) for name, key in own.items()}
        self._rank = rank if hessians else 0
        self._sums: dict[str, _InputSums] = {}
        self._watched = [(module, self._hook(names[name])) for name, module in layers.items() if name in names]
        self._probe = None
        if passes:
            entries = describe({key: tensor for key, tensor in tensors.items() if tensor.dtype in DTYPE_NAMES})
            _, plans = plan_tensors(entries, DEFAULTS)
            quantized = {key for key, plan in plans.items() if plan.format}
            probed = {
                names[name]: layer for name, layer in layers.items() if name in names and f"{name}.weight" in quantized
            }
            self._probe = SensitivityProbe(model, probed, passes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model inside the `with` block and add the inputs seen to the sums."""
        hooks = [module.register_forward_pre_hook(hook) for module, hook in self._watched]
        try:
            with self._probe.watching() if self._probe else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def calibration(self, *, prompts: int | None = None, steps: int | None = None) -> Calibration:
        """The statistics collected so far.

        Args:
            prompts: number of prompts sampled, recorded in the file.
            steps: number of steps per prompt, recorded in the file.

        Raises:
            NFQError: no layer was called.
        """
        if not self._sums:
            raise NFQError("nothing was collected: sample with the model inside `with collect(model)`")
        results = {id(sums): sums.result() for sums in self._sums.values()}
        inputs = {name: results[id(sums)] for name, sums in self._sums.items()}
        measured = self._probe.result() if self._probe else {}
        sensitivities = {name: value for name, value in measured.items() if name in inputs}
        return Calibration(inputs, self._architecture, prompts, steps, sensitivities=sensitivities)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums so far, on the device that the model is on."""
        return sum(sums.nbytes for sums in {id(sums): sums for sums in self._sums.values()}.values())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if arguments and arguments[0].numel() and not (self._probe and self._probe.busy):
                self._add(name, _Geometry.of(module), arguments[0])

        return hook

    def _add(self, name: str, geometry: _Geometry, tensor: torch.Tensor) -> None:
        sums = self._sums.get(name)
        if sums is None:
            shared = (other for other in self._sums.values() if other.calls == 1 and other.saw_last(tensor, geometry))
            sums = next(shared, None) or _InputSums(name, geometry, self._rank)
        elif sums.leader != name and not sums.saw_last(tensor, geometry):
            # Both layers read the same tensors until now; the leader may be one call ahead.
            sums = sums.copy_for(name)
        self._sums[name] = sums
        if sums.leader == name:
            sums.add(tensor)


@dataclass(frozen=True)
class _Geometry:
    """How a convolution reads its input, (vertical, horizontal); all fields are empty for Linear."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> _Geometry:
        if isinstance(module, nn.Linear):
            return cls()
        padding = module.padding
        if isinstance(padding, str):
            # "same" may pad one side by a pixel more; the statistics do not depend on it.
            sides = zip(module.kernel_size, module.dilation, strict=True)
            padding = tuple(d * (k - 1) // 2 if padding == "same" else 0 for k, d in sides)
        return cls(module.kernel_size, module.stride, padding, module.dilation)


class _InputSums:
    """Sums over the inputs of one layer, the leader, shared with the layers that read the same tensors.

    A Hessian of many columns is never stored: the sketch is its product with a fixed random matrix.
    """

    def __init__(self, leader: str, geometry: _Geometry, rank: int) -> None:
        self.leader = leader
        self.geometry = geometry
        self.calls = self.rows = 0
        self._rank = rank
        self._squares = self._column_squares = self._sketch = torch.zeros(())
        self._last: Callable[[], torch.Tensor | None] = lambda: None

    def saw_last(self, tensor: torch.Tensor, geometry: _Geometry) -> bool:
        """Whether this tensor object was the last one added, read with the same geometry."""
        return self.geometry == geometry and self._last() is tensor

    def copy_for(self, leader: str) -> _InputSums:
        """A copy of the sums for a layer that reads other tensors from now on."""
        other = copy.copy(self)
        other.leader = leader
        return other

    def add(self, tensor: torch.Tensor) -> None:
        """Add the input of one call."""
        self._last = weakref.ref(tensor)
        self.calls += 1
        tensor = tensor.detach().float()
        rows = tensor.flatten(2).transpose(1, 2).flatten(0, 1) if self.geometry.kernel else tensor.flatten(0, -2)
        self.rows += len(rows)
        self._squares = self._squares + _squares(rows)
        if self._rank:
            inputs = self._patches(tensor) if self.geometry.kernel else rows
            columns = inputs.shape[1]
            self._column_squares = self._column_squares + _squares(inputs)
            whole = columns <= 2 * self._rank
            projected = inputs if whole else inputs @ _random_matrix(columns, 2 * self._rank, inputs.device)
            self._sketch = self._sketch + inputs.T @ projected

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(sums.nbytes for sums in (self._squares, self._column_squares, self._sketch))

    def result(self) -> LayerInputs:
        """The means of the sums."""
        importance = (self._squares / self.rows).float().cpu()
        if not self._rank:
            return LayerInputs(importance, self.rows)
        sketch, diagonal = self._sketch.cpu(), self._column_squares.cpu()
        if sketch.shape[0] == sketch.shape[1]:
            return LayerInputs(importance, self.rows, SecondMoment.of(sketch).correlation.half())
        matrix = _random_matrix(*sketch.shape, sketch.device)
        return LayerInputs(importance, self.rows, low_rank(sketch, matrix, diagonal, self._rank))

    def _patches(self, tensor: torch.Tensor) -> torch.Tensor:
        """Input patches that multiply a convolution's flattened weight, at random positions: (positions, columns)."""
        (rows, columns), geometry = self.geometry.kernel, self.geometry
        padded = functional.pad(tensor, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2)
        spans = [d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
        sides = [
            (size - span - 1) // step + 1
            for size, span, step in zip(padded.shape[2:], spans, geometry.stride, strict=True)
        ]
        total = len(tensor) * sides[0] * sides[1]
        chosen = torch.arange(total)
        if total > PATCHES_PER_CALL:
            generator = torch.Generator().manual_seed(self.calls)
            chosen = torch.randint(total, (PATCHES_PER_CALL,), generator=generator)
        picture, position = chosen // (sides[0] * sides[1]), chosen % (sides[0] * sides[1])
        y = position // sides[1] * geometry.stride[0] + torch.arange(rows)[:, None, None] * geometry.dilation[0]
        x = position % sides[1] * geometry.stride[1] + torch.arange(columns)[:, None] * geometry.dilation[1]
        # (rows, columns, positions, channels): advanced indexing puts its dimensions before the channels.
        patches = padded.permute(0, 2, 3, 1)[picture, y, x]
        return patches.permute(2, 3, 0, 1).flatten(1)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each column, in fp64 if the device supports it."""
    sums = rows.square().sum(dim=0)
    return sums if sums.device.type == "mps" else sums.double()


@lru_cache(maxsize=64)
def _random_matrix(columns: int, width: int, device: torch.device) -> torch.Tensor:
    """The fixed random matrix for sketches of `columns` columns: fp32 (columns, width), the same on every device."""
    return torch.randn(columns, width, generator=torch.Generator().manual_seed(columns)).to(device)
