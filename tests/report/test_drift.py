"""Drift over seeds: the published protocol, its figures by hand, what is written, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log10
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import as_json, one_line, run
from safetensors.torch import load_file, save_file
from samples import TINY, random_unet

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.cli import report_commands as command
from nfq_core.cli.report_commands import make_painter
from nfq_core.planning.settings import Formats, Settings
from nfq_core.report import pictures, protocol
from nfq_core.report.card import card, card_facts
from nfq_core.report.drift import DPMPP_2M_KARRAS, DRIFT, PUBLISHED, drift_figures, drift_in_words, spread
from nfq_core.report.measure import measure
from nfq_core.report.plots import WIDTH, pixels, plots
from nfq_core.report.protocol import Sample, Series
from nfq_core.report.write import markdown, write_report

SHORT = replace(DRIFT, prompts=DRIFT.prompts[:3], seeds=DRIFT.seeds[:3], steps=2, side=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    save_file(random_unet(architecture=TINY), folder / "original.safetensors")
    for levels in (32, 12):
        name = f"nf{levels}.nfq.safetensors"
        quantize_file(folder / "original.safetensors", folder / name, Settings(Formats.of(levels)))
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return [folder / "nf32.nfq.safetensors", folder / "nf12.nfq.safetensors"]


@pytest.fixture(scope="module")
def measured(folder, files):
    """A report without pictures, as text, so that no test changes another's."""
    return json.dumps(measure(folder / "original.safetensors", files))


class Artist:
    """Draws grey that is brighter by one for each model before it and for each seed that ends in 7."""

    chosen = Series(("one",), (7,), 3, 16, 2.5)
    device = "cpu"
    has_latents = True

    def __init__(self) -> None:
        self.models = -1
        self.drawn: list[tuple[str, int]] = []

    def load(self, path) -> None:
        self.models += 1

    def draw(self, series):
        for prompt, seed in zip(series.prompts, series.seeds, strict=True):
            self.drawn.append((prompt, seed))
            shift = self.models * (1 + (seed % 10 == 7))
            latent = torch.tensor([1.0, 0.1 * shift]).view(2, 1, 1)
            yield Sample(latent, np.full((16, 16, 3), 100 + shift, np.uint8) if series.decoded else None)


def with_drift(measured: str, files: list[Path]) -> dict:
    report = json.loads(measured)
    pictures.add_pictures(report, "original", files, Artist(), drift=SHORT)
    return report


def test_the_protocol_is_the_published_one():
    assert len(DRIFT.prompts) == len(DRIFT.seeds) == len(set(DRIFT.seeds)) == 25 and len(set(DRIFT.prompts)) == 1
    assert (DRIFT.steps, DRIFT.guidance, DRIFT.sampler, DRIFT.side) == (25, 7.0, "dpmpp_2m, karras", 1024)
    assert DRIFT.decoded and DRIFT.all_steps() == 625
    native = PUBLISHED[0]
    assert (native.cosine, native.ssim, native.psnr_db[0]) == ((0.93,), (0.964, 0.932, 0.989), 38.0)
    for one in PUBLISHED:
        for mean, smallest, largest in (one.ssim, one.psnr_db):
            assert smallest < mean < largest


def test_spread_by_hand():
    assert spread([1.0, 4.0, 1.0]) == {"mean": 2.0, "min": 1.0, "max": 4.0}
    # None is infinite: equal pictures.
    assert spread([1.0, None, 3.0]) == {"mean": 2.0, "min": 1.0, "max": None}
    assert spread([None, None]) == {"mean": None, "min": None, "max": None}


def test_figures_by_hand():
    def sample(latent: list[float], grey: int) -> Sample:
        return Sample(torch.tensor(latent).view(2, 1, 1), np.full((4, 4, 3), grey, np.uint8))

    reference = [sample([3.0, 4.0], 100), sample([1.0, 0.0], 100)]
    found = drift_figures(reference, [sample([4.0, 3.0], 105), sample([2.0, 0.0], 100)])
    one, two = found["each"]
    assert one["cosine"] == pytest.approx(24 / 25) and two["cosine"] == pytest.approx(1)
    assert one["psnr_db"] == pytest.approx(20 * log10(255 / 5)) and two["psnr_db"] is None
    # Without structure, only the luminance remains of SSIM.
    c1 = 2.55**2
    assert one["ssim"] == pytest.approx((2 * 100 * 105 + c1) / (100**2 + 105**2 + c1)) and two["ssim"] == 1
    assert found["cosine"] == pytest.approx({"mean": 0.98, "min": 0.96, "max": 1})
    assert found["psnr_db"] == {"mean": one["psnr_db"], "min": one["psnr_db"], "max": None}
    assert drift_in_words(found)["cosine"] == "0.9800 (0.9600–1.0000)"
    assert drift_in_words(found)["psnr_db"] == "34.2 (34.2–equal)"


def test_what_is_drawn_and_recorded(measured, files):
    report, artist, seen = json.loads(measured), Artist(), []
    pictures.add_pictures(report, "original", files, artist, drift=SHORT, progress=lambda *args: seen.append(args[:2]))
    # One picture of three steps, Apple's eight of one, three of two: for each of three models.
    assert pictures.work(artist, SHORT) == (12, 17) and seen[-1] == (51, 51) and len(seen) == 36
    drift = list(zip(SHORT.prompts, SHORT.seeds, strict=True))
    assert artist.drawn[9:12] == artist.drawn[-3:] == drift
    assert report["drift"] == {
        "prompt": "masterpiece, best quality, 1girl, solo, standing, simple background",
        "seeds": [42, 137, 849],
        "steps": 2,
        "guidance": 7.0,
        "sampler": "dpmpp_2m, karras",
        "width": 16,
        "height": 16,
        "device": "cpu",
        "comparable": False,
    }
    one, two = (file["drift"] for file in report["files"])
    # The cosine of (1, 0) and (1, s) is 1 / sqrt(1 + s²).
    assert [each["cosine"] for each in one["each"]] == pytest.approx([1.01**-0.5, 1.04**-0.5, 1.01**-0.5], rel=1e-6)
    assert one["psnr_db"]["max"] == pytest.approx(20 * log10(255)) and one["psnr_db"]["min"] < one["psnr_db"]["mean"]
    assert two["psnr_db"]["min"] == pytest.approx(20 * log10(255 / 4))
    assert one["cosine"].keys() == {"mean", "min", "max"} and "drift" not in json.loads(measured)
    json.dumps(report, allow_nan=False)


def test_written(measured, files, tmp_path):
    report = with_drift(measured, files)
    write_report(tmp_path, report, [np.zeros((1, 16, 16, 3), np.uint8)] * 3)
    assert (tmp_path / "drift.png").is_file()
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["files"][1]["drift"]["cosine"]["mean"] > 0.9
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "### Drift over seeds\n\n![Drift over seeds](drift.png)\n\n3 seeds of the prompt `masterpiece, " in text
    assert "16 × 16 pixels, 2 steps, guidance 7, sampler dpmpp_2m, karras (ComfyUI's names), on cpu" in text
    bits = report["files"][0]["bits_per_weight"]
    assert (
        f"| `nf32.nfq.safetensors` | {bits:.2f} | 0.9902 (0.9806–0.9950) | 1.000 (1.000–1.000) | 46.1 (42.1–48.1) |"
        in text
    )
    # The tiny UNet is not SDXL.
    assert "HSWQ" not in text

    facts = card_facts(files, report_folder=tmp_path)
    assert "drift" in facts["plots"] and "| latent cosine |" in card(facts) and "| 0.990 |" in card(facts)


def test_published_figures_are_next_to_sdxls(measured, files):
    report = with_drift(measured, files)
    plain = plots(report)["drift"]
    report["drift"]["comparable"] = True
    text = markdown(report, ())
    assert "| native ConvRot INT8 | 21 | ≈ 0.93 | 0.964 (0.932–0.989) | 38.0 (32.0–43.4) |" in text
    assert "| native NVFP4 | 17 | – | 0.914 (0.861–0.959) | 31.4 (27.9–34.5) |" in text
    assert "round activations too" in text
    page = (Path(__file__).parents[2] / "docs" / "BENCHMARKS.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith(tuple(f"| {one.name} |" for one in PUBLISHED))]
    assert len(rows) == len(PUBLISHED) and all(row in page for row in rows)
    figure = plots(report)["drift"]
    assert pixels(figure).shape[1] == round(WIDTH * figure.dpi)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["nf32", "nf12", *(f"{one.name} (published)" for one in PUBLISHED)]
    assert [label.get_text() for label in plain.axes[0].get_yticklabels()] == ["nf32", "nf12"]


def test_plots_of_equal_files(measured, files):
    report = with_drift(measured, files)
    for file in report["files"]:
        file["drift"] = drift_figures(*[[Sample(torch.ones(1), np.zeros((4, 4, 3), np.uint8))]] * 2)
    figure = plots(report)["drift"]
    assert [text.get_text() for text in figure.axes[2].texts] == ["all equal"] * 2
    assert "| 1.0000 (1.0000–1.0000) | 1.000 (1.000–1.000) | equal (equal–equal) |" in markdown(report, ())


def test_interrupted_while_drawing(capsys, folder, files, measured, tmp_path, monkeypatch):
    """Nothing is written, and a report in memory is unchanged."""

    class Interrupted(Artist):
        def draw(self, series):
            for number, sample in enumerate(super().draw(series)):
                if self.models == 2 and series is command.DRIFT and number == 1:
                    raise KeyboardInterrupt
                yield sample

    report = json.loads(measured)
    monkeypatch.setattr(command, "DRIFT", SHORT)
    with pytest.raises(KeyboardInterrupt):
        pictures.add_pictures(report, "original", files, Interrupted(), drift=SHORT)
    assert report == json.loads(measured)

    monkeypatch.setattr(command, "make_painter", lambda *_: Interrupted())
    out = tmp_path / "out"
    arguments = ["report", folder / "original.safetensors", *files, "--pipeline", "x", "--drift", "--out", out]
    code, text, error = run(capsys, *arguments)
    assert (code, text) == (1, "") and error.endswith("nfq: interrupted; no unfinished file is left\n")
    assert not any(out.iterdir())


def test_the_work_is_announced(capsys, folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_painter", lambda *_: Artist())
    arguments = ["report", folder / "original.safetensors", *files, "--pipeline", "x", "--drift"]
    code, text, error = run(capsys, *arguments, "--out", tmp_path / "out")
    assert code == 0
    # 1 + 8 + 25 pictures; 3 + 8 + 625 steps.
    assert one_line(error.splitlines(keepends=True)[0]) == (
        "nfq: drawing 34 pictures in 636 denoising steps with each of 3 models, 1,908 steps in all\n"
    )
    assert ", over 25 seeds: cosine 0.9" in text
    found = as_json(capsys, *arguments, "--out", tmp_path / "json")
    assert found["drift"]["seeds"] == list(DRIFT.seeds) and len(found["files"][0]["drift"]["each"]) == 25


def test_the_demo_has_no_latents(capsys, tmp_path):
    pytest.importorskip("diffusers")
    arguments = ["report", "demo", tmp_path / "gone", "--pipeline", "demo", "--drift", "--out", tmp_path / "out"]
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert "the demo model has no latents, which --drift compares; give an SDXL pipeline's folder" in one_line(error)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from sdxl_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("sdxl") / "pipeline")


def test_a_diffusers_folder(capsys, sdxl, tmp_path, monkeypatch):
    """The command, with three seeds, two steps and small pictures."""
    monkeypatch.setattr(protocol, "SIDE", 64)
    monkeypatch.setattr(command, "DRIFT", replace(SHORT, side=64))
    original = tmp_path / "original.safetensors"
    weights = load_file(sdxl / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({key: tensor.half() for key, tensor in weights.items()}, original)
    files = [tmp_path / f"nf{levels}.nfq.safetensors" for levels in (32, 7)]
    for path, levels in zip(files, (32, 7), strict=True):
        quantize_file(original, path, Settings(Formats.of(levels)))
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    arguments = ["--pipeline", sdxl, "--prompts", tmp_path / "prompts.txt", "--steps", 1, "--drift"]
    found = as_json(capsys, "report", original, *files, "--out", tmp_path / "out", *arguments)
    fine, coarse = (file["drift"] for file in found["files"])
    assert 0.9 < coarse["cosine"]["mean"] < fine["cosine"]["mean"] < 1
    assert coarse["psnr_db"]["mean"] < fine["psnr_db"]["mean"] and coarse["ssim"]["mean"] < fine["ssim"]["mean"]
    assert len({one["cosine"] for one in fine["each"]}) == 3
    assert (tmp_path / "out" / "drift.png").exists()
    # Its own settings, whatever the pictures have.
    assert (found["pictures"]["steps"], found["drift"]["steps"]) == (1, 2)


def test_sampled_as_dpmpp_2m_karras(sdxl):
    """The series' own latents, against a loop of k-diffusion's `sample_dpmpp_2m` written out."""
    weights = sdxl / "unet" / "diffusion_pytorch_model.safetensors"
    painter = make_painter(sdxl, pictures.Drawing(("a cat",), steps=1))
    painter.load(weights)
    series = Series(("a cat",), (3,), steps=5, side=64, guidance=7.0, sampler=DPMPP_2M_KARRAS)
    (sample,) = painter.draw(series)
    expected = dpmpp_2m(painter._pipeline, series)
    assert torch.allclose(sample.latent, expected[0], atol=2e-4 * expected.abs().max())
    # The pictures keep the pipeline's own sampler.
    (own,) = painter.draw(replace(series, sampler=None))
    assert type(painter._pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert not torch.allclose(own.latent, sample.latent, atol=1e-2)


@torch.no_grad()
def dpmpp_2m(pipeline, series: Series) -> torch.Tensor:
    """Final latents as ComfyUI samples them: DPM-Solver++(2M) over Karras' sigmas, in the variance-exploding form."""
    config = pipeline.scheduler.config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    products = (1 - betas).cumprod(0)
    known = ((1 - products) / products).sqrt()
    ramp = torch.linspace(0, 1, series.steps, dtype=torch.float64)
    smallest, largest = known[0] ** (1 / 7), known[-1] ** (1 / 7)
    sigmas = torch.cat([(largest + ramp * (smallest - largest)) ** 7, torch.zeros(1, dtype=torch.float64)])

    embeds = pipeline.encode_prompt(series.prompts[0], negative_prompt="", do_classifier_free_guidance=True)
    positive, negative, pooled, negative_pooled = embeds
    sizes = torch.tensor([[series.side, series.side, 0, 0, series.side, series.side]] * 2)
    conditions = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": sizes}

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        step = (known.log() - sigma.log()).abs().argmin()
        scaled = (x / (sigma**2 + 1).sqrt()).float()
        noise = pipeline.unet(
            torch.cat([scaled] * 2), step, torch.cat([negative, positive]), added_cond_kwargs=conditions
        ).sample.double()
        return x - sigma * (noise[:1] + series.guidance * (noise[1:] - noise[:1]))

    side = series.side // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(series.seeds[0])
    x = torch.randn(1, 4, side, side, generator=generator).double() * (sigmas[0] ** 2 + 1).sqrt()
    before = None
    for number in range(series.steps):
        sigma, next_sigma = sigmas[number], sigmas[number + 1]
        now = denoised(x, sigma)
        h = sigma.log() - next_sigma.log()
        estimate = now
        if before is not None and next_sigma > 0:
            r = (sigmas[number - 1].log() - sigma.log()) / h
            estimate = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        x = next_sigma / sigma * x - (-h).expm1() * estimate
        before = now
    return x.float()


def test_a_scheduler_without_betas(sdxl):
    from diffusers import EDMEulerScheduler

    from nfq_core.errors import NFQError

    painter = make_painter(sdxl, pictures.Drawing(("a cat",), steps=1))
    painter._own_scheduler = EDMEulerScheduler()
    with pytest.raises(NFQError, match="cannot draw with dpmpp_2m, karras: its scheduler has no beta_schedule"):
        next(painter.draw(SHORT))
