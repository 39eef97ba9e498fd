"""Measure how much of the noise in a layer's weight arrives in the model's output, while the model is in use.

After each call, the model runs again with the same arguments and noise in one layer's weight, for a few layers per
call. This needs forward passes only, extra memory for the largest weight and one output, and works in any program that
calls the model.
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
"""Power of the added noise below that of the weight, in dB: about the noise of three bits, far above fp16 rounding."""

PASSES = 4
"""Number of layers tried per call of the model."""

SEED = 1_618_033
"""Seed of the layers' order and noise, unlikely to be the seed of a picture."""


class SensitivityProbe:
    """Measures the sensitivities of a model's layers while a `watching` block runs the model.

    Args:
        model: the model, whose forward method is called again.
        layers: layers to try, by weight name. Layers without a floating weight on a device are skipped; layers that do
            not change the output get no result.
        passes: number of layers tried per call of the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], passes: int) -> None:
        self.busy = False
        """Whether an extra pass is running, whose inputs other hooks should ignore."""
        self._layers = dict(layers)
        self._passes = passes
        self._sums = dict.fromkeys(self._layers, 0.0)
        self._counts = dict.fromkeys(self._layers, 0)
        self._turn = self._cycle()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._arguments: Callable[[], tuple[tuple, dict]] | None = None
        self._model = model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model inside the `with` block."""
        hooks = [
            self._model.register_forward_pre_hook(self._store_arguments, with_kwargs=True),
            self._model.register_forward_hook(self._measure),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._arguments = None

    def result(self) -> dict[str, float]:
        """Mean over the tries of relative noise power of the model's output ÷ that of the weight, by weight name."""
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}

    def _cycle(self) -> Iterator[str]:
        """All layer names again and again, reshuffled each time so that no layer is tied to certain timesteps."""
        generator = torch.Generator().manual_seed(SEED)
        names = list(self._layers)
        while names:
            for index in torch.randperm(len(names), generator=generator).tolist():
                yield names[index]

    def _store_arguments(self, module: nn.Module, arguments: tuple, named: dict) -> None:
        # A model may change its arguments: ComfyUI's removes entries from the lists of ControlNet outputs.
        arguments, named = _copy_containers(arguments), _copy_containers(named)
        self._arguments = lambda: (_copy_containers(arguments), _copy_containers(named))

    def _measure(self, model: nn.Module, _: tuple, output: Any) -> None:
        fresh_arguments, self._arguments = self._arguments, None
        if fresh_arguments is None or self.busy:
            return
        self.busy = True
        try:
            for _, name in zip(range(min(self._passes, len(self._layers))), self._turn, strict=False):
                weight = getattr(self._layers[name], "weight", None)
                if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.dtype not in QUANTIZABLE_DTYPES:
                    continue
                arguments, named = fresh_arguments()
                devices = _devices([output, arguments, named]) - {weight.device}
                with self._noise_in(weight, devices) as noise:
                    other = model.forward(*arguments, **named)
                change, power = _change_and_power(output, other)
                if noise > 0 and power > 0 and math.isfinite(change):
                    self._sums[name] += change / power / noise
                    self._counts[name] += 1
        finally:
            self.busy = False

    @contextmanager
    def _noise_in(self, weight: torch.Tensor, devices: Iterable[torch.device]) -> Iterator[float]:
        """Add noise to a weight inside the `with` block; yields its power relative to the weight's variance.

        The host copies pinned weights asynchronously. `devices`, those that compute, are synchronised before each write
        to the weight, because copies of it may still be queued there.
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


def _copy_containers(value: Any) -> Any:
    """Copy nested dicts, lists and tuples; the tensors and other objects in them are shared."""
    if type(value) is dict:
        return {key: _copy_containers(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy_containers, value))
    return value


def _devices(value: Any) -> set[torch.device]:
    """Devices of the tensors in an argument or output."""
    if isinstance(value, torch.Tensor):
        return {value.device}
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return set()
    return set().union(*map(_devices, value))


def _synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for all queued work on these devices, on every stream."""
    for device in devices:
        if device.type in ("cpu", "meta"):
            continue
        wait = getattr(getattr(torch, device.type, None), "synchronize", None)
        if wait is None:
            # Such devices work in order: reading a value waits for everything before it.
            torch.zeros(1, device=device).item()
        elif device.type == "mps":
            wait()
        else:
            wait(device)


def _change_and_power(before: Any, after: Any) -> tuple[float, float]:
    """Sum of squared differences between the floating tensors of two outputs, and sum of squares of the first."""
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
    sums = [_change_and_power(*pair) for pair in pairs]
    return sum(change for change, _ in sums), sum(power for _, power in sums)
