"""Packed MODELs where ComfyUI uses DynamicVRAM: the host's own code, on a card that the tests pretend to have."""

from __future__ import annotations

import pytest
from graphs import OURS, lora

MODEL = ["model", 0]


def supported(facts: dict) -> dict:
    if not facts["supported"]:
        pytest.skip("this host has no DynamicVRAM")
    return facts


def test_a_packed_model_displaces_only_what_is_missing(host) -> None:
    """CLIP and VAE leave the card by as many bytes as the MODEL lacks; the VAE gets its memory the same way."""
    facts = supported(host.check("neighbours", {"model": OURS}, model=MODEL))
    assert "0" in facts["cases"]
    for missing, case in facts["cases"].items():
        assert case["displaced"] == int(missing)
        assert case["model"] == case["again"] == facts["size"]
        # The VAE asked for half of the MODEL's size; other dynamic models may give memory too.
        assert 0 <= case["given back"] <= facts["size"] // 2
        # A model of which nothing would be left loses its pinned memory too.
        assert case["vae stays"] == (int(missing) < facts["vae"])


def test_what_the_dynamic_patcher_does_to_packed_weights(host) -> None:
    """It carries them packed. A LoRA survives as a function of the layer; the host's way would quantise again."""
    prompt = {"model": OURS, "lora": lora("lora", 1.0, MODEL)}
    facts = supported(host.check("carried", prompt, model=["lora", 0]))
    assert facts["no LoRA"] == 0
    assert any(part in str(facts["by the host"]) for part in ("never quantised again by the host", "layout_type"))
    # The weight to compare with is rounded to fp16.
    assert facts["as a function of the layer"] <= 2**-11
