"""Packed UNets in SDXL pipelines: CFG and DPM++, saving, LoRA, offloading, the example of the documentation."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import TINY, random_weight, unet_config

from nfq_core import NFQError, quantize_file, quantize_state_dict, save
from nfq_core.calibration.prompts import PROMPTS
from nfq_core.layers import packed_layers
from nfq_core.models.unet_keys import UNetArchitecture

diffusers = pytest.importorskip("diffusers", reason="the pipelines are diffusers'")
for package in ("accelerate", "peft", "transformers"):
    pytest.importorskip(package, reason="the pipelines need it")

from clip_models import ARCHITECTURE, make_settings_folder, whole_checkpoint  # noqa: E402
from diffusers_models import noise_of, packed_unet, pipeline_parts, reads_folders, stock_unet, write_config  # noqa: E402
from family_models import diffusers_models  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from nfq_core.diffusers import NFQConfig, load_unet  # noqa: E402

Pipeline = diffusers.StableDiffusionXLPipeline
asks_for_dtype = hasattr(BaseTunerLayer, "_get_base_layer_device_and_dtype")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pipeline_parts(tmp_path_factory.mktemp("parts") / "words")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised UNet, with a config.json beside it."""
    folder = tmp_path_factory.mktemp("packed")
    save(packed_unet(TINY, "ldm"), folder / "tiny.nfq.safetensors")
    write_config(folder)
    return folder / "tiny.nfq.safetensors"


def packed_pipeline(file: Path, parts: dict[str, Any]) -> Pipeline:
    pipeline = Pipeline(unet=load_unet(file, file.parent, dtype=torch.float32), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_pipeline(file: Path, parts: dict[str, Any]) -> Pipeline:
    """The same weights in a stock UNet."""
    unet = load_unet(file, file.parent, dtype=torch.float32, memory="resident")
    pipeline = Pipeline(unet=unet, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Pipeline) -> torch.Tensor:
    """Latents of two steps of DPM++ 2M under CFG."""
    return pipeline(
        "a cat",
        negative_prompt="a dog",
        num_inference_steps=2,
        guidance_scale=5.0,
        height=16,
        width=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.fixture(scope="module")
def picture(file: Path, parts: dict[str, Any]) -> torch.Tensor:
    return draw(stock_pipeline(file, parts))


def lora(seed: int, part: str, rank: int = 3) -> dict[str, torch.Tensor]:
    """A LoRA on all layers of the UNet with `part` in their names, convolutions too."""
    factors = {}
    for name, weight in stock_unet().state_dict().items():
        if part in name and name.endswith(".weight") and weight.dim() > 1:
            key = f"unet.{name.removesuffix('.weight')}"
            factors[f"{key}.lora_A.weight"] = random_weight(rank, *weight.shape[1:], seed=seed) * 0.1
            up_shape = (len(weight), rank, *[1] * (weight.dim() - 2))
            factors[f"{key}.lora_B.weight"] = random_weight(*up_shape, seed=seed) * 0.1
    return factors


def add_loras(pipeline: Pipeline) -> None:
    pipeline.load_lora_weights(lora(1, "attn"), adapter_name="one")
    pipeline.load_lora_weights(lora(2, "mid_block"), adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.7, -0.5])


def nearly(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether latents differ by no more than changes of the order of additions in fp32 do over a few layers."""
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def test_sampling(file: Path, parts: dict[str, Any], picture: torch.Tensor) -> None:
    assert torch.isfinite(picture).all()
    assert torch.equal(draw(packed_pipeline(file, parts)), picture)


@reads_folders
def test_a_saved_pipeline_needs_no_argument(
    file: Path, parts: dict[str, Any], picture: torch.Tensor, tmp_path: Path
) -> None:
    packed_pipeline(file, parts).save_pretrained(tmp_path)
    back = Pipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert packed_layers(back.unet) and torch.equal(draw(back), picture)


@pytest.mark.skipif(not hasattr(diffusers, "PipelineQuantizationConfig"), reason="diffusers has it from 0.34 on")
def test_a_pipelines_unet_quantised_at_load(parts: dict[str, Any], tmp_path: Path) -> None:
    Pipeline(unet=stock_unet(), **parts).save_pretrained(tmp_path)
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": NFQConfig(7)})
    pipeline = Pipeline.from_pretrained(tmp_path, quantization_config=config)
    assert {layer.format_id for layer in packed_layers(pipeline.unet).values()} == {"nf7_b64", "nf32_b64"}
    assert not packed_layers(pipeline.vae)


def test_loras_do_what_they_do_to_a_stock_unet(file: Path, parts: dict[str, Any], picture: torch.Tensor) -> None:
    packed, stock = packed_pipeline(file, parts), stock_pipeline(file, parts)
    for pipeline in (packed, stock):
        add_loras(pipeline)
    both = draw(packed)
    assert torch.equal(both, draw(stock)) and not nearly(both, picture)
    for pipeline in (packed, stock):
        pipeline.set_adapters(["two"], [0.3])
    assert torch.equal(draw(packed), draw(stock))
    packed.disable_lora()
    assert torch.equal(draw(packed), picture)
    packed.unload_lora_weights()
    assert torch.equal(draw(packed), picture) and len(packed_layers(packed.unet)) > 50


def test_fused_loras(file: Path, parts: dict[str, Any], picture: torch.Tensor) -> None:
    packed = packed_pipeline(file, parts)
    add_loras(packed)
    both = draw(packed)
    packed.fuse_lora(components=["unet"], safe_fusing=True)
    assert nearly(draw(packed), both)
    packed.unfuse_lora(components=["unet"])
    assert nearly(draw(packed), both)
    assert all(layer.low_rank is None for layer in packed_layers(packed.unet).values())
    packed.fuse_lora(components=["unet"], adapter_names=["one"])
    packed.unload_lora_weights()
    one = draw(packed)
    packed.load_lora_weights(lora(2, "mid_block"), adapter_name="two")
    packed.set_adapters(["two"], [-0.5])
    packed.fuse_lora(components=["unet"])
    assert nearly(draw(packed), both), "the second is added to the first"
    packed.unfuse_lora(components=["unet"])
    packed.unload_lora_weights()
    assert nearly(draw(packed), one), "what was fused before stays"
    dense = copy.deepcopy(packed.unet).dequantize()
    assert not packed_layers(dense)
    packed.unet = dense
    assert nearly(draw(packed), one) and not nearly(one, picture)


@pytest.mark.skipif(not asks_for_dtype, reason="this PEFT leaves factors beside packed weights in their own dtype")
def test_lora_factors_take_the_models_dtype(file: Path, parts: dict[str, Any]) -> None:
    packed = packed_pipeline(file, parts)
    packed.unet.half()
    packed.load_lora_weights(lora(1, "attn1"), adapter_name="one")
    factors = [value for name, value in packed.unet.named_parameters() if "lora_" in name]
    assert factors and {factor.dtype for factor in factors} == {torch.float16}


def test_new_adapters_can_be_trained(file: Path) -> None:
    from peft import LoraConfig

    unet = load_unet(file, file.parent, dtype=torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    trained = [value for value in unet.parameters() if value.requires_grad]
    noise = unet(
        random_weight(1, 4, 8, 8),
        1,
        random_weight(1, 5, TINY.context_width),
        added_cond_kwargs={"text_embeds": random_weight(1, 32), "time_ids": random_weight(1, 6)},
    ).sample
    noise.square().mean().backward()
    assert trained and any(value.grad is not None and value.grad.any() for value in trained)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("dora", "DoRA needs dense weights"),
        ("lora", r"LoRAs are attached, .*unload_lora_weights\(\) removes them"),
        ("fused", r"a LoRA is fused into .* permanently, .*dequantize\(\) makes a stock model of both"),
        ("bias", "adapter 'default' is not a plain LoRA"),
        ("nan", "adapters one hold NaN or Inf"),
        ("qkv", "q, k and v cannot be fused while they are packed"),
    ],
)
def test_what_packed_weights_cannot_do(
    file: Path, parts: dict[str, Any], picture: torch.Tensor, tmp_path: Path, spoil: str, message: str
) -> None:
    from peft import LoraConfig

    pipeline = packed_pipeline(file, parts)
    unet, factors = pipeline.unet, lora(1, "attn1.to_out")
    with pytest.raises(NFQError, match=message):
        if spoil == "dora":
            key = next(iter(factors)).replace("lora_A", "lora_magnitude_vector")
            unet.load_lora_adapter(factors | {key: torch.ones(32)}, prefix="unet")
        elif spoil == "bias":
            unet.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True))
            unet.fuse_lora()
        elif spoil == "nan":
            next(iter(factors.values())).fill_(float("nan"))
            pipeline.load_lora_weights(factors, adapter_name="one")
            pipeline.fuse_lora(components=["unet"], safe_fusing=True)
        elif spoil == "qkv":
            pipeline.fuse_qkv_projections(vae=False)
        else:
            pipeline.load_lora_weights(factors)
            if spoil == "fused":
                pipeline.fuse_lora(components=["unet"])
                pipeline.unload_lora_weights()
            unet.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline.unfuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    if spoil != "fused":
        assert torch.equal(draw(pipeline), picture)


@pytest.mark.parametrize("with_loras", [False, True])
def test_model_offload(file: Path, parts: dict[str, Any], with_loras: bool) -> None:
    pipeline = packed_pipeline(file, parts)
    if with_loras:
        add_loras(pipeline)
    wanted = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline), wanted)
    pipeline.remove_all_hooks()


def test_sequential_offload(file: Path, parts: dict[str, Any], picture: torch.Tensor, tmp_path: Path) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    pipeline = packed_pipeline(file, parts)
    # As enable_sequential_cpu_offload does with each part; CLIP cannot be offloaded from a CPU to a CPU.
    cpu_offload(pipeline.unet, torch.device("cpu"), offload_buffers=True)
    assert {layer.weight.device.type for layer in packed_layers(pipeline.unet).values()} == {"meta"}
    assert torch.equal(draw(pipeline), picture)
    for refused in (lambda: pipeline.unet.save_pretrained(tmp_path), pipeline.unet.dequantize):
        with pytest.raises(NFQError, match=r"'conv_in.weight' is offloaded; .*remove_all_hooks\(\)"):
            refused()
    remove_hook_from_submodules(pipeline.unet)
    assert torch.equal(draw(pipeline), picture)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(file: Path, parts: dict[str, Any], picture: torch.Tensor, kind: str) -> None:
    pipeline, cpu = packed_pipeline(file, parts), torch.device("cpu")
    try:
        stock_unet().enable_group_offload(cpu, cpu, kind, num_blocks_per_group=1)
    except AttributeError:
        pytest.skip("this diffusers cannot offload groups, or not without an accelerator")
    pipeline.unet.enable_group_offload(cpu, cpu, kind, num_blocks_per_group=1)
    assert torch.equal(draw(pipeline), picture)


def make_known(monkeypatch: pytest.MonkeyPatch, *tiny: UNetArchitecture) -> None:
    """Make tiny architectures some of those whose configuration `load_unet` knows."""
    monkeypatch.setattr("nfq_core.models.unet.KNOWN_ARCHITECTURES", tiny)
    monkeypatch.setattr(
        "nfq_core.diffusers.loading.diffusers_config",
        lambda architecture: {"_class_name": "UNet2DConditionModel", **unet_config(architecture)},
    )


def test_a_known_architecture_needs_no_config(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = shutil.copy(file, tmp_path)
    with pytest.raises(NFQError, match=r"architecture is not known; give load_unet the folder of the UNet's config"):
        load_unet(alone)
    make_known(monkeypatch, TINY)
    known, given = (
        load_unet(path, folder, dtype=torch.float32) for path, folder in ((alone, None), (file, file.parent))
    )
    assert torch.equal(noise_of(known), noise_of(given))
    assert known.config.block_out_channels == list(TINY.channels)


@reads_folders
def test_the_examples_of_the_documentation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They run one after the other in a folder that holds what they name, without a deprecated argument."""
    stock = make_settings_folder(tmp_path / "without-weights")
    stock.to(torch.float32).save_pretrained(tmp_path / "sdxl")
    for name in ("model", "sdxl"):
        save(quantize_state_dict(whole_checkpoint(stock)), tmp_path / f"{name}-balanced.nfq.safetensors")
    flux = tmp_path / "flux1-dev" / "transformer"
    diffusers_models()["Flux.1"].to(torch.bfloat16).save_pretrained(flux)
    quantize_file(flux / "diffusion_pytorch_model.safetensors", tmp_path / "flux1-dev-balanced.nfq.safetensors")
    make_known(monkeypatch, ARCHITECTURE)
    monkeypatch.chdir(tmp_path)
    # Fewer steps, smaller pictures.
    call = Pipeline.__call__
    small = {"num_inference_steps": 2, "height": 16, "width": 16}
    monkeypatch.setattr(Pipeline, "__call__", lambda self, prompt, **given: call(self, prompt, **given | small))
    monkeypatch.setattr("nfq_core.calibration.prompts.PROMPTS", PROMPTS[:2])
    names: dict[str, Any] = {"prompts": ["a lighthouse"]}
    for page in ("README.md", "docs/DIFFUSERS.md", "docs/CALIBRATION.md", "docs/BENCHMARKS.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
        assert blocks
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    assert "deprecated" not in caplog.text + capsys.readouterr().err
    assert not [warning for warning in recwarn if "dtype` is deprecated" in str(warning.message)]
