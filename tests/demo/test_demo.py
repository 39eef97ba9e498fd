"""The bundled model is a real, trained one of SDXL's architecture, and `nfq demo` tells the whole story with it."""

import json
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the demo needs diffusers")
pytest.importorskip("PIL", reason="the demo needs Pillow")

from commands import run as command
from PIL import Image

from nfq_core import NFQError, TargetExistsError
from nfq_core.calibration.statistics import Calibration
from nfq_core.checkpoints.examine import verify_file
from nfq_core.demo import calibrate, run
from nfq_core.demo.model import bundled_weights_path, load_weights, sample
from nfq_core.demo.shapes import (
    COLOURS,
    MAX_WORDS,
    SCENE_COUNT,
    SHAPES,
    SIZES,
    VOCABULARY,
    Scene,
    Thing,
    describe,
    draw,
    random_scene,
    tokenise,
)
from nfq_core.files.safetensors_io import describe as describe_tensors
from nfq_core.packed.formats import LEVELS
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import Formats, Settings

CAPTIONS = ("a large red circle on a white background", "a large purple heart on a yellow background")


@pytest.fixture(scope="module")
def pictures():
    return sample(run.build_pipeline(load_weights()), CAPTIONS, seed=0, steps=12)


def test_bundled_weights_are_small_fp16_and_mostly_linear():
    weights = load_weights()
    total = sum(tensor.numel() for tensor in weights.values())
    linear = sum(tensor.numel() for tensor in weights.values() if tensor.dim() == 2)
    assert 4_000_000 <= total <= 9_000_000
    assert linear / total > 0.65
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert bundled_weights_path().stat().st_size < 20_000_000


@pytest.mark.parametrize(("index", "shape", "background"), [(0, "red", "white"), (1, "purple", "yellow")])
def test_drawn_colours_are_those_of_the_caption(pictures, index, shape, background):
    picture = pictures[index] / 255
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    centre = picture[14:18, 14:18].mean(axis=(0, 1))

    def nearest(colour):
        return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - colour).sum())

    assert nearest(corners) == background
    assert nearest(centre) == shape


def test_a_picture_depends_on_its_own_seed_alone(pictures):
    alone = sample(run.build_pipeline(load_weights()), CAPTIONS[:1], seed=0, steps=12)
    # Batches of other sizes may sum in another order; pixels then differ by a rounding.
    assert np.abs(alone[0].astype(int) - pictures[0]).max() <= 1


def test_one_seed_can_serve_several_pictures():
    pipeline = run.build_pipeline(load_weights())
    twice = sample(pipeline, CAPTIONS[:1] * 2, seed=[5, 5], steps=1)
    assert np.array_equal(twice[0], twice[1])
    apart = sample(pipeline, CAPTIONS[:1] * 2, seed=5, steps=1)
    assert np.array_equal(apart[0], twice[0]) and not np.array_equal(apart[1], twice[1])


def test_the_demo_model_is_calibrated(tmp_path, monkeypatch):
    for name, value in {"STEPS": 2, "NOISY_BATCHES": 1, "LAYERS_PER_BATCH": 3}.items():
        monkeypatch.setattr(calibrate, name, value)
    report = calibrate.calibrate_demo(tmp_path / "a", 2)
    assert (report["prompts"], report["file_bytes"]) == (2, (tmp_path / "a").stat().st_size)
    calibration = Calibration.load(tmp_path / "a")
    assert report["sensitivities"] == len(calibration.sensitivities) == 3
    assert all(value > 0 for value in calibration.sensitivities.values())
    assert (calibration.prompts, calibration.steps) == (2, 2)
    # All cross-attention reads the same captions.
    contexts = {id(inputs) for name, inputs in calibration.inputs.items() if name.endswith("attn2.to_k.weight")}
    assert len(contexts) == 1
    weights = load_weights()
    entries = describe_tensors(weights)
    info, plans = plan_tensors(entries, Settings(Formats()))
    found, warnings = calibration.for_plans(info, plans)
    assert found.keys() == {key for key, plan in plans.items() if plan.format}
    assert not warnings
    with pytest.raises(TargetExistsError, match="overwrite=True"):
        calibrate.calibrate_demo(tmp_path / "a", 2)


def test_held_out_captions_are_others():
    captions = calibrate.random_captions(50)
    assert len(set(captions)) == 50
    others = calibrate.random_captions(50, without=captions)
    assert not set(captions) & set(others)


def test_all_scenes_have_captions_of_their_own():
    one = [
        Scene((Thing(size, colour, shape),), background)
        for background, colour in permutations(COLOURS, 2)
        for size, shape in product(SIZES, SHAPES)
    ]
    two = [
        Scene((Thing("", left, shape), Thing("", right, other)), background)
        for background, left, right in permutations(COLOURS, 3)
        for shape, other in permutations(SHAPES, 2)
    ]
    assert SCENE_COUNT == len(set(map(describe, one + two))) == 42_480


@pytest.mark.parametrize("prompts", [0, SCENE_COUNT + 1])
def test_more_captions_than_there_are(capsys, tmp_path, prompts):
    code, out, error = command(capsys, "calibrate-demo", tmp_path / "a", "--prompts", prompts)
    assert (code, out) == (1, "") and not any(tmp_path.iterdir())
    assert f"--prompts must be from 1 to 42,480 (all captions), got {prompts}" in error


def test_captions_fit_the_vocabulary():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(rng)
        ids = tokenise([describe(scene)])
        assert ids.shape == (1, MAX_WORDS)
        assert ids.max() < len(VOCABULARY)
        picture = draw(scene, rng)
        assert picture.shape == (32, 32, 3)
        assert 0 <= picture.min() <= picture.max() <= 1


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="violet"):
        tokenise(["a violet circle"])


def test_the_demo_writes_pictures_report_and_sound_files(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CAPTIONS", CAPTIONS)
    monkeypatch.setattr(run, "STEPS", 4)
    report = run.run_demo(tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    rows = report["levels"]
    assert [row["levels"] for row in rows] == list(LEVELS)
    for better, worse in pairwise(rows):
        assert better["bits_per_weight"] > worse["bits_per_weight"]
        assert better["file_bytes"] > worse["file_bytes"]
        assert better["sqnr_db"] > worse["sqnr_db"]
    assert rows[0]["psnr_db"] > rows[-1]["psnr_db"]
    for row in rows:
        path = tmp_path / "out" / f"demo-nf{row['levels']}.nfq.safetensors"
        assert path.stat().st_size == row["file_bytes"]
        assert verify_file(path)["ok"]
    with Image.open(tmp_path / "out" / "comparison.png") as sheet:
        assert sheet.width > 6 * 128
        assert sheet.height > len(CAPTIONS) * 128
    with pytest.raises(TargetExistsError, match="overwrite=True"):
        run.run_demo(tmp_path / "out")


def test_a_copy_without_the_weights_says_so(tmp_path, monkeypatch):
    """As the ComfyUI registry distributes it."""
    monkeypatch.setattr("nfq_core.demo.model.__file__", str(tmp_path / "model.py"))
    with pytest.raises(NFQError, match=r"demo\.safetensors is missing: .*; use a clone of the repository"):
        bundled_weights_path()
