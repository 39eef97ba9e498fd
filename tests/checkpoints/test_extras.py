"""Tensors that no loader uses: found, named, left out; and what is never left out."""

from __future__ import annotations

import hashlib

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from samples import SMALLEST, TINY, random_half, random_unet

from nfq_core import NFQFile
from nfq_core.checkpoints.batch import convert_folders
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.extras import find_extras, split_extras
from nfq_core.checkpoints.whole_checkpoint import MARKERS, checkpoint_names
from nfq_core.errors import UnsupportedFileError
from nfq_core.files.safetensors_io import aligned_entries
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, SDXL_BASE, SDXL_REFINER, tensor_shapes

UNET = tensor_shapes(SDXL_BASE, "prefixed")
BARE = tensor_shapes(SDXL_BASE, "ldm")

NEEDED = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280),
    **{marker: (1,) for marker in MARKERS},
    "denoiser.sigmas": (1000,),
    **{name: (1000,) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "logvar")},
    CHECKPOINT_PREFIX + "v_pred": (),
}
"""What a loader reads beside the UNet, and small tensors that it does not mind."""


def entries(shapes: dict, dtype: str = "F16") -> dict:
    return aligned_entries({key: (dtype, tuple(shape)) for key, shape in shapes.items()})


def flat(prefix: str, shapes: dict) -> dict:
    """As LDM's own averages are named: without dots."""
    return {prefix + ("diffusion_model." + key).replace(".", ""): shape for key, shape in shapes.items()}


def prefixed(prefix: str, shapes: dict) -> dict:
    return {prefix + key: shape for key, shape in shapes.items()}


EXTRAS = {
    "LDM's averages": (flat("model_ema.", BARE) | {"model_ema.decay": ()}, "EMA weights", "model_ema."),
    "averages": (prefixed("ema.", BARE), "EMA weights", "ema."),
    "averages of a UNet": (prefixed("ema_unet.", BARE), "EMA weights", "ema_unet."),
    "diffusers' averages": ({f"shadow_params.{n}": (640, 640) for n in range(9)}, "EMA weights", "shadow_params."),
    "a refiner": (prefixed("refiner.", tensor_shapes(SDXL_REFINER, "ldm")), "a second UNet", "refiner."),
    "a teacher": (prefixed("teacher.", tensor_shapes(SDXL_BASE, "diffusers")), "a second UNet", "teacher."),
    "a bare copy": ({"unet." + key: shape for key, shape in BARE.items()}, "a second UNet", "unet."),
    "an optimizer": (prefixed("optimizer_states.0.state.", {"1.exp_avg": (640, 640)}), "optimizer states", None),
    "moments": ({CHECKPOINT_PREFIX + "out.2.weight.exp_avg": (4, 320, 64)}, "optimizer states", None),
    "a ControlNet": ({"control_model.input_hint_block.0.weight": (640, 640)}, "ControlNet", "control_model."),
    "a LoRA": ({f"lora_unet_{n}_proj.lora_up.weight": (640, 8) for n in range(9)}, "LoRA", "lora"),
    "anything": ({"teacher_head.weight": (640, 640)}, "others", "teacher_head."),
    "anything in the UNet": ({CHECKPOINT_PREFIX + "motion.0.weight": (640, 640)}, "others", None),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_is_an_extra_beside_a_unet(name):
    added, kind, beginning = EXTRAS[name]
    (found,) = find_extras(entries(UNET | NEEDED | added))
    assert (found.kind, set(found.keys)) == (kind, set(added))
    assert found.nbytes == sum(entry.nbytes for entry in entries(added).values())
    assert beginning in (None, found.prefix)


def test_nothing_that_a_loader_needs_is_an_extra():
    assert find_extras(entries(UNET | NEEDED)) == []
    averages = entries(prefixed("ema.", BARE))
    assert find_extras(averages) == [], "the only UNet there is"
    refiner = prefixed(CHECKPOINT_PREFIX, tensor_shapes(SDXL_REFINER, "ldm"))
    (found,) = find_extras(entries(refiner | prefixed("base.", BARE)))
    assert found.prefix == "base.", "a checkpoint's own UNet goes first"


def test_beside_a_unet_of_another_family_only_known_extras_are():
    shapes = {key: shape for key, shape in UNET.items() if "label_emb" not in key}
    assert find_extras(entries(shapes | {"something.weight": (640, 640)})) == []
    (found,) = find_extras(entries(shapes | prefixed("ema.", BARE)))
    assert found.kind == "EMA weights"


def test_in_a_plain_state_dict_only_twins_and_optimizer_states_are():
    model = {"model.a.weight": (256, 256), "head.weight": (256, 256)}
    assert find_extras(entries(model | {"ema.other.weight": (256, 256), "control_model.x": (256, 256)})) == []
    assert find_extras(entries(model | {"ema.a.weight": (256, 128)})) == [], "another shape"
    for twin in ("model_ema.a.weight", "ema.model.a.weight", "model_ema.aweight", "model.a.weight_ema"):
        (found,) = find_extras(entries(model | {twin: (256, 256)}))
        assert (found.kind, found.keys) == ("EMA weights", (twin,))
    for state in ("head.weight.exp_avg_sq", "optimizer.0.x", "head.weight.momentum"):
        (found,) = find_extras(entries(model | {state: (256, 256)}))
        assert (found.kind, found.keys) == ("optimizer states", (state,))
    assert find_extras(entries(model | {"norm.momentum": (256, 256)})) == []


def test_one_line_names_them_with_their_bytes():
    """SDXL's UNet has 1,680 tensors of 2,567,463,684 weights of two bytes."""
    _, (line,) = split_extras(entries(UNET | flat("model_ema.", BARE) | {"x.y": (500, 1000)}), drop=False)
    assert line == (
        "1,681 tensors (5.14 GB) that no loader uses are kept: EMA weights (`model_ema.*`, 1,680 tensors, 5.13 GB), "
        "other tensors (`x.*`, 1 tensor, 1.00 MB); `--drop-extras` leaves them out"
    )
    kept, (line,) = split_extras(entries(UNET | {"x.y": (500, 1000)}), drop=True)
    assert kept.keys() == UNET.keys()
    assert line == "1 tensor (1.00 MB) that no loader uses is left out: other tensors (`x.*`, 1 tensor, 1.00 MB)"


@pytest.fixture
def source(tmp_path):
    unet = random_unet("prefixed", architecture=TINY)
    weights = {name: random_half(*shape) for name, shape in flat("model_ema.", tensor_shapes(TINY, "ldm")).items()}
    path = tmp_path / "models" / "a.safetensors"
    path.parent.mkdir()
    save_file(unet | weights | {"first_stage_model.x": random_half(256, 256), "v_pred": torch.zeros(0)}, path)
    return path


def test_a_file_with_and_without_its_extras(source, tmp_path):
    with_them, without, back = (tmp_path / name for name in ("with", "without", "back"))
    result = quantize_file(source, with_them)
    assert sum("`--drop-extras` leaves them out" in warning for warning in result["warnings"]) == 1
    result = quantize_file(source, without, drop_extras=True)
    assert sum("left out: EMA weights (`model_ema.*`" in warning for warning in result["warnings"]) == 1
    original = load_file(source)
    needed = {key: tensor for key, tensor in original.items() if not key.startswith("model_ema.")}
    assert result["quantized"] + result["kept"] == len(needed)
    assert without.stat().st_size < with_them.stat().st_size / 2
    with NFQFile(without) as file, NFQFile(with_them) as other:
        assert set(file.keys()) == needed.keys()
        assert set(other.keys()) == original.keys()
        assert file.facts.settings == other.facts.settings | {"drop_extras": True}
        assert file.facts.source.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    dequantize_file(without, back)
    kept = load_file(back)["first_stage_model.x"]
    assert torch.equal(kept, original["first_stage_model.x"])


def test_a_file_without_extras_is_the_same_either_way(tmp_path):
    save_file(random_unet(architecture=SMALLEST), tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    quantize_file(tmp_path / "a", tmp_path / "c", drop_extras=True)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_batch_tells_files_with_and_without_extras_apart(source, tmp_path):
    save_file(random_unet("diffusers"), source.with_name("plain.safetensors"))

    def results(**options) -> list[str]:
        report = convert_folders([source.parent], tmp_path / "out", **options)
        return [row["result"] for row in report["files"]]

    assert results() == ["converted", "converted"]
    assert results(drop_extras=True) == ["failed", "done"]
    assert results(drop_extras=True, overwrite=True) == ["converted", "done"]
    assert results(drop_extras=True) == ["done", "done"]


def test_the_commands(capsys, source, tmp_path):
    code, _, error = run(capsys, "quantize", source, tmp_path / "b", "--drop-extras")
    assert code == 0 and "left out: EMA weights" in error
    code, _, error = run(capsys, "batch", source.parent, "--out", tmp_path / "out", "--drop-extras")
    assert code == 0 and "left out: EMA weights" in error


def test_a_name_that_the_unet_will_get_is_advised_to_leave_out_and_left_out(tmp_path):
    key = CHECKPOINT_PREFIX + "time_embed.0.bias"
    save_file(random_unet("ldm", architecture=TINY) | {key: random_half(8)}, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    with NFQFile(tmp_path / "b") as file, pytest.raises(UnsupportedFileError, match="original with --drop-extras"):
        checkpoint_names(file)
    quantize_file(tmp_path / "a", tmp_path / "c", drop_extras=True)
    with NFQFile(tmp_path / "c") as file:
        assert len(checkpoint_names(file)) == len(tensor_shapes(TINY, "ldm"))
