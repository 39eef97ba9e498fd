"""Files are told apart by the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from samples import SMALL_MODEL, SMALLEST, TINY, random_half, random_unet

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.kinds import kind_of
from nfq_core.errors import UnsupportedFileError
from nfq_core.files.article import write_article_file
from nfq_core.files.original import Original
from nfq_core.files.safetensors_io import aligned_entries
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, KNOWN_ARCHITECTURES, tensor_shapes


def file(shapes: dict[str, tuple[int, ...]], name: str = "a.safetensors", dtype: str = "F16") -> SimpleNamespace:
    """As much of an open file as is looked at, whatever its size."""
    entries = aligned_entries({key: (dtype, tuple(shape)) for key, shape in shapes.items()})
    return SimpleNamespace(path=Path(name), metadata={}, entries=entries)


@pytest.mark.parametrize("architecture", KNOWN_ARCHITECTURES, ids=lambda known: known.name)
@pytest.mark.parametrize("layout", ["ldm", "prefixed", "diffusers"])
def test_the_family(architecture, layout):
    unet = tensor_shapes(architecture, layout)
    kind = kind_of(file(unet))
    assert (kind.name, kind.is_family_unet, kind.obstacle) == (f"{architecture.name} UNet", True, "")
    if layout == "prefixed":
        companions = {"conditioner.embedders.0.x.weight": (64, 64), "first_stage_model.decoder.conv_in.weight": (9, 4)}
        assert kind_of(file(unet | companions)).name == f"{architecture.name} checkpoint"


def test_a_model_of_sdxls_structure_and_other_sizes():
    kind = kind_of(file(tensor_shapes(SMALLEST, "ldm")))
    assert (kind.name, kind.is_family_unet) == ("SDXL-like UNet", True)


def foreign(width: int) -> dict[str, tuple[int, ...]]:
    """A UNet without the embedding of picture sizes, so of no SDXL-type model."""
    shapes = tensor_shapes(TINY, "prefixed")
    shapes = {key: shape for key, shape in shapes.items() if "label_emb" not in key}
    return {key: (32, width) if "attn2.to_k" in key or "attn2.to_v" in key else s for key, s in shapes.items()}


OTHERS = {
    "Stable Diffusion 1 model": foreign(768),
    "Stable Diffusion 2 model": foreign(1024) | {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (9,)},
    "UNet that is not of the SDXL family": foreign(512) | {"first_stage_model.encoder.conv_in.weight": (9, 3, 3, 3)},
    "ControlNet": {"conv_in.weight": (32, 4, 3, 3), "controlnet_down_blocks.0.weight": (32, 32, 1, 1)},
    "IP-Adapter": {"image_proj.proj.weight": (64, 1280), "ip_adapter.1.to_k_ip.weight": (640, 2048)},
    "T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (64, 64, 3, 3)},
    "video model": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (64, 64)},
    "Flux.2 model": {"model.diffusion_model.double_stream_modulation_img.lin.weight": (64, 64)},
    "Stable Diffusion 3 model": {"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (64, 64)},
    "CLIP vision encoder": {"vision_model.encoder.layers.0.mlp.fc1.weight": (64, 64)},
    "text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (64, 64)},
    "upscaler": {"body.0.rdb1.conv1.weight": (32, 64, 3, 3)},
    "file of an unknown kind": {"a.weight": (64, 64), "b.weight": (64, 64)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    kind = kind_of(file(OTHERS[name]))
    assert (kind.name, kind.is_family_unet, kind.obstacle) == (name, False, "")


REFUSED = {
    "LoRA": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (64, 640)}, "it is a LoRA, which loaders add to"),
    "VAE": ({"encoder.conv_in.weight": (9, 3, 3, 3), "decoder.conv_out.weight": (3, 9, 3, 3)}, "it is a VAE, which"),
    "embedding": ({"clip_g": (8, 1280), "clip_l": (8, 768)}, "it has no weights to quantise"),
    "file of an unknown kind": ({"table": (64, 64), "a.weight": (64, 64, 1, 2, 2)}, "it has no weights to quantise"),
    "incomplete model (tensor 'blocks.1.self_attn.q.weight' of Wan is missing)": (
        {"head.modulation": (1, 2, 64)} | {f"blocks.{n}.self_attn.q.weight": (64, 64) for n in (0, 2)},
        "fetch it, or make the merge, again",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_quantised(name):
    shapes, reason = REFUSED[name]
    kind = kind_of(file(shapes))
    assert (kind.name, kind.is_family_unet) == (name, False) and kind.obstacle.startswith(reason)


def test_a_lora_or_vae_offered_as_a_model(tmp_path):
    for name in ("LoRA", "VAE"):
        save_file({key: random_half(*shape) for key, shape in REFUSED[name][0].items()}, tmp_path / name)
        with pytest.raises(UnsupportedFileError) as caught:
            quantize_file(tmp_path / name, tmp_path / "out")
        assert str(caught.value).startswith(f"{tmp_path / name} is not quantised: it is a {name}, which")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"LoRA", name})


LORAS = [
    "a.lora_A.weight",
    "a.to_q_lora.up.weight",
    "a.hada_w1_a",
    "a.lokr_w1",
    "a.oft_blocks",
    "a.dora_scale",
    "a.diff",
    "a.diff_b",
]


@pytest.mark.parametrize("key", LORAS)
def test_kinds_of_lora(key):
    assert kind_of(file({key: (64, 64)})).name == "LoRA"


def test_a_scalar_where_a_weight_should_be():
    shapes = dict(tensor_shapes(SMALLEST, "ldm")) | {"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": ()}
    assert "UNet" in kind_of(file(shapes)).name


def test_an_embedding_of_any_name():
    assert kind_of(file({"<cat-toy>": (4, 768)})).name == "embedding"
    assert kind_of(file({"<cat-toy>": (4, 769)})).name == "file of an unknown kind"


def test_a_damaged_merge_is_told_what_it_lacks():
    shapes = tensor_shapes(KNOWN_ARCHITECTURES[0], "prefixed")
    del shapes[CHECKPOINT_PREFIX + "out.0.bias"]
    kind = kind_of(file(shapes))
    assert not kind.is_family_unet
    assert kind.name.startswith("incomplete UNet (tensor 'model.diffusion_model.out.0.bias' of SDXL's UNet is missing")


@pytest.mark.parametrize("layout", ["ldm", "prefixed"])
def test_a_model_in_eight_bit_floats(layout):
    kind = kind_of(file(tensor_shapes(SMALLEST, layout), dtype="F8_E4M3"))
    assert (kind.name, kind.is_family_unet, kind.obstacle) == ("SDXL-like UNet", True, "")


def test_files_that_are_quantised(tmp_path):
    save_file(SMALL_MODEL, tmp_path / "model")
    quantize_file(tmp_path / "model", tmp_path / "nfq")
    with Original(tmp_path / "nfq") as opened:
        assert kind_of(opened).obstacle == "it is an NFQ file already"
    write_article_file(tmp_path / "article", SMALL_MODEL, 16, 32)
    with Original(tmp_path / "article") as opened:
        assert kind_of(opened).obstacle == "`nfq import-article` converts it"


def test_a_real_file(tmp_path):
    save_file(random_unet("diffusers") | {"count": torch.tensor(1)}, tmp_path / "a.safetensors")
    with Original(tmp_path / "a.safetensors") as opened:
        assert kind_of(opened).name == "SDXL-like UNet"
    save_file({"count": torch.tensor(1), "a": random_half(3)}, tmp_path / "b.safetensors")
    with Original(tmp_path / "b.safetensors") as opened:
        assert kind_of(opened).obstacle == "it has no weights to quantise"
