"""How much noise in a layer's weight disturbs a model's output: by hand, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from samples import random_weight
from torch import nn

from nfq_core import collect
from nfq_core.calibration import sensitivity
from nfq_core.calibration.sensitivity import SensitivityProbe

LAYERS = {"strong.weight", "weak.weight", "convolution.weight"}


class Model(nn.Module):
    """A sum of two layers' outputs, one of them a tenth as strong, and a convolution; one layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak, self.unused = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.tiny = nn.Linear(4, 4)
        self.convolution = nn.Conv2d(8, 16, 3)
        self.calls = 0
        with torch.no_grad():
            for number, layer in enumerate((self.strong, self.weak)):
                layer.weight.copy_(random_weight(64, 64, seed=number))

    def forward(self, tokens: torch.Tensor, *, pictures: list[torch.Tensor]) -> dict[str, object]:
        self.calls += 1
        self.tiny(tokens[:, :4])
        # Taken out, as ComfyUI's model does with what a ControlNet gives it.
        picture = pictures.pop()
        return {"sums": (self.strong(tokens) + 0.1 * self.weak(tokens), self.convolution(picture)), "words": None}


def used(model: nn.Module, calls: int = 8, **options: object) -> dict[str, float]:
    with collect(model, sensitivities=True, **options) as collected, torch.no_grad():
        for number in range(calls):
            model(random_weight(256, 64, seed=number), pictures=[random_weight(1, 8, 6, 6, seed=number)])
    return dict(collected.calibration().sensitivities)


def test_sensitivities_of_two_summands_by_hand() -> None:
    """Noise in `strong`, of relative power 1, would be 1 / 1.01 of the first output's power, in `weak` 0.01 / 1.01."""
    model = Model()
    with torch.no_grad():
        model.convolution.weight.zero_()
        model.convolution.bias.zero_()
    found = used(model, passes=5)
    # 4,096 weights give the power of their noise within 1 / sqrt(2,048) in one draw, and so do the inputs.
    assert found["strong.weight"] == pytest.approx(1 / 1.01, rel=0.05)
    assert found["weak.weight"] == pytest.approx(0.01 / 1.01, rel=0.05)
    # A weight of zeros has no power to compare noise with.
    assert found.keys() == LAYERS - {"convolution.weight"}


def test_each_layer_has_its_turn() -> None:
    model = Model()
    # Five layers would be quantised with the one that is never called, which costs a turn.
    assert used(model, calls=2, passes=2).keys() == LAYERS
    assert model.calls == 2 * (1 + 2)


def test_more_passes_than_layers() -> None:
    model = Model()
    assert used(model, calls=1, passes=100).keys() == LAYERS
    assert model.calls == 1 + 4


def test_names_choose_what_is_tried() -> None:
    assert used(Model(), names={"strong": "first", "tiny": "second"}).keys() == {"first"}


def test_weights_and_statistics_stay_what_they_were() -> None:
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with collect(model, sensitivities=True) as first, collect(other) as second, torch.no_grad():
        for each in (model, other):
            each(random_weight(256, 64), pictures=[random_weight(1, 8, 6, 6)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    found, wanted = first.calibration().inputs, second.calibration().inputs
    for name, inputs in wanted.items():
        assert torch.equal(found[name].importance, inputs.importance) and found[name].rows == inputs.rows
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_error_in_an_extra_pass_leaves_the_weight_as_it_was() -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(module: nn.Module, arguments: tuple) -> None:
        if model.calls > 1:
            raise RuntimeError("out of memory")

    model.strong.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        used(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    with collect(model, sensitivities=True) as collected:
        model(random_weight(256, 64).to(dtype))
    assert collected.calibration().sensitivities["0.weight"] == pytest.approx(1, rel=0.1)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad(), collect(model, sensitivities=True) as collected:
        model(random_weight(256, 64))
    assert collected.calibration().sensitivities["0.weight"] == pytest.approx(1, rel=0.1)


def test_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with collect(model, sensitivities=True):
        output = model(random_weight(8, 64))
    assert model[0].weight.requires_grad and output.requires_grad


def test_a_negative_number_of_passes_is_refused() -> None:
    with pytest.raises(ValueError, match="passes"):
        used(Model(), passes=-1)


class LateDevice:
    """A GPU that does what it is asked for as late as it may: when it is waited for, or a result is read."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] = []

    def compute(self, device: str, shape: tuple[int, ...], work: Callable[[], torch.Tensor]) -> Late:
        """The result of `work`, which reads its tensors when it runs."""
        result = Late(self, device, shape)
        self._queue.append(lambda: setattr(result, "made", work()))
        return result

    def synchronize(self, *_: object) -> None:
        while self._queue:
            self._queue.pop(0)()


class Late(torch.Tensor):
    """A tensor on a `LateDevice`."""

    made: torch.Tensor

    @staticmethod
    def __new__(cls, gpu: LateDevice, device: str, shape: tuple[int, ...]) -> Late:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)

    def __init__(self, gpu: LateDevice, device: str, shape: tuple[int, ...]) -> None:
        self.gpu = gpu

    @classmethod
    def __torch_dispatch__(cls, operation: Callable, types: tuple, arguments: tuple = (), named: dict | None = None):
        for late in arguments:
            if isinstance(late, Late):
                late.gpu.synchronize()
        return operation(*(getattr(each, "made", each) for each in arguments), **named or {})


class Offloaded(nn.Module):
    """A layer whose weight stays on the CPU and is copied without waiting, as hosts do with pinned ones."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)
        self.device, self.gpu = device, LateDevice()

    def forward(self, tokens: torch.Tensor) -> Late:
        weight = self.layer.weight.detach()
        return self.gpu.compute(self.device, (len(tokens), 64), lambda: tokens @ weight.T)


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0", "mps:0"])
def test_copies_that_are_still_to_be_made_are_waited_for(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The layer is all of the model: the output's noise is the weight's, but for that of so many draws."""
    model = Offloaded(device)
    waited = []

    def synchronize(*which: torch.device) -> None:
        waited.append(which)
        model.gpu.synchronize()

    monkeypatch.setattr(getattr(torch, device.partition(":")[0]), "synchronize", synchronize)
    before = model.layer.weight.detach().clone()
    probe = SensitivityProbe(model, {"layer": model.layer}, 1)
    with probe.watching(), torch.no_grad():
        output = model(random_weight(256, 64))
    assert probe.result()["layer"] == pytest.approx(1, rel=0.1)
    assert torch.equal(model.layer.weight, before)
    assert torch.equal(output + 0, random_weight(256, 64) @ before.T)
    assert set(waited) == {() if device == "mps:0" else (torch.device(device),)}


def test_a_weight_on_the_device_of_the_output_needs_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(devices: set[torch.device]) -> None:
        assert not devices

    monkeypatch.setattr(sensitivity, "_synchronize", refuse)
    assert used(Model()).keys() == LAYERS
