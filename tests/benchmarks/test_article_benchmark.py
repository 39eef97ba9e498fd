"""The article's experiment, done quickly: every stage goes through the core; int8 on the demo model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the demo model needs diffusers")
pytest.importorskip("PIL", reason="the grid needs Pillow")

from sdxl_folder import make_folder

from benchmarks import article
from benchmarks.quality import demo as quality_demo
from benchmarks.speed import int8
from benchmarks.speed.int8_layers import fits
from nfq_core import NFQError, load
from nfq_core.checkpoints.examine import verify_file

CAPTIONS = ("a large red circle on a white background", "a large purple heart on a yellow background")


@pytest.fixture(scope="module")
def demo() -> article.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(article, "CAPTIONS", CAPTIONS)
        yield article.demo_model(steps=2)


@pytest.fixture(scope="module")
def results(demo: article.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("article")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(article, "PROMPTS", article.PROMPTS[:2])
        found = article.run(demo, folder, folder / "made" / "grid.png", levels=(16,))
    return json.loads(json.dumps(found)), folder


def test_every_stage_went_through_files(results: tuple[dict, Path]) -> None:
    found, folder = results
    (row,) = found["levels"]
    path = folder / "article-nf16.nfq.safetensors"
    assert verify_file(path)["ok"] and path.stat().st_size == row["file_bytes"]
    formats = {len(t.shape): t.format.id for t in load(path).values() if not isinstance(t, torch.Tensor)}
    assert formats == {2: "nf16_b64", 4: "nf32_b64"}
    assert list(row["seconds"]) == list(article.STAGES) and min(row["seconds"].values()) > 0
    assert row["step_seconds"]["runs"] == found["fp16"]["step_seconds"]["runs"] == 2
    assert row["sqnr_db"] > row["article"]["sqnr_db"]
    assert row["article"]["bytes"] == pytest.approx(row["file_bytes"], rel=0.05)
    assert row["psnr_db"] > 20
    assert (folder / "made" / "grid.png").exists()


def test_the_error_of_all_weights_adds_up_as_noise() -> None:
    weights = {name: torch.tensor([1.0, -1.0] * count) for name, count in (("a", 3), ("b", 1), ("kept", 9))}
    # Noise 0.01 of three quarters of the weights, nothing of the rest.
    restored = {"a": weights["a"] * 1.1, "b": weights["b"]}
    assert article._error(weights, restored) == pytest.approx(20 + 10 * math.log10(4 / 3), abs=1e-4)


def test_int8_activations_and_dynamic_int8(results: tuple[dict, Path]) -> None:
    found, _ = results
    activations, dynamic, weight_only = found["int8_activations"], found["torch_dynamic_int8"], found["levels"][0]
    assert activations["file_bytes"] == weight_only["file_bytes"]
    assert activations["psnr_db"] != weight_only["psnr_db"]
    assert activations["psnr_db"] == pytest.approx(weight_only["psnr_db"], abs=3)
    weights = article.split_weights(article.load_weights())[0]
    linear = sum(tensor.numel() for tensor in weights.values() if tensor.dim() == 2)
    assert dynamic["file_bytes"] == found["original_bytes"] - linear
    assert dynamic["sqnr_db"] > weight_only["sqnr_db"]


def test_the_articles_own_times_are_scaled_by_the_weights() -> None:
    row = {"levels": 16, "quantized_weights": 3_000_000, "seconds": dict.fromkeys(article.STAGES, 1.5)}
    text = article.times_table({"levels": [row], "article": article.RECORDED})
    # The median is 0.231 seconds per million weights.
    assert "quantise, save | 0.69 |" in text


def test_an_sdxl_folder_goes_the_same_way(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers", reason="SDXL's pipeline needs transformers")
    sdxl_folder = make_folder(tmp_path / "sdxl", variant="fp16")
    monkeypatch.setattr(article, "PROMPTS", article.PROMPTS[:1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = article.folder_model(sdxl_folder, steps=2)
    found = article.run(model, tmp_path, tmp_path / "grid.png", levels=(16,))
    assert found["captions"] == [{"prompt": article.PROMPTS[0], "drawn": article.PROMPTS[0]}] and not found["note"]
    row = found["levels"][0]
    assert row["step_seconds"]["runs"] == 2 and verify_file(tmp_path / "article-nf16.nfq.safetensors")["ok"]
    assert (tmp_path / "grid.png").exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(NFQError, match=r"holds no unet/diffusion_pytorch_model\.fp16\.safetensors or unet/"):
        article.folder_model(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert article.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"diffusers makes no SDXL pipeline of {tmp_path}: ")


def test_wrong_usage_ends_with_two() -> None:
    with pytest.raises(SystemExit, match="2"):
        article.main(["--model", "folder"])


def test_int8_is_measured_on_the_demo_model(demo: article.Model, results: tuple[dict, Path], monkeypatch) -> None:
    monkeypatch.setattr(quality_demo, "OUTPUT_BATCH", 2)
    monkeypatch.setattr(int8, "demo_model", lambda steps: demo)
    # The same levels as in the article's experiment.
    packed = load(results[1] / "article-nf16.nfq.safetensors")
    monkeypatch.setattr(int8, "quantize_state_dict", lambda weights, levels: packed)
    found = int8.demo(levels=(16,), rounds=2)
    row = found["levels"][0]
    exact, rounded = row[int8.PACKED], row[int8.INT8]
    assert rounded["against_packed"]["output_db"] > exact["output_db"] + 6
    assert rounded["output_db"] < exact["output_db"] + 1
    assert row["layers"]["in_int8"] > 50 and row["layers"]["worst"][0]["db"] <= row["layers"]["median_db"]
    assert found[int8.DYNAMIC]["output_db"] > exact["output_db"]
    times = int8.layer_times((32, 64, 48), torch.device("cpu"), rounds=2)
    assert {ms["runs"] for ms in (*times.values(), *found["step_ms"].values())} == {2}


def test_every_timed_shape_is_multiplied_in_int8() -> None:
    assert all(fits(torch.empty(tokens, columns, device="meta"), rows) for tokens, columns, rows in int8.LINEAR_SHAPES)
