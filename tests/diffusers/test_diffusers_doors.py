"""Other ways by which packed models are reached: `from_pipe`, other classes, PEFT's own calls, casts, tracing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers_models import diffusers, pipeline_parts, reads_folders, stock_unet

from nfq_core import NFQError
from nfq_core.diffusers import NFQConfig
from nfq_core.layers import packed_layers

peft = pytest.importorskip("peft", reason="adapters are PEFT's")
pytest.importorskip("transformers", reason="the pipelines need it")

SHAPE = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8}
TIMES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
UNETS = {
    "Kolors": {**TIMES, "encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"},
    "timestep classes": {"class_embed_type": "timestep"},
    "projected classes": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
    "simply projected classes": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16},
    "classes": {"num_class_embeds": 4},
    "images": {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_image_proj"},
    "GLIGEN": {"attention_type": "gated"},
}


def small_unet(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SHAPE, **UP, **settings).eval()


def vae() -> torch.nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    **{name: lambda settings=settings: small_unet(**settings) for name, settings in UNETS.items()},
    "ControlNet": lambda: diffusers.ControlNetModel(**SHAPE, conditioning_embedding_out_channels=(16, 32)),
    "VAE": vae,
}


def pack(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=NFQConfig(7, conv_levels=7))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return pack(small_unet(), tmp_path_factory.mktemp("unet"))


@pytest.fixture
def twins(unet: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A packed model, and a stock one of the same weights."""
    return copy.deepcopy(unet), copy.deepcopy(unet).dequantize()


def noise(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, 4, 8, 8), (1, 3, 32)))
    with torch.no_grad():
        return model(x, 5, context).sample


def lora(*targets: str, **settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=list(targets), **{"init_lora_weights": False, **settings})


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether results differ by no more than the order of additions in fp32 makes."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


@reads_folders
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_saved_and_read(name: str, tmp_path: Path) -> None:
    model = pack(MODELS[name](), tmp_path / "stock")
    model.save_pretrained(tmp_path / "packed")
    back = type(model).from_pretrained(tmp_path / "packed")
    assert packed_layers(back).keys() == packed_layers(model).keys() != set()
    found, wanted = back.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_model_that_its_config_does_not_describe_is_not_saved(unet: torch.nn.Module, tmp_path: Path) -> None:
    changed = copy.deepcopy(unet)
    changed.conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)
    with pytest.raises(
        NFQError, match=r"'conv_in.weight' is \(32, 4, 3, 3\) in its config, \(32, 9, 3, 3\) in the model"
    ):
        changed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ip_adapter_is_not_saved(unet: torch.nn.Module, tmp_path: Path) -> None:
    changed = copy.deepcopy(unet)
    projection = {f"{part}.{kind}": torch.ones(32) for part in ("norm",) for kind in ("weight", "bias")}
    projection |= {"proj.weight": torch.ones(128, 16), "proj.bias": torch.ones(128)}
    layers = [name for name in changed.attn_processors if "attn2" in name]
    keys = {f"{2 * n + 1}.to_{kind}_ip.weight": torch.ones(64, 32) for n in range(len(layers)) for kind in "kv"}
    changed._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    with pytest.raises(NFQError, match=r"an IP-Adapter is loaded, .* unload_ip_adapter\(\) removes it"):
        changed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "AutoPipelineForImage2Image"]
)
def test_other_pipelines_share_the_unet(kind: str, tmp_path: Path) -> None:
    packed = pack(stock_unet().float(), tmp_path / "unet")
    pipeline = diffusers.StableDiffusionXLPipeline(unet=packed, **pipeline_parts(tmp_path / "words"))
    count = len(packed_layers(packed))
    other = getattr(diffusers, kind).from_pipe(pipeline)
    assert other.unet is packed and len(packed_layers(packed)) == count > 0
    assert type(packed) == diffusers.UNet2DConditionModel != diffusers.ControlNetModel  # noqa: E721


@pytest.mark.parametrize("safe", [False, True])
def test_pefts_own_merge(twins: tuple, safe: bool) -> None:
    wrapped, plain = [], noise(twins[0])
    for model in twins:
        torch.manual_seed(0)
        wrapped.append(peft.get_peft_model(model, lora("to_q", "conv1")))
    beside = noise(wrapped[0])
    assert close(beside, noise(wrapped[1])) and not close(beside, plain)
    wrapped[0].merge_adapter(safe_merge=safe)
    assert close(noise(wrapped[0]), beside)
    wrapped[0].unmerge_adapter()
    assert torch.equal(noise(wrapped[0]), beside)
    merged = wrapped[0].merge_and_unload(safe_merge=safe)
    assert close(noise(merged), beside) and packed_layers(merged)


def add_two(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    model.add_adapter(lora("to_q"), "one")
    model.add_adapter(lora("to_q", "conv1"), "two")
    model.set_adapters(["one", "two"], [0.7, -0.5])


@pytest.mark.parametrize("deleted", ["one", "two"])
def test_a_fused_adapter_that_is_deleted_stays_fused(twins: tuple, deleted: str) -> None:
    fused, unfused = [], []
    for model in twins:
        add_two(model)
        model.fuse_lora()
        model.delete_adapters(deleted)
        fused.append(noise(model))
        model.unfuse_lora()
        model.unload_lora()
        unfused.append(noise(model))
    assert close(*fused) and close(*unfused) and not close(unfused[0], fused[0])
    assert any(layer.low_rank is not None for layer in packed_layers(twins[0]).values())


def test_dequantised_with_fused_adapters(twins: tuple) -> None:
    packed, plain = twins[0], noise(twins[0])
    add_two(packed)
    packed.fuse_lora()
    fused = noise(packed)
    packed.dequantize()
    assert close(noise(packed), fused)
    packed.unfuse_lora()
    packed.unload_lora()
    assert close(noise(packed), plain)


def test_advice_where_loras_are_fused(twins: tuple, tmp_path: Path) -> None:
    packed, plain = twins[0], noise(twins[0])
    add_two(packed)
    packed.fuse_lora()
    with pytest.raises(NFQError, match=r"unfuse_lora\(\) and unload_lora_weights\(\) remove them"):
        packed.save_pretrained(tmp_path)
    kept = copy.deepcopy(packed)
    packed.unfuse_lora()
    packed.unload_lora()
    packed.save_pretrained(tmp_path / "without")
    assert torch.equal(noise(packed), plain)
    kept.unload_lora()
    with pytest.raises(
        NFQError, match=r"permanently.*dequantize\(\) makes a stock model of both, or load the model again"
    ):
        kept.save_pretrained(tmp_path / "with")
    fused = noise(kept)
    kept.dequantize().save_pretrained(tmp_path / "with")
    assert close(noise(type(kept).from_pretrained(tmp_path / "with")), fused)


def test_fused_loras_under_autocast(twins: tuple) -> None:
    results = []
    for model in twins:
        add_two(model)
        model.fuse_lora()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(noise(model).float())
    # Two weights that differ in the last bit of fp32 may be rounded to neighbours in bf16.
    assert close(*results, tolerance=2**-6)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda unet: unet.type(torch.float16), torch.float16),
        (lambda unet: unet.type("torch.HalfTensor"), torch.float16),
        (lambda unet: unet.half(), torch.float16),
        (lambda unet: unet.bfloat16(), torch.bfloat16),
        (lambda unet: unet.double(), torch.float64),
        (lambda unet: unet.to(torch.float64).float(), torch.float32),
        (lambda unet: unet._apply(lambda tensor: tensor.half()), torch.float16),
    ],
)
def test_casts(twins: tuple, cast: Callable, dtype: torch.dtype) -> None:
    packed = twins[0]
    before = {name: layer.weight.clone() for name, layer in packed_layers(packed).items()}
    assert cast(packed) is packed and packed.dtype == dtype
    for name, layer in packed_layers(packed).items():
        assert torch.equal(layer.weight, before[name]) and layer.weight.dtype == torch.uint8
    assert noise(packed, dtype).dtype == dtype
    packed.add_adapter(lora("to_q"))
    packed.fuse_lora()
    fused = [layer.low_rank for layer in packed_layers(packed).values() if layer.low_rank is not None]
    assert fused and {change.up.dtype for change in fused} == {dtype}
    assert noise(packed, dtype).isfinite().all()


@pytest.mark.parametrize("of", ["model", "layer"])
def test_packed_weights_are_not_trained(unet: torch.nn.Module, of: str) -> None:
    trained = unet if of == "model" else unet.mid_block.resnets[0].conv1
    assert trained.requires_grad_(False) is trained
    with pytest.raises(NFQError, match="packed weights cannot be trained; train a LoRA"):
        trained.requires_grad_(True)


@pytest.mark.parametrize(
    "layer", ["mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
)
def test_tracing(unet: torch.nn.Module, layer: str) -> None:
    layer = unet.get_submodule(layer)
    x = torch.randn(2, 64, 4, 4) if isinstance(layer, torch.nn.Conv2d) else torch.randn(2, 64)
    wanted = layer(x)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), wanted)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), wanted)
    for refused in (lambda: torch.jit.trace(layer, x), lambda: torch.jit.script(layer)):
        with pytest.raises(NFQError, match=r"torch\.jit cannot record packed layers; use torch\.export"):
            refused()
