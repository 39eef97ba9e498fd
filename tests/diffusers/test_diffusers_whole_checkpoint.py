"""A pipeline from one quantised checkpoint and a folder of settings: pictures, LoRAs, saving, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import random_weight

from nfq_core import NFQError, NFTensor, load, quantize_state_dict, save
from nfq_core.layers import packed_layers

diffusers = pytest.importorskip("diffusers", reason="the pipelines are diffusers'")
for package in ("accelerate", "peft", "transformers"):
    pytest.importorskip(package, reason="the pipelines need it")

from clip_models import WIDTHS, aligned, clip_names, make_settings_folder, text_encoder, whole_checkpoint  # noqa: E402

from nfq_core.diffusers import load_pipeline, load_text_encoder, load_unet  # noqa: E402

MODELS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a pipeline in `sdxl`, and a whole checkpoint beside it, dense (in memory) and quantised."""
    root = tmp_path_factory.mktemp("whole")
    tensors = whole_checkpoint(make_settings_folder(root / "sdxl"))
    save(quantize_state_dict(tensors, text_encoders="8bit"), root / "whole.nfq.safetensors")
    return root


def without(folder: Path, name: str, *starts: str, add: dict[str, Any] | None = None) -> Path:
    """The checkpoint without tensors whose names have one of these beginnings, and with others."""
    tensors = {
        key: tensor for key, tensor in load(folder / "whole.nfq.safetensors").items() if not key.startswith(starts)
    }
    save(tensors | (add or {}), folder / name, overwrite=True)
    return folder / name


def pipeline_of(folder: Path, **options: Any) -> Any:
    pipeline = load_pipeline(folder / "whole.nfq.safetensors", folder / "sdxl", dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Any, prompt: str = "a b", **options: Any) -> torch.Tensor:
    return pipeline(
        prompt,
        negative_prompt="c",
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


def test_the_picture_of_the_dequantised_models(folder: Path) -> None:
    packed, dense = pipeline_of(folder), pipeline_of(folder, memory="resident")
    assert all(packed_layers(getattr(packed, model)) for model in MODELS) and not packed_layers(packed.vae)
    assert not any(packed_layers(getattr(dense, model)) for model in (*MODELS, "vae"))
    assert torch.equal(picture(packed), picture(dense))
    assert torch.equal(picture(packed, clip_skip=1), picture(dense, clip_skip=1))
    assert not torch.equal(picture(packed), picture(packed, clip_skip=1))
    assert type(packed) is diffusers.StableDiffusionXLPipeline


def test_every_model_has_the_checkpoint_s_weights(folder: Path) -> None:
    """diffusers' own conversion of the dequantised checkpoint gives the same models."""
    tensors = load(folder / "whole.nfq.safetensors")
    dense = {key: one.dequantize() if isinstance(one, NFTensor) else one for key, one in tensors.items()}
    ours = pipeline_of(folder, memory="resident")
    vae = diffusers.AutoencoderKL.from_single_file(dense, config=str(folder / "sdxl"), subfolder="vae")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(ours.vae.state_dict()[name], tensor.float()), name
    names = clip_names(ours.text_encoder, "conditioner.embedders.0.transformer.")
    assert all(torch.equal(tensor, dense[name].float()) for name, tensor in names.items())


def test_fp32_is_the_default_on_a_cpu(folder: Path) -> None:
    """diffusers says that fp16 cannot run there; a single model has the dtype of its file."""
    pipeline = load_pipeline(folder / "whole.nfq.safetensors", folder / "sdxl")
    assert {getattr(pipeline, model).dtype for model in (*MODELS, "vae")} == {torch.float32}
    assert load_unet(folder / "whole.nfq.safetensors", folder / "sdxl" / "unet").dtype == torch.float16


def test_a_pipeline_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(folder)
    pipeline.save_pretrained(tmp_path / "saved")
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert all(packed_layers(aligned(getattr(again, model))) for model in MODELS)
    assert torch.equal(picture(again), picture(pipeline))


def lora(pipeline: Any) -> dict[str, torch.Tensor]:
    """A LoRA in diffusers' names on the UNet and both text encoders."""
    tensors = {}
    for model in MODELS:
        for name, layer in getattr(pipeline, model).named_modules():
            if name.endswith(("to_q", "q_proj")):
                tensors[f"{model}.{name}.lora_A.weight"] = random_weight(4, layer.in_features) / 4
                tensors[f"{model}.{name}.lora_B.weight"] = random_weight(layer.out_features, 4, seed=1) / 4
    return tensors


def test_load_lora_weights(folder: Path) -> None:
    packed, dense = pipeline_of(folder), pipeline_of(folder, memory="resident")
    before, factors = picture(packed), lora(dense)
    for pipeline in (packed, dense):
        pipeline.load_lora_weights(dict(factors), adapter_name="one")
        pipeline.set_adapters(["one"], [0.7])
    attached = picture(packed)
    assert torch.equal(attached, picture(dense)) and not torch.equal(attached, before)
    packed.fuse_lora(components=list(MODELS))
    assert all(
        layer.low_rank is not None for name, layer in packed_layers(packed.text_encoder).items() if "q_proj" in name
    )
    torch.testing.assert_close(picture(packed), attached, rtol=1e-3, atol=1e-3)
    packed.unfuse_lora(components=list(MODELS))
    packed.unload_lora_weights()
    assert torch.equal(picture(packed), before)


def test_dora_is_refused(folder: Path) -> None:
    pipeline = pipeline_of(folder)
    before, factors = picture(pipeline), lora(pipeline)
    of_text = {name: tensor for name, tensor in factors.items() if name.startswith("text_encoder.")}
    for name in list(of_text):
        if "lora_B" in name:
            magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
            of_text[magnitude] = torch.ones(WIDTHS[0])
    with pytest.raises(NFQError, match="DoRA needs dense weights"):
        pipeline.load_lora_weights(of_text, adapter_name="one")
    assert torch.equal(picture(pipeline), before)


def test_textual_inversion(folder: Path) -> None:
    packed, dense = pipeline_of(folder), pipeline_of(folder, memory="resident")
    pictures = []
    for pipeline in (packed, dense):
        for suffix, width in zip(("", "_2"), WIDTHS, strict=True):
            own = {name: getattr(pipeline, name + suffix) for name in ("tokenizer", "text_encoder")}
            pipeline.load_textual_inversion({"<new>": random_weight(2, width) / 4}, token="<new>", **own)
        pictures.append(picture(pipeline, "a <new>"))
    assert torch.equal(*pictures) and not torch.equal(pictures[0], picture(packed, "a b"))


def test_model_offload(folder: Path) -> None:
    pipeline = pipeline_of(folder)
    wanted = picture(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(picture(pipeline), wanted)


def test_markers_of_v_prediction(folder: Path) -> None:
    path = without(folder, "v.nfq.safetensors", "-", add={"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    config = load_pipeline(path, folder / "sdxl").scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


def test_checkpoints_that_lack_something(folder: Path) -> None:
    settings = folder / "sdxl"
    path = without(folder, "none.nfq.safetensors", "conditioner.")
    with pytest.raises(NFQError, match=r"has no text encoder; name a whole checkpoint, or load its parts"):
        load_pipeline(path, settings)
    with pytest.raises(NFQError, match=r"holds a UNet and no text encoder; .*load_unet reads the UNet"):
        load_text_encoder(path, settings / "text_encoder")
    path = without(folder, "one.nfq.safetensors", "conditioner.embedders.1.")
    with pytest.raises(
        NFQError, match=r"one.nfq.safetensors holds CLIP, but .*text_encoder_2/config.json .* width 128"
    ):
        load_pipeline(path, settings)
    foreign = clip_names(text_encoder("CLIPTextModel", hidden_size=192), "cond_stage_model.transformer.")
    path = without(folder, "foreign.nfq.safetensors", "conditioner.", add=foreign)
    with pytest.raises(NFQError, match=r"holds CLIP, but .*text_encoder/config.json.* width 64"):
        load_pipeline(path, settings)
    path = without(folder, "vae.nfq.safetensors", "first_stage_model.")
    with pytest.raises(NFQError, match="has no VAE"):
        load_pipeline(path, settings)
    path = without(folder, "text.nfq.safetensors", "model.", "first_stage_model.")
    with pytest.raises(NFQError, match=r"is a text encoder \(CLIP and CLIP\), not a UNet; load_text_encoder reads"):
        load_unet(path, settings / "unet")
    path = without(
        folder, "layer.nfq.safetensors", "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_b"
    )
    with pytest.raises(
        NFQError, match=r"the file lacks 'text_model.encoder.layers.1.self_attn.._proj.bias', and 2 more"
    ):
        load_pipeline(path, settings)


def test_folders_that_do_not_match(folder: Path, tmp_path: Path) -> None:
    file = folder / "whole.nfq.safetensors"
    with pytest.raises(NFQError, match=r"model_index.json cannot be read: .*; give a local folder"):
        load_pipeline(file, folder / "sdxl" / "unet")
    shutil.copytree(folder / "sdxl", tmp_path / "sdxl")
    index = json.loads((tmp_path / "sdxl" / "model_index.json").read_text())
    (tmp_path / "sdxl" / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoPipeline"}))
    with pytest.raises(NFQError, match="describes NoPipeline; name the folder of an SDXL pipeline"):
        load_pipeline(file, tmp_path / "sdxl")
    (tmp_path / "sdxl" / "model_index.json").write_text(json.dumps(index))
    config = tmp_path / "sdxl" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [32, 64]}))
    with pytest.raises(NFQError, match="its VAE does not fit"):
        load_pipeline(file, tmp_path / "sdxl")
    shutil.copytree(folder / "sdxl" / "vae", tmp_path / "sdxl" / "vae", dirs_exist_ok=True)
    (tmp_path / "sdxl" / "scheduler" / "scheduler_config.json").write_text("no JSON")
    with pytest.raises(NFQError, match="cannot be loaded as a pipeline"):
        load_pipeline(file, tmp_path / "sdxl")
    shutil.rmtree(tmp_path / "sdxl" / "tokenizer")
    with pytest.raises(NFQError, match=r"has no folder 'tokenizer', which its model_index.json names"):
        load_pipeline(file, tmp_path / "sdxl")
