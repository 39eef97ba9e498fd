"""Calibrations: collected from models, saved, loaded, matched with weights, and what is wrong with bad ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import TINY, moment_matrix, random_weight
from torch import nn

import nfq_core
from nfq_core import Calibration, NFQFile, collect, quantize
from nfq_core.calibration.statistics import CALIBRATION_KEY, LayerInputs
from nfq_core.checkpoints import convert
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import file_info
from nfq_core.checkpoints.state_dict import quantize_tensors
from nfq_core.errors import CorruptFileError, NFQError, TargetExistsError, UnsupportedFileError
from nfq_core.files.safetensors_io import Entry, describe
from nfq_core.models.sensitivities import SPREAD
from nfq_core.models.unet import detect
from nfq_core.models.unet_keys import SDXL_BASE, SSD_1B, tensor_shapes
from nfq_core.packed.formats import FORMATS
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import BitsPerWeight, FileSize, Formats, Settings


class Model(nn.Module):
    """Two readers of one tensor, a convolution, and a layer that is never called."""

    def __init__(self, **convolution: object) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(40, 50), nn.Linear(40, 60)
        self.out = nn.Linear(50, 40)
        self.conv = nn.Conv2d(8, 16, 3, **({"padding": 1} | convolution))
        self.unused = nn.Linear(40, 50)

    def forward(self, tokens: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        self.conv(pictures)
        self.k(tokens)
        return self.out(self.q(tokens))


def calls(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (random_weight(2, 7 + i, 40, seed=i), random_weight(2, 8, 6, 5 + i, seed=10 + i) + 0.5) for i in range(count)
    ]


def collected(model: nn.Module, **options: object) -> Calibration:
    with collect(model, **options) as sums, torch.no_grad():
        for tokens, pictures in calls():
            model(tokens, pictures)
    return sums.calibration(prompts=8, steps=20)


def tokens_seen() -> np.ndarray:
    return np.concatenate([tokens.reshape(-1, 40).numpy() for tokens, _ in calls()]).astype(np.float64)


@pytest.fixture
def calibration() -> Calibration:
    return collected(Model(), hessians=True)


@pytest.fixture
def saved(calibration, tmp_path):
    calibration.save(tmp_path / "calibration")
    return tmp_path / "calibration"


def test_importance_is_the_mean_square_of_each_channel():
    found = collected(Model())
    tokens = tokens_seen()
    assert torch.allclose(found.inputs["q.weight"].importance.double(), torch.from_numpy((tokens**2).mean(axis=0)))
    assert found.inputs["q.weight"].rows == len(tokens) == 48
    squares = [pictures.square().sum(dim=(0, 2, 3)) for _, pictures in calls()]
    rows = sum(pictures[:, 0].numel() for _, pictures in calls())
    assert torch.allclose(found.inputs["conv.weight"].importance, sum(squares) / rows)
    assert found.inputs["conv.weight"].rows == rows
    assert all(inputs.correlation is None for inputs in found.inputs.values())


def test_layers_share_what_they_read_alike(calibration):
    assert calibration.inputs.keys() == {"q.weight", "k.weight", "out.weight", "conv.weight"}
    assert calibration.inputs["q.weight"] is calibration.inputs["k.weight"]
    assert calibration.inputs["q.weight"] is not calibration.inputs["out.weight"]


def test_layers_that_part_go_their_own_ways():
    model = Model()
    tokens, other = random_weight(64, 40), random_weight(64, 40, seed=1) * 3
    with collect(model) as sums, torch.no_grad():
        for second in (tokens, other):
            model.q(tokens)
            model.k(second)
    inputs = sums.calibration().inputs
    assert torch.allclose(inputs["q.weight"].importance, tokens.square().mean(dim=0))
    # The leader had added its second call already when the follower left.
    assert torch.allclose(inputs["k.weight"].importance, (2 * tokens.square() + other.square()).mean(dim=0) / 3)


def test_the_second_moment_of_a_linear_layer(calibration):
    tokens = tokens_seen()
    wanted = torch.from_numpy(tokens.T @ tokens / len(tokens)).float()
    found = moment_matrix(calibration.inputs["q.weight"].second_moment())
    # The correlation is rounded to fp16.
    assert torch.allclose(found, wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    "convolution", [{}, {"padding": 0, "stride": 2}, {"dilation": 2}, {"padding": "same"}, {"kernel_size": (1, 3)}]
)
def test_the_second_moment_of_a_convolution(convolution):
    model = Model()
    model.conv = nn.Conv2d(8, 16, **({"kernel_size": 3, "padding": 1} | convolution))
    found = collected(model, hessians=True).inputs["conv.weight"]
    taps = model.conv.kernel_size[0] * model.conv.kernel_size[1]
    padding = 1 if model.conv.padding == "same" else model.conv.padding
    patches = [
        nn.functional.unfold(pictures, model.conv.kernel_size, model.conv.dilation, padding, model.conv.stride)
        for _, pictures in calls()
    ]
    rows = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in patches])
    wanted = rows.T @ rows / rows.square().sum(dim=0).sqrt() / rows.square().sum(dim=0).sqrt()[:, None]
    assert found.taps == taps
    assert torch.allclose(found.correlation.float(), wanted, atol=1e-3)


def test_many_positions_are_sampled(monkeypatch):
    model, pictures = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), random_weight(4, 4, 40, 40).cumsum(dim=2)
    moments = []
    for limit in (3000, 10**6):
        monkeypatch.setattr("nfq_core.calibration.collector.PATCHES_PER_CALL", limit)
        with collect(model, hessians=True) as sums:
            model(pictures)
        moments.append(sums.calibration().inputs["0.weight"].correlation.float())
    assert 0 < (moments[0] - moments[1]).abs().max() < 0.1


def test_wide_layers_are_stored_in_low_rank():
    model = nn.Sequential(nn.Linear(300, 4, bias=False))
    inputs = random_weight(500, 5) @ random_weight(5, 300, seed=1)
    with collect(model, hessians=True, rank=8) as sums:
        model(inputs)
    found = sums.calibration().inputs["0.weight"]
    assert found.correlation.shape == (300, 8)
    wanted = inputs.T @ inputs / len(inputs)
    difference = moment_matrix(found.second_moment()) - wanted
    assert difference.norm() < 5e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_dtype_and_mode(dtype, mode):
    model = nn.Sequential(nn.Linear(40, 8)).to(dtype)
    # Their squares lie beyond fp16.
    inputs = (random_weight(64, 40) * 1000).to(dtype)
    with mode(), collect(model, hessians=True) as sums:
        model(inputs)
    found = sums.calibration().inputs["0.weight"]
    assert torch.allclose(found.importance, inputs.float().square().mean(dim=0), rtol=1e-5)


def test_hooks_are_gone_afterwards():
    model = Model()
    with pytest.raises(KeyboardInterrupt), collect(model):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_names_choose_layers():
    found = collected(Model(), names={"q": "first", "conv": "second"})
    assert found.inputs.keys() == {"first", "second"}


def test_nothing_collected():
    with collect(Model()) as sums:
        pass
    with pytest.raises(NFQError, match="nothing was collected"):
        sums.calibration()
    with pytest.raises(ValueError, match="rank"):
        collected(Model(), rank=0)


def test_saved_and_loaded(calibration, saved):
    loaded = Calibration.load(saved)
    assert (loaded.architecture, loaded.prompts, loaded.steps, loaded.faults) == ("unknown", 8, 20, {})
    assert loaded.inputs.keys() == calibration.inputs.keys()
    assert loaded.inputs["q.weight"] is loaded.inputs["k.weight"]
    for name, inputs in calibration.inputs.items():
        assert torch.equal(loaded.inputs[name].importance, inputs.importance)
        assert torch.equal(loaded.inputs[name].correlation, inputs.correlation)
        assert loaded.inputs[name].rows == inputs.rows
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    assert loaded.as_dict() == {"calibration": "calibration", "calibration_sha256": digest}
    with pytest.raises(TargetExistsError):
        calibration.save(saved)


@pytest.fixture
def model_file(tmp_path):
    save_file(Model().state_dict(), tmp_path / "model")
    return tmp_path / "model"


def test_a_file_is_quantised_with_it(saved, model_file, tmp_path):
    calibration = Calibration.load(saved)
    result = quantize_file(model_file, tmp_path / "nfq", Settings(Formats()), calibration=calibration)
    assert result["warnings"] == ["tensor 'unused.weight' is quantised without calibration: the calibration lacks it"]
    weights = load_file(model_file)
    with NFQFile(tmp_path / "nfq") as file:
        assert calibration.as_dict().items() <= file.facts.settings.items()
        for key in ("q.weight", "k.weight", "out.weight", "conv.weight"):
            levels = 32 if key == "conv.weight" else 16
            wanted = quantize(weights[key], levels, hessian=calibration.inputs[key].second_moment())
            assert torch.equal(file.load(key).data, wanted.data)
            assert not torch.equal(wanted.data, quantize(weights[key], levels).data)
        assert torch.equal(file.load("unused.weight").data, quantize(weights["unused.weight"]).data)


def test_a_state_dict_is_quantised_with_it(calibration, caplog):
    weights = Model().state_dict()
    with caplog.at_level(logging.WARNING):
        result = nfq_core.quantize_state_dict(weights, levels=16, calibration=calibration)
    assert "'unused.weight' is quantised without calibration" in caplog.text
    hessian = calibration.inputs["q.weight"].second_moment()
    assert torch.equal(result["q.weight"].data, quantize(weights["q.weight"], hessian=hessian).data)


def test_without_hessians_importance_is_used():
    calibration, weights = collected(Model()), Model().state_dict()
    result = nfq_core.quantize_state_dict(weights, levels=16, calibration=calibration)
    wanted = quantize(weights["q.weight"], importance=calibration.inputs["q.weight"].importance)
    assert torch.equal(result["q.weight"].data, wanted.data)


def test_trellis_formats_use_it(saved, model_file, tmp_path):
    calibration = Calibration.load(saved)
    quantize_file(
        model_file,
        tmp_path / "nfq",
        Settings(Formats.of(format="t2w8_b64")),
        calibration=calibration,
    )
    weights = load_file(model_file)
    with NFQFile(tmp_path / "nfq") as file:
        hessian = calibration.inputs["q.weight"].second_moment()
        wanted = quantize(weights["q.weight"], format="t2w8_b64", hessian=hessian)
        assert torch.equal(file.load("q.weight").data, wanted.data)


def test_trellis_formats_need_hessians(model_file, tmp_path):
    settings, calibration = (
        Settings(Formats.of(format="t2w8_b64")),
        collected(Model()),
    )
    result = quantize_file(model_file, tmp_path / "with", settings, calibration=calibration)
    told = "the calibration has no Hessians, so it has no effect on 3 weights in trellis formats"
    assert [warning for warning in result["warnings"] if told in warning]
    with NFQFile(tmp_path / "with") as file:
        weights = load_file(model_file)
        assert torch.equal(file.load("q.weight").data, quantize(weights["q.weight"], format="t2w8_b64").data)
    # The header does not claim what was not used.
    bare = Calibration({name: inputs for name, inputs in calibration.inputs.items() if name != "conv.weight"})
    settings = Settings(Formats.of(format="t2w8_b64", conv_format="t2w8_b64"))
    quantize_file(model_file, tmp_path / "bare", settings, calibration=bare)
    with NFQFile(tmp_path / "bare") as file:
        assert "calibration" not in file.facts.settings


def test_a_size_met_by_several_files_warns_once(saved, model_file, tmp_path, monkeypatch):
    tries = []
    monkeypatch.setattr(convert, "plan_tensors", lambda *arguments: tries.append(1) or plan_tensors(*arguments))
    settings = Settings(FileSize(11000))
    result = quantize_file(model_file, tmp_path / "nfq", settings, calibration=Calibration.load(saved))
    assert len(tries) > 1
    told = "the calibration has no sensitivities; they are estimated from SDXL's"
    assert result["warnings"].count(told) == 1


@pytest.mark.parametrize(("architecture", "warned"), [(SDXL_BASE, False), (SSD_1B, True)])
def test_a_calibration_without_sensitivities_is_complete_only_for_sdxl(architecture, warned):
    """There they are known layer by layer, and `NFCalibrate` measures none."""
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in tensor_shapes(architecture, "ldm").items()}
    info, plans = plan_tensors(entries, Settings())
    inputs = {
        key: LayerInputs(torch.ones(plan.shape[1]), 99, torch.zeros(math.prod(plan.shape[1:]), 1).half())
        for key, plan in plans.items()
        if plan.format
    }
    found, warnings = Calibration(inputs, architecture.name).for_plans(info, plans)
    assert found.keys() == inputs.keys()
    assert bool(warnings) == warned


SENSITIVITIES = {"q.weight": 9.0, "k.weight": 0.1, "conv.weight": 2, "out.weight": 1.0}


def test_sensitivities_are_saved_and_loaded(calibration, saved, tmp_path):
    measured = dataclasses.replace(calibration, sensitivities=SENSITIVITIES)
    measured.save(tmp_path / "measured")
    assert Calibration.load(tmp_path / "measured").sensitivities == SENSITIVITIES
    # A file without them, as older ones are.
    assert "sensitivities" not in saved.read_bytes().decode("latin-1")
    assert Calibration.load(saved).sensitivities == {}


def test_what_a_calibration_helps(calibration):
    scalar, trellis = FORMATS["nf16_b64"], FORMATS["t3w8_b64"]
    plain = Calibration({"a": LayerInputs(torch.ones(4), 99)})
    measured = dataclasses.replace(plain, sensitivities={"a": 1.0})
    answers = [
        [
            each.changes_result(Settings(Formats(scalar, trellis))),
            each.changes_result(Settings(Formats(trellis, trellis))),
            each.changes_result(Settings(BitsPerWeight(3.4))),
        ]
        for each in (plain, measured, calibration)
    ]
    assert answers == [[True, False, False], [True, False, True], [True, True, True]]


def test_sizes_use_sensitivities(calibration, model_file, tmp_path):
    calibration = dataclasses.replace(calibration, sensitivities=SENSITIVITIES)
    result = quantize_file(
        model_file,
        tmp_path / "nfq",
        Settings(BitsPerWeight(5.5)),
        calibration=calibration,
    )
    told = "the calibration has no sensitivities for 1 weights, such as 'unused.weight'; they are estimated from SDXL's"
    assert told in result["warnings"]
    layers = {layer["name"]: layer for layer in file_info(tmp_path / "nfq")["layers"]}
    # Per weight, as they count, which the header has.
    ratio = layers["q.weight"]["sensitivity"] / layers["k.weight"]["sensitivity"]
    assert ratio == pytest.approx((9 / 0.1) ** SPREAD * 2400 / 2000, rel=1e-3)
    in_memory = quantize_tensors(
        describe(load_file(model_file)),
        load_file(model_file).__getitem__,
        Settings(BitsPerWeight(5.5)),
        calibration=calibration,
    )
    assert {key: value.format.id for key, value in in_memory.items() if isinstance(value, nfq_core.NFTensor)} == {
        name: layer["format"] for name, layer in layers.items()
    }


@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_layouts_share_calibrations(layout):
    names = {key: shape for key, shape in tensor_shapes(TINY, "ldm").items() if len(shape) > 1}
    calibration = Calibration({key: LayerInputs(torch.ones(shape[1]), 99) for key, shape in names.items()})
    shapes = tensor_shapes(TINY, layout)
    weights = {key: shape for key, shape in shapes.items() if len(shape) > 1}
    found, warnings = calibration.for_weights(detect(shapes), weights)
    assert found.keys() == weights.keys()
    assert not warnings


def test_another_architecture_is_refused():
    shapes = tensor_shapes(SSD_1B, "ldm")
    calibration = Calibration({}, SDXL_BASE.name)
    with pytest.raises(NFQError, match="made with SDXL, this model is SSD-1B"):
        calibration.for_weights(detect(shapes), shapes)


def test_another_model_is_refused(calibration):
    with pytest.raises(NFQError, match=r"fits 0 of 1 weights; .*'other.weight'.* lacks it"):
        calibration.for_weights(None, {"other.weight": (40, 40)})
    with pytest.raises(NFQError, match="40 input channels, the weight 41"):
        calibration.for_weights(None, {"q.weight": (50, 41)})
    with pytest.raises(NFQError, match="72 columns, the weight 200"):
        calibration.for_weights(None, {"conv.weight": (16, 8, 5, 5)})


def test_nothing_but_faults_is_no_other_model(calibration):
    bad = Calibration({}, faults=dict.fromkeys(calibration.inputs, "its inputs were all zero"))
    found, warnings = bad.for_weights(None, {"q.weight": (50, 40)})
    assert not found
    assert warnings == ["tensor 'q.weight' is quantised without calibration: its inputs were all zero"]


def test_one_prompt_is_told(calibration):
    calibration = Calibration(calibration.inputs, prompts=1)
    assert "only one prompt" in calibration.for_weights(None, {"q.weight": (50, 40)})[1][0]


def replaced(path, change_tensors=None, change_facts=None):
    """Write a calibration anew with changed tensors or facts."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[CALIBRATION_KEY])
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_facts:
        change_facts(facts)
    save_file(tensors, path, metadata={CALIBRATION_KEY: json.dumps(facts)})


def set_value(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


BAD_LAYERS = {
    "NaN": (set_value("importance.0", torch.nan), None, "NaN, Inf or negative"),
    "Inf": (set_value("importance.0", torch.inf), None, "NaN, Inf or negative"),
    "negative": (set_value("importance.0", -1.0), None, "NaN, Inf or negative"),
    "all zero": (lambda tensors: tensors["importance.0"].zero_(), None, "all zero"),
    "NaN in the correlation": (set_value("correlation.0", torch.nan), None, "correlation holds NaN or Inf"),
    "beyond all sums": (set_value("importance.0", 1e31), None, "beyond 1e+30"),
    "a correlation beyond 1": (set_value("correlation.0", 1.02), None, "correlation holds numbers beyond 1"),
    "too few": (None, lambda facts: facts["rows"].__setitem__(0, 31), "only 31 inputs were seen, 32 are needed"),
}


@pytest.mark.parametrize(("tensors", "facts", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_bad_layer_falls_back(saved, tensors, facts, message, caplog):
    replaced(saved, tensors, facts)
    calibration, weights = Calibration.load(saved), Model().state_dict()
    assert list(calibration.faults) == ["conv.weight"]
    with caplog.at_level(logging.WARNING):
        result = nfq_core.quantize_state_dict(weights, levels=16, calibration=calibration)
    assert "'conv.weight' is quantised without calibration" in caplog.text
    assert message in caplog.text
    assert torch.equal(result["conv.weight"].data, quantize(weights["conv.weight"], 32).data)


def rename(old: str, new: str):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


BAD_FILES = {
    "a statistic is missing": (rename("importance.1", "importance.9"), None, "importance.1"),
    "another dtype": (lambda t: t.update({"importance.0": t["importance.0"].half()}), None, "must be 1-D F32"),
    "another shape": (lambda t: t.update({"importance.0": torch.ones(2, 4)}), None, "must be 1-D F32"),
    "empty": (lambda t: t.update({"importance.0": torch.ones(0)}), None, "not empty"),
    "a correlation of other columns": (
        lambda t: t.update({"correlation.0": torch.ones(71, 71).half()}),
        None,
        "multiple of the input channels",
    ),
    "a correlation of too high rank": (
        lambda t: t.update({"correlation.0": torch.ones(72, 73).half()}),
        None,
        "correlation.0",
    ),
    "a weight without statistics": (None, lambda f: f["weights"].update({"q.weight": 9}), "are missing"),
    "a count that is none": (None, lambda f: f["rows"].__setitem__(0, -1), "is invalid"),
    "prompts that are no count": (None, lambda f: f.update({"prompts": "many"}), "is invalid"),
    "an architecture that is no text": (None, lambda f: f.update({"architecture": 5}), "is invalid"),
    "a fact is missing": (None, lambda f: f.pop("rows"), "rows"),
    "a sensitivity of another weight": (None, lambda f: f.update(sensitivities={"p.weight": 1}), "'p.weight', which"),
    "a negative sensitivity": (None, lambda f: f.update(sensitivities={"q.weight": -1}), "not negative"),
    "a sensitivity that is NaN": (None, lambda f: f.update(sensitivities={"q.weight": torch.nan}), "NaN is not a JSON"),
    "a sensitivity that is true": (None, lambda f: f.update(sensitivities={"q.weight": True}), "not negative"),
    "sensitivities that have no names": (None, lambda f: f.update(sensitivities=[1.0]), "damaged"),
    "weights that are no names": (None, lambda f: f.update({"weights": [1, 2]}), "damaged"),
}


@pytest.mark.parametrize(("tensors", "facts", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_damaged_files(saved, tensors, facts, message):
    replaced(saved, tensors, facts)
    with pytest.raises(CorruptFileError, match=message) as caught:
        Calibration.load(saved)
    assert str(saved) in str(caught.value)


def test_files_that_are_no_calibrations(saved, model_file, tmp_path):
    with pytest.raises(UnsupportedFileError, match="is not a calibration"):
        Calibration.load(model_file)
    replaced(saved, None, lambda facts: facts.update({"version": 2}))
    with pytest.raises(UnsupportedFileError, match=r"version 2.* update"):
        Calibration.load(saved)
    with pytest.raises(NFQError, match="no such file"):
        Calibration.load(tmp_path / "missing")
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="cut short"):
        Calibration.load(saved)
