"""Around packed text encoders: names, settings, refusals, recipes, facts. The real host tests the rest."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from samples import TINY as TINY_UNET
from samples import random_weight
from text_models import SMALL_G, SMALL_L, random_tensors

from benchmarks.checkpoint_shapes import CLIP_L, OPEN_CLIP_G, text_encoders
from benchmarks.checkpoint_shapes import clip as clip_shapes
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.files.safetensors_io import Entry
from nfq_core.models.unet_keys import SDXL_BASE, tensor_shapes
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import DEFAULTS, Formats, Settings


def module(plugin: ModuleType, name: str) -> ModuleType:
    return import_module(f"{plugin.__name__}.nodes.{name}")


def core(plugin: ModuleType, name: str = "") -> ModuleType:
    """The plugin's own copy of the core, whose classes are its own."""
    return import_module(f"{plugin.__name__}.nfq_core{name}")


QUERY, KEY, VALUE = (f"clip_g.transformer.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


def test_open_clips_attention_is_quantised_as_one_weight(plugin: ModuleType) -> None:
    """As files store it; CLIP-L's stays three weights, and so does one that lacks a part."""
    clip = module(plugin, "clip")
    entry = Entry("F16", (64, 64), 0, 0)
    others = [QUERY.replace("clip_g", "clip_l"), KEY.replace("clip_g", "clip_l"), QUERY.replace("s.0", "s.1")]
    fused, groups = clip._fused(dict.fromkeys([QUERY, KEY, VALUE, *others], entry))
    assert groups == {QUERY: [QUERY, KEY, VALUE]}
    assert {key: each.shape for key, each in fused.items()} == {QUERY: (192, 64), **dict.fromkeys(others, (64, 64))}
    packed, dense = core(plugin).quantize(random_weight(192, 64), 16), random_weight(192, 64)
    for value, wanted in ((packed, core(plugin, ".packed.rows").split_rows(packed, 3)), (dense, dense.chunk(3))):
        parts = clip._separated({QUERY: value, others[0]: dense}, groups)
        assert list(parts) == [QUERY, KEY, VALUE, others[0]]
        for key, part in zip([QUERY, KEY, VALUE], wanted, strict=True):
            data = [each.data if hasattr(each, "format") else each for each in (parts[key], part)]
            assert torch.equal(*data)


def test_the_host_renames_and_joins_packed_weights(plugin: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    save = module(plugin, "save")
    quantize = core(plugin).quantize
    whole, single, kept = quantize(random_weight(192, 64), 16), quantize(random_weight(6, 64), 16), torch.arange(3.0)
    parts = core(plugin, ".packed.rows").split_rows(whole, 3)

    def rename(tensors: dict) -> dict:
        return {"in": torch.cat([tensors[name] for name in "qkv"]), "one": tensors["x"], "kept": tensors["bias"]}

    tensors = dict(zip("qkv", parts, strict=True)) | {"x": single, "bias": kept}
    result = save._renamed(rename, tensors)
    assert torch.equal(result["in"].data, whole.data) and result["one"] is single and result["kept"] is kept
    assert not caplog.records
    other = quantize(random_weight(64, 64) * 9, 16)
    result = save._renamed(rename, tensors | {"v": other})
    assert torch.equal(result["in"], torch.cat([part.dequantize(part.dtype) for part in (*parts[:2], other)]))
    assert "are saved dequantised" in caplog.text


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"target_bpw": 4.9}, "8bit"),
        ({"target_bpw": 4.1}, "8bit"),
        ({"target_bpw": 3.4}, "5bit"),
        ({"target_bpw": 2.8}, "5bit"),
        ({"levels": 7}, "8bit"),
        ({}, "8bit"),
    ],
)
def test_the_size_decides_how_text_encoders_are_stored(plugin: ModuleType, settings: dict, bits: str) -> None:
    assert module(plugin, "save")._text_encoder_bits(settings) == bits


def test_a_missing_clip_refuses_every_use(plugin: ModuleType) -> None:
    clip = module(plugin, "clip")
    missing = clip.MissingCLIP("no CLIP here")
    for use in (lambda: missing.tokenize("x"), missing.clone, lambda: clip.is_packed_clip(missing)):
        with pytest.raises(Exception, match="no CLIP here"):
            use()
    assert not hasattr(missing, "patcher")
    with pytest.raises(Exception, match="load text encoders with Load NFQ CLIP, Load CLIP or DualCLIPLoader"):
        clip.is_packed_clip(None)


def test_origin_of_a_clip(plugin: ModuleType) -> None:
    prompt = {
        "1": {"inputs": {"clip_name1": "l.safetensors", "clip_name2": "g.safetensors", "type": "sdxl"}},
        "2": {"inputs": {"ckpt_name": "model.safetensors"}},
        "3": {
            "inputs": {
                **{"lora_name": "style.safetensors", "strength_model": 1.0, "strength_clip": 0.5},
                **{"model": ["2", 0], "clip": ["1", 0]},
            }
        },
        "4": {"inputs": {"clip": ["3", 1]}},
    }
    origin = module(plugin, "recipe").origin_in_graph(prompt, "4", "clip")
    assert origin.name == "l.safetensors and g.safetensors" and not origin.path
    assert origin.baked == ("LoRA style.safetensors at 0.5",)
    prompt["1"]["inputs"]["clip_name2"] = "(none)"
    assert module(plugin, "recipe").origin_in_graph(prompt, "4", "clip").name == "l.safetensors"


def test_a_missing_text_encoder_is_explained(plugin: ModuleType) -> None:
    recipe = {"source": "t5.safetensors", "source_sha256": "ab", "settings": {"text_encoders": "5bit"}}
    explain = module(plugin, "recipe").missing_file
    text = explain("text_encoders", "sub/t5.nfq.safetensors", json.dumps(recipe))
    for part in ("NFQ Quantize CLIP with bits=5bit", "Save NFQ CLIP with filename_prefix 'sub/t5'"):
        assert part in text
    assert "or run `nfq quantize` on it with --text-encoders 5bit" in text
    recipe["settings"] = {"levels": 16}
    text = explain("text_encoders", "t5.nfq.safetensors", json.dumps(recipe))
    assert "NFQ Quantize CLIP" not in text and "run `nfq quantize` on it with --levels 16" in text
    recipe["settings"] = {"preset": "tiny", "target_bpw": 2.8, "text_encoders": "5bit"}
    text = explain("checkpoints", "all.nfq.safetensors", json.dumps(recipe))
    assert "filename_prefix 'all' and text_encoders=5bit, and its CLIP and VAE" in text


def test_a_language_model_inside_a_diffusion_model_is_not_a_text_encoder(plugin: ModuleType) -> None:
    """NFQ Quantize Model sees names without the host's prefix; a MODEL without layers is refused."""
    shapes = {"model.embed_tokens.weight": (1024, 128), "model.layers.0.self_attn.q_proj.weight": (128, 128)}
    bake = module(plugin, "bake")
    patches = {f"diffusion_model.{key}": [(torch.zeros(shape), None)] for key, shape in shapes.items()}
    model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=torch.nn.Module(), parameters=list, named_modules=list),
        get_injections=lambda name: None,
        get_attachment=lambda name: None,
        model_options={},
        use_ejected=lambda: pytest.MonkeyPatch.context(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bake, "key_patches", lambda model: patches)
        patch.setattr(bake, "nf_layers", lambda model: iter(()))
        with pytest.raises(Exception, match="has no Linear or Conv2d layers that NFQ quantises"):
            bake.quantize_model(model, bake.Settings(), "cpu", module(plugin, "recipe").Origin())


def test_sdxl_in_memory_at_the_defaults() -> None:
    """MODEL and CLIP: at most 0.36 of fp16, counted over the buffers of all weights."""
    shapes = tensor_shapes(SDXL_BASE, "prefixed") | text_encoders(CLIP_L, OPEN_CLIP_G)
    plans = plan_tensors({key: Entry("F16", shape, 0, 0) for key, shape in shapes.items()}, DEFAULTS)[1]
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    packed = sum(plans[key].format.packed_bytes(size) if plans[key].format else 2 * size for key, size in sizes.items())
    assert packed <= 0.36 * 2 * sum(sizes.values())


def test_facts_of_a_file_are_the_diffusion_models(plugin: ModuleType, tmp_path: Path) -> None:
    """Bits and formats; its sizes are the whole file's. A text encoder alone has its own."""
    small = text_encoders(SMALL_L, SMALL_G)
    for name, shapes in (("whole", tensor_shapes(TINY_UNET, "prefixed") | small), ("clip", clip_shapes(SMALL_L))):
        save_file(random_tensors(shapes), tmp_path / f"{name}.safetensors")
        settings = Settings(Formats(), text_encoders="8bit")
        quantize_file(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.nfq.safetensors", settings)
    summaries = {}
    for name in ("whole", "clip"):
        path = tmp_path / f"{name}.nfq.safetensors"
        with core(plugin).NFQFile(path) as file:
            summaries[name] = module(plugin, "report").file_summary(file, name)
            assert summaries[name]["file_bytes"] == path.stat().st_size
            assert summaries[name]["fp16_bytes"] > (tmp_path / f"{name}.safetensors").stat().st_size - 200_000
    whole, alone = summaries["whole"], summaries["clip"]
    assert {each["format"] for each in whole["formats"]} == {"nf16_b64", "nf32_b64"}
    assert whole["packed_bits_per_weight"] < 5.5 < 8 < alone["packed_bits_per_weight"]
    assert {each["format"] for each in alone["formats"]} == {"nf256_b64"}
