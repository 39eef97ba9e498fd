"""What is expected of a calibrated model's output: against rounding with error feedback, and by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import random_weight

from nfq_core import Calibration, quantize
from nfq_core.calibration.expectation import FEEDBACK_SHARE, expectation, feedback_factors
from nfq_core.calibration.statistics import LayerInputs
from nfq_core.checkpoints.examine import expected_in_words, file_info
from nfq_core.cli import main
from nfq_core.files.safetensors_io import describe
from nfq_core.fitting.feedback import SecondMoment, expected_gain
from nfq_core.planning.allocation import expected_noise
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import BitsPerWeight, Formats, Settings


def correlated_inputs(columns: int = 256) -> torch.Tensor:
    """4,096 inputs, two thirds of whose power is shared by a few directions."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, 8, generator=generator) @ torch.randn(8, columns, generator=generator) / 2
    return shared + torch.randn(4096, columns, generator=generator)


def test_the_gain_of_independent_inputs_is_none_and_grows_with_what_they_share() -> None:
    assert expected_gain(SecondMoment.of(torch.eye(128))) == pytest.approx(1.0, abs=1e-6)
    # Two columns with correlation r: the second one compensates all but 1 - r² of the first one's error.
    pairs = torch.block_diag(*[torch.tensor([[1.0, 0.6], [0.6, 1.0]])] * 64)
    assert expected_gain(SecondMoment.of(pairs)) == pytest.approx(math.sqrt(1 - 0.6**2), rel=0.02)


def test_the_gain_predicts_what_rounding_with_feedback_gains() -> None:
    inputs, weight = correlated_inputs(), random_weight(512, 256)
    moment = SecondMoment.of(inputs.T @ inputs / len(inputs))

    def noise(**statistics: object) -> float:
        error = weight.float() - quantize(weight, 16, **statistics).dequantize(torch.float32)
        return (inputs @ error.T).square().mean().item()

    gained = 10 * math.log10(noise() / noise(hessian=moment))
    assert gained > 3
    # Clipped and coarse steps gain less than fine ones.
    assert -10 * math.log10(expected_gain(moment)) == pytest.approx(gained, abs=1.0)


@pytest.fixture
def model() -> tuple[dict[str, torch.Tensor], Calibration]:
    weights = {f"layer{number}.weight": random_weight(64, 256, seed=number) for number in range(2)}
    inputs = correlated_inputs()
    moment = SecondMoment.of(inputs.T @ inputs / len(inputs))
    layers = LayerInputs(moment.diagonal, 4096, moment.correlation.half())
    sensitivities = {"layer0.weight": 1.0, "layer1.weight": 0.01}
    return weights, Calibration(dict.fromkeys(weights, layers), sensitivities=sensitivities)


def expected(weights: dict[str, torch.Tensor], settings: Settings, calibration: Calibration | None) -> dict[str, float]:
    entries = describe(weights)
    measured = calibration and calibration.sensitivities_of({key: entry.shape for key, entry in entries.items()})
    info, plans = plan_tensors(entries, settings, None if isinstance(settings.choice, Formats) else measured)
    return expectation(entries, settings, info, plans, calibration)


def test_in_fixed_formats_a_calibration_adds_what_feedback_is_expected_to_gain(model) -> None:
    weights, calibration = model
    factor = next(iter(feedback_factors(calibration.inputs).values()))
    found = expected(weights, Settings(Formats.of(16, 16)), calibration)
    gain = -10 * FEEDBACK_SHARE * math.log10(expected_gain(next(iter(calibration.inputs.values())).second_moment()))
    assert gain > 2 and -10 * math.log10(factor) == pytest.approx(gain)
    noise = 1.01 * expected_noise(Formats.of(16, 16).linear)
    assert found["calibration_db"] == pytest.approx(gain, abs=0.06)
    assert found["output_db"] == pytest.approx(gain - 10 * math.log10(noise), abs=0.06)


def test_at_a_size_measured_sensitivities_add_too(model) -> None:
    weights, calibration = model
    without_feedback = replace(
        calibration, inputs={name: replace(one, correlation=None) for name, one in calibration.inputs.items()}
    )
    settings = Settings(BitsPerWeight(4.1))
    both, choice = expected(weights, settings, calibration), expected(weights, settings, without_feedback)
    # Without a calibration both layers count alike; measured, the first one is worth nearly all bits.
    assert choice["calibration_db"] > 1
    assert both["calibration_db"] > choice["calibration_db"] + 2


def test_nothing_is_claimed_that_is_not_known(model) -> None:
    weights, calibration = model
    assert expected(weights, Settings(), None) == {}
    assert expected(weights, Settings(), replace(calibration, sensitivities={})) == {}


def test_result_dry_run_file_and_card_tell_the_same(model, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights, calibration = model
    source, statistics, target = (tmp_path / name for name in ("m.safetensors", "c.safetensors", "m.nfq.safetensors"))
    save_file(weights, source)
    calibration.save(statistics)
    arguments = ["quantize", str(source), str(target), "--preset", "small", "--calibration", str(statistics)]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--dry-run"]) == 0
    before = capsys.readouterr().out
    assert main(arguments) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told in before
    expected = file_info(target)["expected"]
    assert expected["calibration_db"] > 1
    assert [forecast["expected_output_db"], forecast["calibration_db"]] == list(expected.values())
    assert told == expected_in_words(expected)
    assert main(["card", str(target)]) == 0 and told in capsys.readouterr().out
