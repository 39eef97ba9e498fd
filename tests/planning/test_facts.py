"""What a container's header records about a recognised model."""

from __future__ import annotations

from nfq_core.files.container import Facts, Source
from nfq_core.models.unet import UNetInfo
from nfq_core.models.unet_keys import SDXL_BASE
from nfq_core.planning.facts import facts_about


def test_facts_about_what_was_recognised():
    info = UNetInfo("prefixed", "model.diffusion_model.", SDXL_BASE)
    source = Source("a.safetensors", 2062, "5" * 64, {"title": "Ä"})
    assert facts_about(info, {"levels": 7}, source) == Facts({"levels": 7}, "prefixed", "SDXL", source)
    assert facts_about(None, {}) == Facts({}, "plain", "unknown", Source("", 0, "", {})) == Facts()
