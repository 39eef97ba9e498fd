"""Calibrations put together: the same as if all their inputs had been collected at once."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from samples import moment_matrix, random_weight
from torch import nn

from nfq_core import Calibration, NFQError, collect
from nfq_core.calibration.merging import merge_calibrations
from nfq_core.calibration.statistics import LayerInputs
from nfq_core.cli import main


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(40, 8), nn.Linear(40, 8)
        self.conv = nn.Conv2d(180, 4, 1)

    def forward(self, seed: int, rows: int) -> None:
        tokens = random_weight(rows, 6, seed=seed) @ random_weight(6, 40, seed=seed + 1)
        self.q(tokens)
        self.k(tokens)
        # Twenty sources each: a second moment of rank 60 in all.
        sources, mixture = random_weight(2, 9, 9, 20, seed=seed), random_weight(20, 180, seed=seed + 1)
        self.conv((sources @ mixture).permute(0, 3, 1, 2) * (seed + 1))


PARTS = ((3, 50), (4, 200), (5, 100))


def collected(*parts: tuple[int, int], **options: object) -> Calibration:
    model = Model()
    with collect(model, **{"hessians": True, "rank": 64, **options}) as sums, torch.no_grad():
        for seed, rows in parts:
            model(seed, rows)
    return sums.calibration(prompts=len(parts), steps=20)


@pytest.mark.parametrize("rank", [96, 64])
def test_the_same_as_collected_at_once(rank: int) -> None:
    """Up to 192 columns are whole at rank 96; at rank 64 the convolution's 180 are a factor of as low a rank."""
    merged, warnings = merge_calibrations([collected(part, rank=rank) for part in PARTS])
    wanted = collected(*PARTS, rank=rank)
    assert not warnings and (merged.prompts, merged.steps) == (3, 20)
    assert merged.inputs["q.weight"] is merged.inputs["k.weight"]
    for name, inputs in wanted.inputs.items():
        found = merged.inputs[name]
        assert found.rows == inputs.rows
        assert torch.allclose(found.importance, inputs.importance, rtol=1e-4)
        assert found.correlation.shape == inputs.correlation.shape
        moments = [moment_matrix(each.second_moment()) for each in (found, inputs)]
        # Correlations and factors are rounded to fp16.
        assert (moments[0] - moments[1]).norm() < 2e-3 * moments[1].norm()


def test_a_convolution_with_itself_stays_what_it_was() -> None:
    factor = random_weight(45, 3)
    own = LayerInputs(random_weight(5).exp(), 100, (factor / factor.norm(dim=1, keepdim=True)).half())
    merged = merge_calibrations([Calibration({"a": own})] * 2)[0].inputs["a"]
    assert merged.taps == 9 and merged.correlation.shape == (45, 3)
    moments = [moment_matrix(each.second_moment()) for each in (own, merged)]
    assert torch.allclose(*moments, atol=5e-3)


def test_ranks_may_differ() -> None:
    low, whole = collected(PARTS[0], rank=64), collected(PARTS[1], rank=96)
    merged = merge_calibrations([low, whole])[0].inputs["conv.weight"]
    wanted = collected(*PARTS[:2], rank=96).inputs["conv.weight"]
    difference = merged.correlation.float() - wanted.correlation.float()
    difference.fill_diagonal_(0)
    assert merged.correlation.shape == (180, 180)
    assert difference.norm() < 2e-3 * wanted.correlation.float().norm()


def simple(value: float, rows: int, **options: object) -> Calibration:
    return Calibration({"a": LayerInputs(torch.full((4,), value), rows)}, **options)


def test_by_hand() -> None:
    merged = merge_calibrations(
        [
            simple(1.0, 100, prompts=2, steps=20, sensitivities={"a": 2.0}),
            simple(5.0, 300, prompts=3, steps=30, sensitivities={"a": 6.0}),
            simple(9.0, 100),
        ]
    )[0]
    # (100 · 1 + 300 · 5 + 100 · 9) / 500; of the sensitivities, the last one is not known: (100 · 2 + 300 · 6) / 400.
    assert merged.inputs["a"].importance.tolist() == [5.0] * 4
    assert merged.inputs["a"].rows == 500
    assert merged.sensitivities == {"a": 5.0}
    assert merged.prompts is None and merged.steps is None


def test_a_layer_that_one_lacks_rests_on_the_others() -> None:
    both = simple(1.0, 100)
    both = dataclasses.replace(both, inputs={**both.inputs, "b": LayerInputs(torch.ones(7), 50)})
    faulty = simple(3.0, 100, faults={"b": "its inputs were all zero"})
    merged, warnings = merge_calibrations([both, faulty])
    assert merged.inputs["b"].importance.tolist() == [1.0] * 7
    assert warnings == ["calibration 2 lacks 'b' (its inputs were all zero); only the others are used for it"]


REFUSED = {
    "one alone": ([simple(1.0, 100)], "at least two calibrations, got 1"),
    "another architecture": (
        [simple(1.0, 100, architecture="SDXL"), simple(1.0, 100, architecture="SSD-1B")],
        "calibration 1 was made with SDXL, calibration 2 with SSD-1B",
    ),
    "another size": (
        [simple(1.0, 100), Calibration({"a": LayerInputs(torch.ones(5), 100)})],
        "layer 'a' has different sizes",
    ),
    "Hessians in one": (
        [simple(1.0, 100), Calibration({"a": LayerInputs(torch.ones(4), 100, torch.eye(4).half())})],
        "layer 'a' has a Hessian in only some",
    ),
    "nothing sound": ([Calibration({}), Calibration({})], "none of the calibrations has usable statistics"),
}


@pytest.mark.parametrize(("calibrations", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(calibrations: list[Calibration], message: str) -> None:
    with pytest.raises(NFQError, match=message):
        merge_calibrations(calibrations)


def test_the_command(tmp_path, capsys) -> None:
    for name, value in (("a", 1.0), ("b", 3.0)):
        simple(value, 100, prompts=4).save(tmp_path / name)
    arguments = ["merge-calibrations", *(str(tmp_path / name) for name in "abc")]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["weights"], report["prompts"], report["warnings"]) == (1, 8, [])
    assert report["file_bytes"] == (tmp_path / "c.safetensors").stat().st_size
    assert Calibration.load(tmp_path / "c.safetensors").inputs["a"].importance.tolist() == [2.0] * 4
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert main(["merge-calibrations", str(tmp_path / "a"), str(tmp_path / "d")]) == 1
    assert "at least two" in capsys.readouterr().err
