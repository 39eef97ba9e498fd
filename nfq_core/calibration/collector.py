"""Collecting a calibration while a model is sampled: forward hooks on its Linear and Conv2d layers."""

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
from ..planning.policy import DEFAULTS, plan_tensors
from .sensitivity import PASSES, SensitivityProbe
from .statistics import Calibration, LayerInputs

RANK = 64
"""Rank of the factors that stand for Hessians: at 7 levels, outputs of the demo model's layers lose 0.35 dB by it."""

PATCHES_PER_CALL = 2048
"""Positions of a convolution's input that one call adds to its Hessian; all of them add to its importance."""


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
    """Collect what the Linear and Conv2d layers of a model are fed while it is used inside the `with`.

    ::

        with collect(pipeline.unet, hessians=True, sensitivities=True) as collected:
            for prompt in prompts:
                pipeline(prompt, num_inference_steps=20)
        collected.calibration(prompts=len(prompts), steps=20).save("sdxl.calibration.safetensors")

    Both halves of a batch for CFG count. The model may be on any device and of any floating dtype.

    Args:
        model: the UNet itself, not the pipeline around it.
        names: the name of a weight by the name of its module; by default the module's own with `.weight`, in LDM's
            layout if a UNet of the family is recognised.
        hessians: whether second moments between columns are collected too, for error feedback.
        rank: rank to which they are reduced; those of up to twice as many columns stay whole.
        sensitivities: whether it is measured too how much noise in each weight that would be quantised disturbs the
            model's output, for sizes. The model then takes ``1 + passes`` times as long; it must do the same again when
            it is called again, and hooks or wrappers that count its steps must stand around it, not within.
        passes: how many layers are tried each time that the model is called, in turn; each of them should have its
            turn a few times.
    """
    collector = Collector(model, names, hessians=hessians, rank=rank, passes=passes if sensitivities else 0)
    with collector.watching():
        yield collector


class Collector:
    """The sums of one `collect`, or of several times of `watching`; `calibration` makes the result of them.

    Args:
        model: as `collect` takes it; this, `names`, `hessians` and `rank` likewise.
        passes: layers tried for their sensitivity each time that the model is called; 0: none is measured.
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
        self._sums: dict[str, _Sums] = {}
        self._watched = [(module, self._hook(names[name])) for name, module in layers.items() if name in names]
        self._probe = None
        if passes:
            entries = describe({key: tensor for key, tensor in tensors.items() if tensor.dtype in DTYPE_NAMES})
            _, plans = plan_tensors(entries, DEFAULTS)
            quantized = {key for key, plan in plans.items() if plan.format}
            tried = {
                names[name]: layer for name, layer in layers.items() if name in names and f"{name}.weight" in quantized
            }
            self._probe = SensitivityProbe(model, tried, passes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on the model inside the `with`; what is seen is added to what was seen before."""
        hooks = [module.register_forward_pre_hook(hook) for module, hook in self._watched]
        try:
            with self._probe.watching() if self._probe else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def calibration(self, *, prompts: int | None = None, steps: int | None = None) -> Calibration:
        """What was collected so far.

        Args:
            prompts: how many prompts were sampled, for the file.
            steps: in how many steps each, for the file.

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

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if arguments and arguments[0].numel() and not (self._probe and self._probe.busy):
                self._add(name, _Kind.of(module), arguments[0])

        return hook

    def _add(self, name: str, kind: _Kind, tensor: torch.Tensor) -> None:
        sums = self._sums.get(name)
        if sums is None:
            shared = (other for other in self._sums.values() if other.calls == 1 and other.saw_last(tensor, kind))
            sums = next(shared, None) or _Sums(name, kind, self._rank)
        elif sums.leader != name and not sums.saw_last(tensor, kind):
            # Until now both read the same tensors; the leader may be one call ahead.
            sums = sums.copy_for(name)
        self._sums[name] = sums
        if sums.leader == name:
            sums.add(tensor)


@dataclass(frozen=True)
class _Kind:
    """How a layer reads its input: a convolution's geometry, all empty for Linear."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> _Kind:
        if isinstance(module, nn.Linear):
            return cls()
        padding = module.padding
        if isinstance(padding, str):
            # "same" spreads its padding evenly but for one pixel, which statistics do not feel.
            sides = zip(module.kernel_size, module.dilation, strict=True)
            padding = tuple(d * (k - 1) // 2 if padding == "same" else 0 for k, d in sides)
        return cls(module.kernel_size, module.stride, padding, module.dilation)


class _Sums:
    """Sums over the inputs of one layer, the leader, and of those that read the same tensors.

    The Hessian of many columns is only seen through its product with a fixed random matrix, the probe.
    """

    def __init__(self, leader: str, kind: _Kind, rank: int) -> None:
        self.leader = leader
        self.kind = kind
        self.calls = self.rows = 0
        self._rank = rank
        self._squares = self._column_squares = self._sketch = torch.zeros(())
        self._last: Callable[[], torch.Tensor | None] = lambda: None

    def saw_last(self, tensor: torch.Tensor, kind: _Kind) -> bool:
        """Whether this very tensor was the last one added, read in the same way."""
        return self.kind == kind and self._last() is tensor

    def copy_for(self, leader: str) -> _Sums:
        """The same sums for a layer that goes its own way from now on."""
        other = copy.copy(self)
        other.leader = leader
        return other

    def add(self, tensor: torch.Tensor) -> None:
        """Take in one call's input."""
        self._last = weakref.ref(tensor)
        self.calls += 1
        tensor = tensor.detach().float()
        rows = tensor.flatten(2).transpose(1, 2).flatten(0, 1) if self.kind.kernel else tensor.flatten(0, -2)
        self.rows += len(rows)
        self._squares = self._squares + _squares(rows)
        if self._rank:
            inputs = self._patches(tensor) if self.kind.kernel else rows
            columns = inputs.shape[1]
            self._column_squares = self._column_squares + _squares(inputs)
            whole = columns <= 2 * self._rank
            seen = inputs if whole else inputs @ _probe(columns, 2 * self._rank, inputs.device)
            self._sketch = self._sketch + inputs.T @ seen

    def result(self) -> LayerInputs:
        """The means."""
        importance = (self._squares / self.rows).float().cpu()
        if not self._rank:
            return LayerInputs(importance, self.rows)
        sketch, diagonal = self._sketch.cpu(), self._column_squares.cpu()
        if sketch.shape[0] == sketch.shape[1]:
            return LayerInputs(importance, self.rows, SecondMoment.of(sketch).correlation.half())
        probe = _probe(*sketch.shape, sketch.device)
        return LayerInputs(importance, self.rows, low_rank(sketch, probe, diagonal, self._rank))

    def _patches(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a convolution multiplies its flattened weight by, at random positions: (positions, columns)."""
        (rows, columns), kind = self.kind.kernel, self.kind
        padded = functional.pad(tensor, (kind.padding[1],) * 2 + (kind.padding[0],) * 2)
        spans = [d * (k - 1) for k, d in zip(kind.kernel, kind.dilation, strict=True)]
        sides = [
            (size - span - 1) // step + 1 for size, span, step in zip(padded.shape[2:], spans, kind.stride, strict=True)
        ]
        total = len(tensor) * sides[0] * sides[1]
        chosen = torch.arange(total)
        if total > PATCHES_PER_CALL:
            generator = torch.Generator().manual_seed(self.calls)
            chosen = torch.randint(total, (PATCHES_PER_CALL,), generator=generator)
        picture, position = chosen // (sides[0] * sides[1]), chosen % (sides[0] * sides[1])
        y = position // sides[1] * kind.stride[0] + torch.arange(rows)[:, None, None] * kind.dilation[0]
        x = position % sides[1] * kind.stride[1] + torch.arange(columns)[:, None] * kind.dilation[1]
        # (rows, columns, positions, channels), as advanced indices stand before the channels here.
        patches = padded.permute(0, 2, 3, 1)[picture, y, x]
        return patches.permute(2, 3, 0, 1).flatten(1)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Sums of squares by column; fp64 where the device has it."""
    sums = rows.square().sum(dim=0)
    return sums if sums.device.type == "mps" else sums.double()


@lru_cache(maxsize=64)
def _probe(columns: int, probes: int, device: torch.device) -> torch.Tensor:
    """The random matrix of the sketches of so many columns, fp32, on every device the same."""
    return torch.randn(columns, probes, generator=torch.Generator().manual_seed(columns)).to(device)
