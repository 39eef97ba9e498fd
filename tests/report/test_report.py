"""Reports: what is measured, drawn and written, and what is refused before anything is."""

from __future__ import annotations

import json
import os
import sys
from math import log10, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import as_json, one_line, run
from safetensors.torch import load_file, save_file
from samples import SMALL_MODEL, TINY, random_half, random_unet
from systems import names_are_bytes
from text_models import SMALL_L, random_tensors

import nfq_core
from benchmarks.checkpoint_shapes import clip
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import compare_files, file_info
from nfq_core.cli import report_commands as command
from nfq_core.cli.report_commands import make_painter
from nfq_core.decibels import pooled_sqnr_db
from nfq_core.demo.model import bundled_weights_path
from nfq_core.errors import NFQError
from nfq_core.models.roles import GROUPS, OTHER_CONVOLUTION, OTHER_LINEAR, common_names, role, stage
from nfq_core.models.unet import detect
from nfq_core.models.unet_keys import KNOWN_ARCHITECTURES, SDXL_BASE, ldm_to_diffusers, tensor_shapes
from nfq_core.planning.settings import Formats, Settings
from nfq_core.report import pictures, protocol
from nfq_core.report.markdown import as_code, as_text
from nfq_core.report.measure import by_size, label, measure, short_names
from nfq_core.report.metrics import psnr_db, ssim
from nfq_core.report.plots import WIDTH, pixels, plots, png
from nfq_core.report.write import markdown, write_report
from nfq_core.sizes import size_in_words

DRAWN = {"report.json", "report.md", "layers.png", "size.png", "roles.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet in two layouts, and files of 32 and 12 levels of the first."""
    folder = tmp_path_factory.mktemp("report")
    save_file(random_unet(architecture=TINY), folder / "ldm.safetensors")
    save_file(random_unet("diffusers", architecture=TINY), folder / "diffusers.safetensors")
    for levels in (32, 12):
        quantize_file(
            folder / "ldm.safetensors",
            folder / f"nf{levels}.nfq.safetensors",
            Settings(Formats.of(levels)),
        )
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return [folder / "nf32.nfq.safetensors", folder / "nf12.nfq.safetensors"]


@pytest.fixture(scope="module")
def report(folder, files):
    return measure(folder / "ldm.safetensors", files)


def test_every_layer_of_known_models_has_a_role_and_a_stage():
    """SDXL has 17 residual blocks, 11 with a shortcut, and 11 transformers of 70 layers."""
    for architecture in KNOWN_ARCHITECTURES:
        for layout in ("ldm", "diffusers"):
            shapes = tensor_shapes(architecture, layout)
            common = common_names(detect(shapes), shapes)
            assert list(common.values()) == list(tensor_shapes(architecture, "diffusers"))
            weights = [k for k, s in shapes.items() if len(s) > 1 and "emb" not in k and stage(common[k])]
            roles = [role(common[key], shapes[key]) for key in weights]
            assert not {OTHER_LINEAR, OTHER_CONVOLUTION} & set(roles)
            if architecture is SDXL_BASE:
                counts = {name: [each.name for each in roles].count(name) for name in {each.name for each in roles}}
                assert counts.pop("convolution 1") == counts.pop("convolution 2") == 17
                assert (counts.pop("projection in"), counts.pop("projection out"), counts.pop("shortcut")) == (
                    11,
                    11,
                    11,
                )
                assert (counts.pop("downsampling"), counts.pop("upsampling")) == (2, 2)
                assert set(counts.values()) == {70} and len(counts) == 10


def test_roles_by_the_names_of_ldm():
    """An unknown structure keeps them; they are told as those of diffusers are."""
    renamed = {ldm: name for ldm, name in ldm_to_diffusers(SDXL_BASE).items() if ldm.endswith(".weight")}
    shapes = tensor_shapes(SDXL_BASE, "ldm")
    for ldm, name in renamed.items():
        if len(shapes[ldm]) > 1 and "emb" not in ldm and stage(name):
            assert role(ldm, shapes[ldm]) == role(name, shapes[ldm]), ldm
    assert stage("input_blocks.4.1.proj_in.weight") == "in 4"
    assert stage("middle_block.0.in_layers.2.weight") == "middle"
    assert stage("linear.weight") == ""


def test_measured_as_compare_and_info_tell(folder, files, report):
    for path, found in zip(files, report["files"], strict=True):
        info, compared = file_info(path), compare_files(folder / "ldm.safetensors", path)
        assert found["sqnr_db"] == compared["sqnr_db"]
        assert {one["name"]: one["sqnr_db"] for one in found["layers"]} == {
            one["name"]: one["sqnr_db"] for one in compared["layers"]
        }
        assert found["bits_per_weight"] == info["bits_per_weight"] and found["file_bytes"] == path.stat().st_size
        with nfq_core.NFQFile(path) as file:
            stored = sum(file.stored_bytes(key) for key in file.shapes())
            assert found["header_sha256"] == file.header_sha256
        weights = sum(tensor.numel() for tensor in load_file(folder / "ldm.safetensors").values())
        assert found["unet_bits_per_weight"] == pytest.approx(stored * 8 / weights)
        assert sum(row["weights"] for row in found["roles"]) == info["weights"]
        again = pooled_sqnr_db((row["weights"], row["sqnr_db"]) for row in found["roles"])
        assert again == pytest.approx(found["sqnr_db"])
        assert found["note"] == "" and {row["group"] for row in found["roles"]} <= set(GROUPS)
    stages = list(dict.fromkeys(one["stage"] for one in report["files"][0]["layers"]))
    assert stages == ["down 0", "down 1", "middle", "up 0", "up 1"]
    json.dumps(report, allow_nan=False)


def test_another_layout_of_the_original_gives_the_same(folder, files, report):
    again = measure(folder / "diffusers.safetensors", files)
    for one, other in zip(again["files"], report["files"], strict=True):
        assert one["layers"] == other["layers"]
        assert "made from another file (ldm.safetensors)" in one["note"]


def test_names_tell_files_apart(tmp_path):
    assert short_names(["a/x.nfq.safetensors", "b/y"]) == ["x.nfq.safetensors", "y"]
    assert short_names(["a/x", "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(NFQError, match="x is named twice"):
        short_names(["x", "./x"])
    assert (label("a.NFQ.safetensors"), label("a.safetensors"), label("a"), label(".safetensors")) == (
        "a",
        "a",
        "a",
        ".safetensors",
    )


def test_the_largest_first(files):
    assert by_size(reversed(files)) == files
    assert by_size(["gone", *files])[:2] == files


def test_words():
    assert [size_in_words(n) for n in (1, 999, 12_345, 5_707_971, 16_556_542, 441_000_000, 1_330_000_000)] == [
        "1 byte",
        "999 bytes",
        "12.3 KB",
        "5.71 MB",
        "16.6 MB",
        "441 MB",
        "1.33 GB",
    ]
    assert as_text("a|b_c\n<d>") == r"a\|b\_c \<d\>"
    assert as_code("a|b") == r"`a\|b`" and as_code("a`b") == "`` a`b ``"


def test_plots_are_alike_wide_and_the_same_each_time(report):
    drawn, again = plots(report), plots(report)
    assert drawn.keys() == {"size", "layers", "roles"}
    for name, figure in drawn.items():
        data = png(figure)
        assert data == png(again[name]) and data.startswith(b"\x89PNG") and b"Software" not in data
        shown = pixels(figure)
        assert shown.shape[1] == round(WIDTH * figure.dpi) and shown.shape[2] == 3
        # Something is drawn, on white.
        assert (shown == 255).all(-1).mean() > 0.5 and len(np.unique(shown[::9, ::9].reshape(-1, 3), axis=0)) > 10


def test_the_dashed_line_is_the_error_of_all_layers_together(report):
    figure = plots(report)["layers"]
    for axes, file in zip(figure.axes, report["files"], strict=True):
        (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert set(line.get_ydata()) == {file["sqnr_db"]}
        assert axes.get_title("left").endswith(f"bits per weight, {file['sqnr_db']:.2f} dB over all layers (dashed)")


def test_names_are_no_formulas(report):
    """A dollar sign starts one in matplotlib, and an underscore hides a line of its legend."""
    odd = json.loads(json.dumps(report))
    odd["files"][0]["name"], odd["files"][1]["name"] = "$x^$", "_モデル"
    odd["original"]["name"] = "a$b$"
    drawn = plots(odd)
    texts = [text.get_text().strip() for text in drawn["size"].legends[0].get_texts()]
    assert texts == [r"\$x^\$", "_モデル"]
    for figure in drawn.values():
        pixels(figure)


@names_are_bytes
def test_names_that_are_no_unicode(capsys, folder, files, tmp_path):
    odd = os.fsencode(tmp_path) + b"/a\xff\n|.nfq.safetensors"
    with open(odd, "wb") as file:
        file.write(files[0].read_bytes())
    code, _, error = run(capsys, "report", folder / "ldm.safetensors", os.fsdecode(odd), "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    assert r"a\udcff \|.nfq" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_layers_of_a_state_dict_stand_in_their_order(tmp_path):
    save_file(SMALL_MODEL, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    found = measure(tmp_path / "a", [tmp_path / "b"])
    (one,) = found["files"]
    assert {layer["role"] for layer in one["layers"]} == {"other linear", "other convolution"}
    assert one["unet_bits_per_weight"] is None
    assert plots(found).keys() == {"size", "layers", "roles"}


def test_a_layer_whose_weights_hardly_differ_does_not_make_another_original(tmp_path):
    """0.1 is no fp16 number: the noise of such a layer, and so of all layers, is far above the variance."""
    flat = 0.1 + random_half(64, 64).float() / 1_000_000
    save_file({"flat.weight": flat, "other.weight": random_half(128, 64)}, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    (found,) = measure(tmp_path / "a", [tmp_path / "b"])["files"]
    ratios = {layer["name"]: layer["sqnr_db"] for layer in found["layers"]}
    assert ratios["flat.weight"] < 0 < 15 < ratios["other.weight"] and found["sqnr_db"] < 0


def test_a_file_that_equals_its_original(tmp_path):
    quantized = nfq_core.quantize(random_half(64, 64), 16)
    save_file({"a.weight": quantized.dequantize()}, tmp_path / "a")
    nfq_core.save({"a.weight": quantized}, tmp_path / "b")
    found = measure(tmp_path / "a", [tmp_path / "b"])
    assert found["files"][0]["sqnr_db"] is None
    assert plots(found).keys() == {"size", "layers"}
    assert "| equal |" in markdown(found, ())


def test_command(capsys, folder, files, tmp_path):
    out = tmp_path / "out"
    told = as_json(capsys, "report", folder / "ldm.safetensors", *reversed(files), "--out", out)
    assert {path.name for path in out.iterdir()} == DRAWN
    assert json.loads((out / "report.json").read_text("utf-8")) == told
    assert [one["name"] for one in told["files"]] == [path.name for path in files]
    text = (out / "report.md").read_text("utf-8")
    assert all(f"({name})" in text for name in DRAWN if name.endswith("png"))
    assert f"{told['files'][1]['sqnr_db']:.2f}" in text and "feed-forward out" in text
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    code, told, error = run(capsys, "report", folder / "ldm.safetensors", *files, "--out", out)
    assert (code, told) == (1, "")
    assert "exists already; --force overwrites it" in one_line(error)
    (out / "pictures.png").write_bytes(b"of an earlier report")
    (out / "mine.txt").write_bytes(b"not of a report")
    code, told, _ = run(capsys, "report", folder / "ldm.safetensors", *files, "--out", out, "--force")
    assert code == 0
    assert "nf32.nfq.safetensors: " in told and f"report: {out / 'report.md'}" in told
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {"mine.txt": b"not of a report"}


def refused(capsys, *arguments: object) -> str:
    code, out, error = run(capsys, "report", *arguments)
    assert (code, out) == (1, "")
    return one_line(error)


def test_refusals(capsys, folder, files, tmp_path):
    out = tmp_path / "out"
    save_file({"a.weight": random_half(64, 64)}, tmp_path / "other")
    assert "tensor 'input_blocks" in refused(capsys, tmp_path / "other", files[0], "--out", out)
    lacking = random_unet(architecture=TINY)
    del lacking["middle_block.1.proj_in.weight"]
    save_file(lacking, tmp_path / "lacking")
    assert "tensor 'middle_block.1.proj_in.weight'" in refused(capsys, tmp_path / "lacking", files[0], "--out", out)
    save_file(random_unet(seed=500, architecture=TINY), tmp_path / "stranger")
    assert "was not made from" in refused(capsys, tmp_path / "stranger", files[0], "--out", out)
    assert "no such file" in refused(capsys, folder / "ldm.safetensors", tmp_path / "gone", "--out", out)
    assert "is not an .nfq.safetensors file" in refused(capsys, tmp_path / "other", tmp_path / "other", "--out", out)
    assert "named twice" in refused(capsys, folder / "ldm.safetensors", files[0], files[0], "--out", out)
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    assert "is damaged" in refused(capsys, folder / "ldm.safetensors", tmp_path / "damaged", "--out", out)
    assert not any(out.iterdir())
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be created" in refused(capsys, tmp_path / "other", files[0], "--out", tmp_path / "file")


def test_a_folder_that_cannot_be_written(capsys, folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr("nfq_core.files.atomic.os.access", lambda path, mode: False)
    told = refused(capsys, folder / "ldm.safetensors", files[0], "--out", tmp_path / "out")
    assert f"{tmp_path / 'out'} cannot be written; name another folder" in told


@pytest.mark.parametrize(("missing", "package"), [("matplotlib", "matplotlib"), ("PIL", "Pillow")])
def test_missing_packages(capsys, folder, files, tmp_path, monkeypatch, missing, package):
    monkeypatch.setitem(sys.modules, missing, None)
    told = refused(capsys, folder / "ldm.safetensors", files[0], "--out", tmp_path / "out")
    assert f" need {package}: {sys.executable} -m pip install {package}" in told
    assert not (tmp_path / "out").exists()


def test_latent_psnr_by_hand():
    # Errors 0.5 and 0: a root of the mean squared error of 0.5 / sqrt(2), the largest magnitude is 4.
    found = protocol.latent_psnr_db(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]))
    assert found == pytest.approx(20 * log10(4 / (0.5 / sqrt(2))))
    assert protocol.latent_psnr_db(torch.ones(3), torch.ones(3)) is None
    assert len(protocol.PROMPTS) == 8


class Artist:
    """Draws a ramp that is brighter by one for each model before it."""

    chosen = protocol.Series(("one", "two|three"), (7, 8), 3, 16, 2.5)
    device = "cpu"
    has_latents = True

    def __init__(self) -> None:
        self.loaded: list[Path] = []

    def load(self, path) -> None:
        self.loaded.append(path)

    def draw(self, series):
        ramp = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3) // 2 + np.uint8(len(self.loaded) - 1)
        for _ in series.prompts:
            latent = torch.full((4, 2, 2), 1.0 + 0.1 * len(self.loaded))
            yield protocol.Sample(latent, ramp if series.decoded else None)


def test_pictures_against_the_originals(folder, files, report, tmp_path):
    found, artist = json.loads(json.dumps(report)), Artist()
    seen = []
    drawn = pictures.add_pictures(found, "original", files, artist, progress=lambda *args: seen.append(args[:2]))
    assert artist.loaded == ["original", *files]
    # Each model draws two pictures of three steps and eight latents of one.
    per_model = [3, 6, *range(7, 15)]
    assert seen == [(14 * model + steps, 42) for model in range(3) for steps in per_model]
    assert pictures.work(artist) == (10, 14)
    one, two = found["files"]
    reference = torch.from_numpy(drawn[0]).movedim(-1, 1).float()
    # Every value is one off, then two.
    assert one["pictures"]["psnr_db"] == pytest.approx(20 * log10(255))
    assert two["pictures"]["psnr_db"] == pytest.approx(20 * log10(255 / 2))
    assert two["pictures"]["psnr_db"] == pytest.approx(psnr_db(reference, reference + 2, 255))
    assert two["pictures"]["ssim"] == pytest.approx(ssim(reference, reference + 2, 255))
    assert one["latents"]["mean_psnr_db"] == pytest.approx(20 * log10(1.2 / 0.1), abs=1e-4)
    assert two["latents"]["each"] == pytest.approx([20 * log10(1.3 / 0.2)] * 8, abs=1e-4)
    # The tiny UNet is no SDXL: Apple's figures do not belong beside it.
    assert found["protocol"]["comparable"] is False
    json.dumps(found, allow_nan=False)
    write_report(tmp_path / "out", found, drawn)
    assert {path.name for path in (tmp_path / "out").iterdir()} == DRAWN | {"pictures.png"}
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "(pictures.png)" in text and r"two\|three" in text and "16 × 16 pixels, 3 steps, guidance 2.5" in text
    assert "Latents after one step" in text and f"{two['latents']['mean_psnr_db']:.1f}" in text
    assert "| mean over prompts of latent PSNR, dB |" in text


def test_apples_figures_stand_beside_sdxls(report):
    found = json.loads(json.dumps(report))
    pictures.add_pictures(found, "original", ["a", "b"], Artist())
    found["protocol"]["comparable"] = True
    figure = plots(found)["size"]
    assert len(figure.axes) == 3
    assert any("Apple" in text.get_text() for text in figure.legends[0].get_texts())


def test_demo_pictures(tmp_path):
    pytest.importorskip("diffusers")
    quantize_file(
        bundled_weights_path(),
        tmp_path / "demo.nfq.safetensors",
        Settings(Formats.of(7)),
    )
    artist = make_painter("demo", pictures.Drawing(("a large red circle on a white background",), steps=1))
    artist.load(bundled_weights_path())
    (before,) = artist.draw(artist.chosen)
    artist.load(tmp_path / "demo.nfq.safetensors")
    (after,) = artist.draw(artist.chosen)
    assert before.picture.shape == after.picture.shape == (32, 32, 3) and (before.picture != after.picture).any()
    assert before.latent is None and not artist.has_latents and artist.chosen.guidance == 3.0
    save_file(SMALL_MODEL, tmp_path / "other")
    with pytest.raises(NFQError, match="other does not fit the demo model"):
        artist.load(tmp_path / "other")
    wrong = make_painter("demo", pictures.Drawing(("a cat",)))
    with pytest.raises(NFQError, match=r"the demo model cannot draw this: .*unknown word 'cat'"):
        list(wrong.draw(wrong.chosen))
    with pytest.raises(NFQError, match="leave --side and --device out"):
        make_painter("demo", pictures.Drawing(side=64))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from sdxl_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("sdxl") / "pipeline")


def test_a_diffusers_folder(capsys, sdxl, tmp_path, monkeypatch):
    """Its own UNet weights are not needed; those of the original and of the file are."""
    monkeypatch.setattr(protocol, "SIDE", 64)
    weights = sdxl / "unet" / "diffusion_pytorch_model.safetensors"
    original = tmp_path / "original.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(weights).items()}, original)
    weights.unlink()
    quantize_file(original, tmp_path / "a.nfq.safetensors", Settings(Formats.of(12)))
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n", encoding="utf-8")
    arguments = ["--out", tmp_path / "out", "--pipeline", sdxl, "--prompts", tmp_path / "prompts.txt", "--steps", 1]
    found = as_json(capsys, "report", original, tmp_path / "a.nfq.safetensors", *arguments)
    assert found["pictures"]["prompts"] == ["a cat", "a dog"]
    assert (found["pictures"]["width"], found["pictures"]["guidance"]) == (64, 5.0)
    (one,) = found["files"]
    assert len(one["latents"]["each"]) == 8 and 20 < one["latents"]["mean_psnr_db"] < 100
    assert 10 < one["pictures"]["psnr_db"] < 100 and 0 < one["pictures"]["ssim"] < 1
    assert (tmp_path / "out" / "pictures.png").exists()

    artist = make_painter(sdxl, pictures.Drawing(("a cat",), steps=1))
    artist.load(tmp_path / "a.nfq.safetensors")
    state = nfq_core.load(tmp_path / "a.nfq.safetensors")
    for name, parameter in artist._pipeline.unet.named_parameters():
        wanted = state[name].dequantize() if isinstance(state[name], nfq_core.NFTensor) else state[name]
        assert torch.equal(parameter, wanted.float()), name
    with pytest.raises(NFQError, match="cannot draw this: "):
        broken = make_painter(sdxl, pictures.Drawing((1,), steps=1))
        broken.load(original)
        list(broken.draw(broken.chosen))
    save_file(SMALL_MODEL, tmp_path / "other")
    with pytest.raises(NFQError, match=r"other does not fit .*: the UNet's 'conv_in.weight' has shape \(32, "):
        artist.load(tmp_path / "other")
    with pytest.raises(NFQError, match="--side must be a multiple of 8, got 65"):
        make_painter(sdxl, pictures.Drawing(side=65))


def test_folders_that_are_no_sdxl_pipelines(capsys, folder, files, tmp_path):
    arguments = [folder / "ldm.safetensors", files[0], "--out", tmp_path / "out", "--pipeline"]
    assert "is not a diffusers folder" in refused(capsys, *arguments, tmp_path / "gone")
    index = tmp_path / "model_index.json"
    for text, told in (
        ("{", "its model_index.json is damaged"),
        ('{"_class_name": "FluxPipeline"}', "holds a FluxPipeline"),
        ('{"_class_name": "StableDiffusionXLPipeline"}', "cannot be loaded as an SDXL pipeline"),
    ):
        index.write_text(text)
        assert told in refused(capsys, *arguments, tmp_path)
    assert not any((tmp_path / "out").iterdir())


def test_a_folder_without_transformers(capsys, folder, files, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ["--out", tmp_path / "out", "--pipeline", tmp_path]
    told = refused(capsys, folder / "ldm.safetensors", files[0], *arguments)
    assert f"need diffusers and transformers: {sys.executable} -m pip install diffusers transformers" in told


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_with_and_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_text("ein Kätzchen\n\n a dog \n", encoding=encoding)
    assert command._prompts(tmp_path / "prompts.txt") == ("ein Kätzchen", "a dog")


@pytest.mark.parametrize(
    "option",
    [
        ("--prompts", "p"),
        ("--steps", 0),
        ("--guidance", 1),
        ("--seed", 0),
        ("--side", 8),
        ("--device", "cpu"),
        ("--drift",),
    ],
)
def test_choices_of_pictures_without_pictures(capsys, folder, files, tmp_path, option):
    arguments = ["report", folder / "ldm.safetensors", files[0], "--out", tmp_path / "out"]
    code, out, error = run(capsys, *arguments, *option)
    assert (code, out) == (2, "") and f"{option[0]} is for pictures, which need --pipeline" in error
    assert not (tmp_path / "out").exists()


def test_odd_choices(capsys, folder, files, tmp_path):
    (tmp_path / "empty").write_text(" \n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    arguments = [folder / "ldm.safetensors", files[0], "--out", tmp_path / "out", "--pipeline", "demo"]
    assert "--steps must be at least 1, got 0" in refused(capsys, *arguments, "--steps", 0)
    assert "--guidance must be a finite number, got nan" in refused(capsys, *arguments, "--guidance", "nan")
    assert "--seed must be from 0 to 4,294,967,295, got -1" in refused(capsys, *arguments, "--seed", -1)
    assert "has no prompts" in refused(capsys, *arguments, "--prompts", tmp_path / "empty")
    assert "is not a text in UTF-8" in refused(capsys, *arguments, "--prompts", tmp_path / "binary")
    assert "gone: No such file" in refused(capsys, *arguments, "--prompts", tmp_path / "gone")


def test_text_encoders_in_a_file_do_not_count(folder, tmp_path):
    """A report of a whole checkpoint has the figures of its UNet."""
    unet = {f"model.diffusion_model.{key}": value for key, value in load_file(folder / "ldm.safetensors").items()}
    text = random_tensors(clip(SMALL_L, "conditioner.embedders.0.transformer."))
    for name, tensors in (("unet", unet), ("whole", unet | text)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        quantize_file(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.nfq.safetensors", Settings(Formats.of(12)))
    alone, whole = (
        measure(tmp_path / f"{name}.safetensors", [tmp_path / f"{name}.nfq.safetensors"])["files"][0]
        for name in ("unet", "whole")
    )
    for key in ("weights", "bits_per_weight", "packed_bits_per_weight", "sqnr_db", "roles", "layers"):
        assert whole[key] == alone[key]
    assert [each["name"] for each in whole["components"]] == ["diffusion model", "CLIP-L"]
    without = measure(tmp_path / "unet.safetensors", [tmp_path / "whole.nfq.safetensors"])["files"][0]
    assert without["sqnr_db"] == alone["sqnr_db"]
