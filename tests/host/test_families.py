"""Models of other families than SDXL's: tiny ones of the host's own classes, see `probe/family_models.py`.

Each is loaded packed, patched, loaded in part, quantised in the graph, saved and loaded again, and calibrated.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import HostError
from graphs import loader, sample

import nfq_core

FAMILIES = {
    **{"Stable Diffusion 1": "", "Stable Diffusion 3": "", "Flux.1": "", "Flux.2": "", "Chroma": "", "Lumina 2": ""},
    **{"Z-Image": "", "Qwen-Image": "", "Anima": "", "Cosmos-Predict2": "", "Wan 2.1": "Wan", "Wan 2.2": "Wan"},
}
"""Name of each family's tiny model, and what its file says it is, if that is another name."""

ROUNDING = 1e-5
"""A LoRA is added in fp32 in another order than the host's."""

BF16 = 2e-2
"""A resident weight is rounded to bf16, 2^-9 of each weight; this is of a latent's largest value after two steps."""


@pytest.fixture(scope="module", params=FAMILIES)
def facts(host, request: pytest.FixtureRequest) -> dict:
    found = host.check("family", {}, argument=request.param)
    if found is None:
        pytest.skip("this host does not know the family")
    return found | {"name": FAMILIES[request.param] or request.param}


def test_loads_packed(facts: dict) -> None:
    """The host recognises the model; every quantised weight stays packed, with the dtype of its source."""
    assert facts["family"] == facts["name"]
    assert facts["packed"] == facts["quantized"] > 10
    assert facts["dtypes"] == ["BF16"]


def test_same_latents_as_the_dense_file(facts: dict) -> None:
    assert facts["finite"] and facts["std"] > 0
    assert facts["difference"] == facts["base again"] == 0
    assert 0 < facts["resident"] < BF16


def test_loras(facts: dict) -> None:
    """In the layout of the family's usual LoRAs, whose layers may be parts of a fused layer."""
    assert facts["lora patches"] > 0 and facts["lora changes"] > 0.05
    assert facts["lora"] < ROUNDING
    assert facts["lora baked in"] > 0.05


def test_partial_load(facts: dict) -> None:
    assert facts["partly loaded"] < 1
    assert facts["partial"] < ROUNDING


def test_quantised_in_the_graph(facts: dict) -> None:
    """The node makes the same weights as the command, and a file of the same size that loads as it was."""
    assert facts["quantised in the graph"] == facts["saved layers"] == facts["quantized"]
    assert facts["graph"] == facts["saved"] == 0
    assert facts["saved dtypes"] == ["BF16"]
    assert 0.95 < facts["size"] < 1.05


def test_calibration(facts: dict) -> None:
    """A tiny model's modulation and deepest layers see too few inputs to count."""
    assert facts["collecting"] == 0
    assert facts["calibrated layers"] > facts["quantized"] / 3
    assert facts["calibrated"] > 0


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 3"])
def test_a_whole_checkpoint(host, name: str) -> None:
    """Its text encoders are packed too, and encode what the dequantised file's do."""
    facts = host.check("whole_checkpoint", {}, argument=name)
    assert facts["packed in MODEL"] > 10 and facts["packed in CLIP"] > 20
    assert facts["latents"] == facts["encodings"] == 0 < facts["std"]
    assert facts["share"] < 0.6


def _blocks(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(128, 128) for name in names}


REFUSED = {
    "a VAE": (
        _blocks("encoder.conv_in", "encoder.down.0", "decoder.conv_in", "decoder.up.0"),
        "is a VAE, not a diffusion model",
    ),
    "a LoRA": (
        _blocks("blocks.0.attn.lora_A", "blocks.0.attn.lora_B"),
        "is a LoRA, not a diffusion model",
    ),
    "an incomplete model": (
        {key: value for number in (0, 1, 2) for key, value in _blocks(f"blocks.{number}.self_attn.q").items()}
        | _blocks("blocks.0.ffn.0", "blocks.2.ffn.0")
        | {"head.modulation": torch.zeros(1, 2, 128)},
        "tensor 'blocks.1.ffn.0.weight' of Wan is missing",
    ),
    "a model without its ends": (
        _blocks("blocks.0.self_attn.q", "blocks.0.ffn.0") | {"head.modulation": torch.zeros(1, 2, 128)},
        "lacks tensor '.*'; download the original model again",
    ),
    "an unknown model": (_blocks("layer.0", "layer.1"), "this ComfyUI does not know its architecture; update ComfyUI"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_files(host, base: Path, kind: str) -> None:
    tensors, message = REFUSED[kind]
    path = base / "models" / "diffusion_models" / "refused.nfq.safetensors"
    nfq_core.save(nfq_core.quantize_state_dict(tensors), path)
    try:
        with pytest.raises(HostError, match=message) as error:
            host.run(sample({"model": loader(path.name)}, ["model", 0]))
        assert "\n" not in str(error.value)
    finally:
        path.unlink()
