"""`nfq quantize --dry-run`: what it prints comes true, and nothing is written."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import save_file

from nfq_core import NFQError, Settings
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.dry_run import forecast_file, forecast_lines, forecast_seconds
from nfq_core.checkpoints.examine import file_info
from nfq_core.demo.model import bundled_weights_path
from nfq_core.planning import forecast as planning_forecast
from nfq_core.planning.settings import PRESETS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gaussian weights, some of them large enough for several frames, and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.to_q.weight": (1280, 640), "a.ff.net.2.weight": (640, 640), "b.conv.weight": (160, 160, 3, 3)}
    tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(tensors | {"bias": torch.randn(300).half()}, path)
    return path


SETTINGS = [
    *({"preset": preset} for preset in PRESETS),
    {"levels": 16},
    {"levels": 32, "conv_levels": 24},
    {"levels": 12, "conv_levels": 7},
    {"format": "nf256_b64", "conv_format": "nf4_b64"},
    {"target_bytes": 700_000},
]


CASES = [("model", given) for given in SETTINGS]
CASES += [("demo", given) for given in ({"preset": "large"}, {"preset": "tiny"}, {"levels": 16})]


@pytest.mark.parametrize(("source", "given"), CASES, ids=str)
def test_the_file_has_the_size_and_formats_that_were_expected(
    model: Path, tmp_path: Path, source: str, given: dict
) -> None:
    path, target = model if source == "model" else bundled_weights_path(), tmp_path / "x.nfq.safetensors"
    settings = Settings.of(**given)
    expected = forecast_file(path, target, settings)
    assert expected["layers"][0].keys() == {"name", "format", "shape", "bits_per_weight", "expected_sqnr_db"}
    assert not target.exists()
    made = quantize_file(path, target, settings)
    assert expected["file_bytes"] == pytest.approx(made["file_bytes"], rel=0.01)
    info = file_info(target)
    if "target_bytes" not in given:
        # A size is approached by writing files; the forecast approaches it by estimates.
        formats = {layer["name"]: (layer["format"], layer["shape"]) for layer in info["layers"]}
        assert {layer["name"]: (layer["format"], layer["shape"]) for layer in expected["layers"]} == formats
        assert expected["packed_bits_per_weight"] == pytest.approx(info["packed_bits_per_weight"], rel=2e-3)


def test_best_takes_longer_and_is_closer(model: Path, tmp_path: Path) -> None:
    fast, best = (
        forecast_file(model, tmp_path / "x", Settings.of(preset="small", effort=effort)) for effort in ("fast", "best")
    )
    assert best["seconds"] > 2 * fast["seconds"]
    assert best["expected_sqnr_db"] > fast["expected_sqnr_db"]


def test_seconds_are_those_of_this_machine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_forecast, "pace", lambda: 1.0)
    seconds = forecast_seconds(model, Settings())
    assert forecast_file(model, tmp_path / "x")["seconds"] == pytest.approx(seconds, abs=1e-3)
    monkeypatch.setattr(planning_forecast, "pace", lambda: 3.0)
    assert forecast_seconds(model, Settings()) == pytest.approx(3 * seconds)
    assert forecast_seconds(model, Settings(), calibrated=True) > 3 * seconds


def test_the_pace_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when several threads ask at once: two measurements would disturb each other."""
    measured = []

    def measure() -> float:
        measured.append(1)
        time.sleep(0.05)
        return 2 * planning_forecast.PACE_SECONDS

    monkeypatch.setattr(planning_forecast, "measure_pace", measure)
    planning_forecast._pace.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: planning_forecast.pace(), range(4))) == [2.0] * 4
    assert len(measured) == 1
    planning_forecast._pace.cache_clear()


def test_the_pace_is_that_of_the_usual_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the first, which allocates memory, nor of one that had a core for itself."""
    monkeypatch.setattr(planning_forecast, "ordered_map", lambda *_, **__: [9.0, 2.0, 1.0])
    assert planning_forecast.measure_pace() == 2.0


def test_the_time_on_a_gpu_is_unknown(model: Path, tmp_path: Path) -> None:
    found = forecast_file(model, tmp_path / "x", device="cuda")
    assert found["seconds"] is None
    assert not re.search(r"takes about \d", "\n".join(forecast_lines(found)))
    assert re.search(r"takes about \d", "\n".join(forecast_lines(forecast_file(model, tmp_path / "x"))))


def test_in_json_and_in_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = json.loads(run(capsys, "quantize", model, "--preset", "small", "--dry-run", "--json")[1])
    assert found.keys() >= {
        "layers",
        "file_bytes",
        "packed_bits_per_weight",
        "expected_output_db",
        "expected_sqnr_db",
        "seconds",
    }
    assert found["target"].endswith("model-small.nfq.safetensors") and found["packed_bits_per_weight"] <= 3.4
    code, out, error = run(capsys, "quantize", model, "--preset", "small", "--dry-run")
    assert code == 0, error
    formats = Counter(layer["format"] for layer in found["layers"])
    assert len(formats) > 1 and all(
        f"{count} layer" in out and f" as {name}\n" in out for name, count in formats.items()
    )
    assert len(out.splitlines()) < 20
    assert "model-small.nfq.safetensors: about " in out and out.endswith("nothing was written\n")
    assert list(model.parent.iterdir()) == [model]


def test_an_impossible_size_and_a_quantised_source_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NFQError, match="10 bytes are too few"):
        forecast_file(model, tmp_path / "x", Settings.of(target_bytes=10))
    quantize_file(model, tmp_path / "x.nfq.safetensors")
    with pytest.raises(NFQError, match="quantised already"):
        forecast_file(tmp_path / "x.nfq.safetensors", tmp_path / "y")


def test_a_model_without_weights(tmp_path: Path) -> None:
    save_file({"bias": torch.zeros(8)}, tmp_path / "a.safetensors")
    found = forecast_file(tmp_path / "a.safetensors", tmp_path / "x")
    assert found["layers"] == [] and found["expected_sqnr_db"] is None
    assert found["file_bytes"] == quantize_file(tmp_path / "a.safetensors", tmp_path / "x")["file_bytes"]
    assert "nothing was written" in forecast_lines(found)[-1]
