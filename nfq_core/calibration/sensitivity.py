"""Measuring, while a model is used, how much of the noise in a layer's weight arrives in the model's output.

Each time that the model was called, it runs again with the same arguments and noise in the weight of one layer, then of
the next, some layers each time. Nothing but forward passes: it takes the memory of the largest weight and of one output
more than the model does, and works in any program that calls the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..packed.tensor import QUANTIZABLE_DTYPES

NOISE_DB = 18.0
"""How far the noise lies below a weight: about as far as three bits do. Half-precision rounding lies far below."""

PASSES = 4
"""Layers tried each time that the model is called."""

SEED = 1_618_033
"""Of the layers' order and of their noise: none that pictures are likely to be drawn with."""


class SensitivityProbe:
    """Tries the weights of a model's layers while it is used inside `watching`.

    Args:
        model: the model, whose forward method is run again.
        layers: the layers to try, by the names of their weights; those without a floating weight on a device are left
            out, and so is one that changes nothing.
        passes: how many are tried each time.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], passes: int) -> None:
        self.busy = False
        """Whether the model is being run again: nobody else needs to count these calls."""
        self._layers = dict(layers)
        self._passes = passes
        self._sums = dict.fromkeys(self._layers, 0.0)
        self._counts = dict.fromkeys(self._layers, 0)
        self._turn = self._names()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._arguments: Callable[[], tuple[tuple, dict]] | None = None
        self._model = model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on the model inside the `with`."""
        hooks = [
            self._model.register_forward_pre_hook(self._remember, with_kwargs=True),
            self._model.register_forward_hook(self._measure),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._arguments = None

    def result(self) -> dict[str, float]:
        """Relative noise power of the model's output ÷ that of the weight, in the mean, of each layer tried."""
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}

    def _names(self) -> Iterator[str]:
        """All layers' names over and over, in another order each time, so that none is tied to certain timesteps."""
        generator = torch.Generator().manual_seed(SEED)
        names = list(self._layers)
        while names:
            for index in torch.randperm(len(names), generator=generator).tolist():
                yield names[index]

    def _remember(self, module: nn.Module, arguments: tuple, named: dict) -> None:
        # A model may take what it is given apart, as ComfyUI's does with the lists of a ControlNet's outputs.
        arguments, named = _copied(arguments), _copied(named)
        self._arguments = lambda: (_copied(arguments), _copied(named))

    def _measure(self, model: nn.Module, _: tuple, output: Any) -> None:
        make, self._arguments = self._arguments, None
        if make is None or self.busy:
            return
        self.busy = True
        try:
            for _, name in zip(range(min(self._passes, len(self._layers))), self._turn, strict=False):
                weight = getattr(self._layers[name], "weight", None)
                if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.dtype not in QUANTIZABLE_DTYPES:
                    continue
                arguments, named = make()
                devices = _devices([output, arguments, named]) - {weight.device}
                with self._disturbed(weight, devices) as noise:
                    other = model.forward(*arguments, **named)
                change, power = _compared(output, other)
                if noise > 0 and power > 0 and math.isfinite(change):
                    self._sums[name] += change / power / noise
                    self._counts[name] += 1
        finally:
            self.busy = False

    @contextmanager
    def _disturbed(self, weight: torch.Tensor, devices: Iterable[torch.device]) -> Iterator[float]:
        """Noise in a weight, its power relative to the weight's variance; afterwards the weight is what it was.

        Each of `devices`, where the model computes, may have copies of the weight queued that are still to be made: a
        host copies pinned weights without waiting. So they are waited for before the weight is written to.
        """
        with torch.inference_mode(weight.is_inference() or torch.is_inference_mode_enabled()), torch.no_grad():
            original = weight.detach().clone()
            generator = self._generators.get(weight.device)
            if generator is None:
                generator = torch.Generator(weight.device).manual_seed(SEED)
                self._generators[weight.device] = generator
            noise = torch.randn(weight.shape, generator=generator, device=weight.device)
            values = original.float()
            variance = values.var(correction=0)
            noise.mul_(variance.sqrt() * 10 ** (-NOISE_DB / 20)).add_(values)
            try:
                _synchronize(devices)
                weight.copy_(noise)
                yield ((weight.float() - values).square().mean() / variance).item()
            finally:
                _synchronize(devices)
                weight.copy_(original)


def _copied(value: Any) -> Any:
    """The same tensors and objects in containers of their own."""
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _devices(value: Any) -> set[torch.device]:
    """Where the tensors in an argument or output are."""
    if isinstance(value, torch.Tensor):
        return {value.device}
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return set()
    return set().union(*map(_devices, value))


def _synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for all that is queued on some devices, on whichever of their streams."""
    for device in devices:
        if device.type in ("cpu", "meta"):
            continue
        wait = getattr(getattr(torch, device.type, None), "synchronize", None)
        if wait is None:
            # Such devices work in order: what is read from them comes last.
            torch.zeros(1, device=device).item()
        elif device.type == "mps":
            wait()
        else:
            wait(device)


def _compared(before: Any, after: Any) -> tuple[float, float]:
    """Squared difference of the floating tensors of two outputs, and the first one's square."""
    if isinstance(before, torch.Tensor):
        if not before.is_floating_point():
            return 0.0, 0.0
        before = before.detach().float()
        return (after.detach().float() - before).square().sum().item(), before.square().sum().item()
    if isinstance(before, Mapping):
        pairs = [(part, after[key]) for key, part in before.items()]
    elif isinstance(before, list | tuple):
        pairs = list(zip(before, after, strict=True))
    else:
        pairs = []
    sums = [_compared(*pair) for pair in pairs]
    return sum(change for change, _ in sums), sum(power for _, power in sums)
