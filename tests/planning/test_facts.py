"""What a container's header records about a recognised model."""

from __future__ import annotations

from nfq_core.files.container import Facts, Source
from nfq_core.files.safetensors_io import Entry
from nfq_core.models.unet import UNetInfo
from nfq_core.models.unet_keys import SDXL_BASE
from nfq_core.planning.facts import facts_about


def test_facts_about_what_was_recognised():
    info = UNetInfo("prefixed", "model.diffusion_model.", SDXL_BASE)
    source = Source("a.safetensors", 2062, "5" * 64, {"title": "Ä"})
    assert facts_about(info, {}, {"levels": 7}, source) == Facts({"levels": 7}, "prefixed", "SDXL", source)
    assert facts_about(None, {}, {}) == Facts({}, "plain", "unknown", Source("", 0, "", {})) == Facts()
    flux = {"double_stream_modulation_img.lin.weight": Entry("BF16", (64, 64), 0, 0)}
    assert facts_about(None, flux, {}) == Facts({}, "plain", "Flux.2")
