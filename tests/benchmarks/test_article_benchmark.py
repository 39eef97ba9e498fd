"""The article's experiment, done quickly: every stage goes through the core, and grid and tables say what they show."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the demo model needs diffusers")
pytest.importorskip("PIL", reason="the grid needs Pillow")

from PIL import Image
from sdxl_folder import make_folder

from benchmarks.article import __main__ as article
from benchmarks.article import models as article_models
from benchmarks.quality import judge
from benchmarks.shared import call_seconds, machine
from benchmarks.speed import int8
from nfq_core import NFQError, load
from nfq_core.checkpoints.examine import verify_file
from nfq_core.report.sheet import CAPTION_WIDTH

CAPTIONS = ("a large red circle on a white background", "a large purple heart on a yellow background")


@pytest.fixture(scope="module")
def demo() -> article_models.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(article_models, "CAPTIONS", CAPTIONS)
        yield article_models.demo_model(steps=2)


@pytest.fixture(scope="module")
def results(demo: article_models.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("article")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(article, "PROMPTS", article.PROMPTS[:2])
        found = article.run(demo, folder, folder / "made" / "grid.png", levels=(16,))
    return {"machine": machine(), **json.loads(json.dumps(found))}, folder


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


def test_the_side_rows(results: tuple[dict, Path]) -> None:
    found, _ = results
    activations, dynamic, weight_only = found["int8_activations"], found["torch_dynamic_int8"], found["levels"][0]
    assert activations["file_bytes"] == weight_only["file_bytes"]
    assert activations["psnr_db"] != weight_only["psnr_db"]
    assert activations["psnr_db"] == pytest.approx(weight_only["psnr_db"], abs=3)
    weights = article_models.split_weights(article_models.load_weights())[0]
    linear = sum(tensor.numel() for tensor in weights.values() if tensor.dim() == 2)
    assert dynamic["file_bytes"] == found["original_bytes"] - linear
    assert dynamic["sqnr_db"] > weight_only["sqnr_db"]


def test_the_grid_has_a_row_for_each_model(demo: article_models.Model, tmp_path: Path) -> None:
    greys = np.array([[10, 40, 70], [100, 130, 160]], np.uint8)
    pictures = np.broadcast_to(greys[..., None, None, None], (2, 3, 32, 32, 3))
    model = dataclasses.replace(demo, captions=("one", "two", "three"))
    article.write_grid(tmp_path / "grid.png", model, list(zip(("first", "second"), pictures, strict=True)))
    with Image.open(tmp_path / "grid.png") as grid:
        found = np.asarray(grid)[-2 * 136 :, CAPTION_WIDTH:]
    assert found.shape[1] == 3 * 136 + 8
    assert np.array_equal(found[64::136, 72::136, 0], greys)


def test_the_tables(results: tuple[dict, Path]) -> None:
    text = article.table(results[0])
    sizes, times, remarks = text.split("\n\n")
    assert [line.split(" | ")[0].strip("| ") for line in sizes.splitlines()[2:]] == [
        "fp16",
        "16 levels",
        article.INT8_ACTIVATIONS,
        article.DYNAMIC_INT8,
    ]
    assert "about an hour, SDXL" in times and "cannot read the article's prompts" in remarks and "seed 42" in remarks


@pytest.mark.parametrize(("levels", "said"), [(32, "1/3"), (16, "–"), (7, "about 1/5")])
def test_the_articles_own_sizes_stand_beside_ours(results: tuple[dict, Path], levels: int, said: str) -> None:
    row = results[0]["levels"][0] | {"levels": levels}
    cells = article._sizes_table(results[0] | {"levels": [row]}).splitlines()[3].split(" | ")
    assert cells[0].endswith(f"{levels} levels") and cells[3] == said


def test_the_articles_own_times_are_scaled_by_the_weights() -> None:
    row = {"levels": 16, "quantized_weights": 3_000_000, "seconds": dict.fromkeys(article.STAGES, 1.5)}
    text = article._times_table({"levels": [row], "article": article.RECORDED})
    # Medians of 0.231 and 0.065 seconds per million weights.
    assert re.search(r"quantise, save \| 0\.69 \|", text) and re.search(r"dequantise all \| 0\.2\d? \|", text)
    assert "| together | 9.00 | about an hour, SDXL |" in text


def test_calls_are_timed() -> None:
    layer = nn.Linear(4, 4)
    with call_seconds(layer) as seconds:
        for _ in range(3):
            layer(torch.zeros(1, 4))
    layer(torch.zeros(1, 4))
    assert len(seconds) == 3 and min(seconds) > 0


def test_an_sdxl_folder_goes_the_same_way(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers", reason="SDXL's pipeline needs transformers")
    sdxl_folder = make_folder(tmp_path / "sdxl", variant="fp16")
    monkeypatch.setattr(article, "PROMPTS", article.PROMPTS[:1])
    monkeypatch.setattr(article_models, "PROMPTS", article.PROMPTS)
    model = article_models.folder_model(sdxl_folder, device="cpu", steps=2)
    found = article.run(model, tmp_path, tmp_path / "grid.png", levels=(16,))
    assert found["captions"] == [{"prompt": article.PROMPTS[0], "drawn": article.PROMPTS[0]}] and not found["note"]
    row = found["levels"][0]
    assert row["step_seconds"]["runs"] == 2 and verify_file(tmp_path / "article-nf16.nfq.safetensors")["ok"]
    assert (tmp_path / "grid.png").exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(NFQError, match=r"holds no unet/diffusion_pytorch_model\.fp16\.safetensors or unet/"):
        article_models.folder_model(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert article.main(["--model", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith(f"diffusers makes no SDXL pipeline of {tmp_path}: ")


@pytest.mark.parametrize("arguments", [["--model", "folder"], ["--steps", "3"], ["--steps", "0"]])
def test_wrong_usage_ends_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        article.main(arguments)


def test_int8_is_measured_on_the_demo_model(demo: article_models.Model, monkeypatch) -> None:
    monkeypatch.setattr(judge, "OUTPUT_BATCH", 2)
    monkeypatch.setattr(int8, "demo_model", lambda steps: demo)
    found = int8.demo(levels=(16,), rounds=2)
    row = found["levels"][0]
    exact, rounded = row[int8.PACKED], row[int8.INT8]
    assert rounded["against_packed"]["output_db"] > exact["output_db"] + 6
    assert rounded["output_db"] < exact["output_db"] + 1
    assert row["layers"]["in_int8"] > 50 and row["layers"]["worst"][0]["db"] <= row["layers"]["median_db"]
    assert found[int8.DYNAMIC]["output_db"] > exact["output_db"]
    layers = [((32, 64, 48), int8.layer_times((32, 64, 48), torch.device("cpu"), rounds=2))]
    assert {ms["runs"] for ms in (*layers[0][1].values(), *found["step_ms"].values())} == {2}
    text = int8.table({"demo": found, "layers": json.loads(json.dumps(layers))})
    assert "| 16 levels |" in text and "| 32 tokens, 64 → 48 |" in text


def test_a_shape_that_is_not_multiplied_in_int8_is_not_timed() -> None:
    with pytest.raises(ValueError, match="17 tokens are needed"):
        int8.layer_times((16, 64, 64), torch.device("cpu"), rounds=1)


def test_int8_on_another_device_leaves_the_cpus_results():
    paths = [int8.results_path(torch.device(device)) for device in ("cpu", "cuda:1")]
    assert [path.name for path in paths] == ["int8.json", "int8-cuda.json"]
