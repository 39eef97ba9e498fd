"""NFCompare in the real host: images, latents, refused inputs; the help, examples and languages it serves."""

from __future__ import annotations

import math

import pytest
import torch
from driver import HostError

from nfq_core.report.metrics import psnr_db, ssim

COMPANIONS = {"class_type": "NFQTestCompanions", "inputs": {}}


def image(number: int) -> dict:
    return {"class_type": "NFQTestImage", "inputs": {"number": number}}


def empty(width: int = 64) -> dict:
    return {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": 64, "batch_size": 1}}


def noise(number: int) -> dict:
    """A latent of a picture."""
    return {"class_type": "VAEEncode", "inputs": {"pixels": [f"image{number}", 0], "vae": ["companions", 1]}}


def compare(*nodes: str, **inputs) -> dict:
    linked = {f"image_{number}": [node, 0] for number, node in enumerate(nodes, 1)}
    return {"class_type": "NFCompare", "inputs": {**linked, "labels": "one\n\nthree", "side": 64, **inputs}}


def random_picture(number: int) -> torch.Tensor:
    """The output of `NFQTestImage`, channels first."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, 64, 64, 3, generator=generator).sigmoid().movedim(-1, 1)


def test_images_with_their_figures(host) -> None:
    graph = {"image1": image(1), "image2": image(2), "look": compare("image1", "image2", "image1")}
    graph["keep"] = {"class_type": "SaveImage", "inputs": {"images": ["look", 0], "filename_prefix": "sheet"}}
    shown = host.run(graph)["look"]["nfq_compare"]
    assert [each["label"] for each in shown] == ["one", "image_2", "three"]
    first, second = random_picture(1), random_picture(2)
    assert shown[1]["psnr_db"] == pytest.approx(psnr_db(first, second, 1.0))
    assert shown[1]["ssim"] == pytest.approx(ssim(first, second, 1.0))
    assert shown[0]["ssim"] is None and shown[2]["psnr_db"] is None and shown[2]["ssim"] == pytest.approx(1)
    for each in shown:
        (picture,) = each["pictures"]
        assert picture["type"] == "temp" and (host.base / "temp" / picture["filename"]).exists()


def test_latents_directly_and_decoded(host) -> None:
    graph = {"companions": COMPANIONS, "image1": image(1), "image2": image(2), "a": noise(1), "b": noise(2)}
    directly = host.run(graph | {"look": compare("a", "b")})["look"]["nfq_compare"][1]
    decoded = host.run(graph | {"look": compare("a", "b", vae=["companions", 1])})["look"]["nfq_compare"][1]
    for figures in (directly, decoded):
        assert math.isfinite(figures["psnr_db"]) and figures["ssim"] < 1
    assert directly["psnr_db"] != decoded["psnr_db"]


def test_empty_latents_are_equal(host) -> None:
    shown = host.run({"a": empty(), "look": compare("a", "a")})["look"]["nfq_compare"]
    assert shown[1]["psnr_db"] is None and shown[1]["ssim"] == pytest.approx(1)


def test_mismatched_inputs_are_refused(host) -> None:
    with pytest.raises(HostError, match="images and latents cannot be compared with each other"):
        host.run({"a": image(1), "b": empty(), "look": compare("a", "b")})
    with pytest.raises(HostError, match=r"image_2 has shape \(1, 4, 8, 16\), image_1 has \(1, 4, 8, 8\)"):
        host.run({"a": empty(), "b": empty(128), "look": compare("a", "b")})
    sixteen = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    with pytest.raises(HostError, match="latents of 16 channels cannot be shown without their VAE"):
        host.run({"a": sixteen, "look": compare("a", "a")})


def test_nan_is_refused(host) -> None:
    """JSON has no NaN, so the page could no longer read the history."""
    graph = {"a": image(1), "b": {"class_type": "NFQTestImage", "inputs": {"number": -1}}, "look": compare("a", "b")}
    with pytest.raises(HostError, match="image_2 contains NaN or infinity"):
        host.run(graph)


def test_quality_report(host) -> None:
    inputs = {
        "original_name": "diffusion_models/vega.safetensors",
        "file_name": "diffusion_models/vega.nfq.safetensors",
    }
    graph = {"report": {"class_type": "NFQualityReport", "inputs": inputs}}
    try:
        shown = host.run(graph)["report"]
    except HostError as error:
        assert "plots need matplotlib" in str(error)
        pytest.skip("the host has no matplotlib")
    (picture,) = shown["images"]
    assert picture["type"] == "temp" and (host.base / "temp" / picture["filename"]).exists()
    assert "| self-attention q | 15 |" in shown["text"][0]


def test_help_examples_and_languages_are_served(host) -> None:
    names = [name for name in host.get("/object_info") if name.startswith("NF") and "NFQTest" not in name]
    assert len(names) == 13
    for name in names:
        assert host.get_text(f"/extensions/ComfyUI-NFQ/docs/{name}.md").startswith("# ")
    languages = host.get("/i18n")
    assert languages["ja"]["nodeDefs"].keys() >= set(names) and languages["zh"]["nfq"] and languages["en"]["nfq"]
    assert len(host.get("/workflow_templates")["ComfyUI-NFQ"]) == 7
    aliases = host.get("/object_info/NFQuantizeUNet")["NFQuantizeUNet"].get("search_aliases")
    assert aliases is None or "quantise" in aliases
