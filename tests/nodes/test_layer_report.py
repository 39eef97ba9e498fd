"""What NFInspect and the chart show of a MODEL's errors, in a stub of the host."""

from __future__ import annotations

import importlib
import json
import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from samples import random_half

import nfq_core
from nfq_core.decibels import sqnr_db


@pytest.fixture
def report(plugin: ModuleType) -> ModuleType:
    return importlib.import_module(f"{plugin.__name__}.nodes.report")


def facts_of(
    report: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    layers: dict[str, nfq_core.NFTensor],
    sqnr: dict[str, float],
    before: dict[str, torch.Tensor] | None = None,
    expected: dict[str, float] | None = None,
) -> dict:
    """`model_facts` of a MODEL with these packed weights, errors measured earlier, and original weights."""
    packed = [(report.UNET + name, SimpleNamespace(weight=weight)) for name, weight in layers.items()]
    patches = {report.UNET + name: [(weight, lambda same: same)] for name, weight in (before or {}).items()}
    origin = SimpleNamespace(
        sqnr=sqnr,
        file_name="",
        settings={"levels": 16},
        source=SimpleNamespace(name="", sha256=""),
        expected=expected or {},
    )
    monkeypatch.setattr(report, "provenance", lambda model, refusal: origin)
    monkeypatch.setattr(report, "nf_layers", lambda model: packed)
    for name in ("unwrap", "dense", "without_dynamic_vram"):
        monkeypatch.setattr(report, name, lambda same: same)
    monkeypatch.setattr(report, "key_patches", lambda model: patches)
    model = SimpleNamespace(model=None, model_size=lambda: 5000)
    found = report.model_facts(model, "original" if before else None)
    json.dumps(found, allow_nan=False)
    return found


@pytest.fixture
def layers() -> dict[str, nfq_core.NFTensor]:
    # 4,096 and 8,192 weights.
    return {name: nfq_core.quantize(random_half(rows, 64), 16) for name, rows in (("a.weight", 64), ("b.weight", 128))}


def test_errors_measured_while_quantising_add_up_as_noise(report, monkeypatch, layers):
    found = facts_of(report, monkeypatch, layers, {"a.weight": 10.0, "b.weight": 20.0})
    # Noise 0.1 of a third, 0.01 of two thirds: 0.04.
    assert found["sqnr_db"] == pytest.approx(-10 * math.log10(0.04), abs=1e-3)
    assert [layer["sqnr_db"] for layer in found["layers"]] == [10, 20]
    text = report.as_text(found).splitlines()
    assert "SQNR 13.98 dB over all layers (signal-to-quantisation-noise ratio, higher is better)" in text
    assert text[-1].endswith("bits   20.00 dB  b.weight")


def test_what_a_calibration_was_worth_is_told(report, monkeypatch, layers):
    found = facts_of(report, monkeypatch, layers, {}, expected={"output_db": 31.0, "calibration_db": 4.5})
    assert found["expected"] == {"output_db": 31.0, "calibration_db": 4.5}
    assert (
        "the output differs by about 2.8% from the original's (31.0 dB, +4.5 dB by the calibration; predicted)"
        in report.as_text(found)
    )


def test_an_exact_layer_adds_weights_and_no_noise(report, monkeypatch, layers):
    found = facts_of(report, monkeypatch, layers, {"a.weight": 10.0, "b.weight": math.inf})
    assert found["sqnr_db"] == pytest.approx(10 + 10 * math.log10(3), abs=1e-3)
    assert [layer["sqnr_db"] for layer in found["layers"]] == [10, None]
    assert report.as_text(found).endswith("bits      equal  b.weight")
    found = facts_of(report, monkeypatch, layers, {"a.weight": math.inf, "b.weight": math.inf})
    assert found["sqnr_db"] is None and "SQNR equal over all layers" in report.as_text(found)


def test_errors_that_were_not_measured_are_left_out(report, monkeypatch, layers):
    found = facts_of(report, monkeypatch, layers, {})
    assert "sqnr_db" not in found and not any("sqnr_db" in layer for layer in found["layers"])
    assert "SQNR" not in report.as_text(found) and " dB" not in report.as_text(found)


def test_errors_against_an_original(report, monkeypatch, layers):
    before = {"a.weight": random_half(64, 64), "b.weight": layers["b.weight"].dequantize()}
    found = facts_of(report, monkeypatch, layers, {"a.weight": 1.0}, before)
    wanted = sqnr_db(before["a.weight"], layers["a.weight"].dequantize())
    assert [layer["sqnr_db"] for layer in found["layers"]] == [pytest.approx(wanted, abs=1e-3), None]
    assert found["sqnr_db"] == pytest.approx(wanted + 10 * math.log10(3), abs=1e-3)


@pytest.mark.parametrize("other", [torch.zeros(64, 64), torch.full((64, 64), math.nan)])
def test_another_original_is_refused(report, monkeypatch, layers, other):
    with pytest.raises(report.NFQError, match=r"weight 'a\.weight' is not what was quantised; connect the MODEL that"):
        facts_of(report, monkeypatch, layers, {}, {"a.weight": other, "b.weight": random_half(128, 64)})
