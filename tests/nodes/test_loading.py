"""Loading a whole checkpoint whose text encoders are packed: what the host gets of them, packed or dense."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import TINY as TINY_UNET
from text_models import SMALL_G, SMALL_L, random_tensors

from benchmarks.checkpoint_shapes import clip, text_encoders
from nfq_core import NFTensor, load
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.models.unet_keys import tensor_shapes

UNET = tensor_shapes(TINY_UNET, "prefixed")
OTHERS = text_encoders(SMALL_L, SMALL_G) | {"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    tensors = random_tensors(UNET) | random_tensors(OTHERS, torch.bfloat16)
    save_file(tensors, folder / "whole.safetensors")
    quantize_file(folder / "whole.safetensors", folder / "whole.nfq.safetensors")
    return folder / "whole.nfq.safetensors"


@pytest.fixture
def loading(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, dict]:
    """The module, and what it gave to the host's loader of CLIP and VAE."""
    module, given = import_module(f"{plugin.__name__}.nodes.load"), {}

    def load_parts(tensors: dict, **options: object) -> tuple:
        given.update(tensors=tensors, options=options)
        return None, None, None, None

    monkeypatch.setattr(module.comfy.sd, "load_state_dict_guess_config", load_parts)
    monkeypatch.setattr(module, "_memory_mode", lambda memory, file, names: memory)
    monkeypatch.setattr(module, "build_model", lambda tensors, *others: given.update(model=tensors))
    return module, given


def check(given: dict, packed: Path, memory: str) -> None:
    """The host gets the shapes of the UNet's layers, a dense VAE and text encoders.

    These are packed, or dequantised to their recorded dtype.
    """
    wanted = load(packed, OTHERS, memory="resident")
    assert {value.dtype for value in wanted.values()} == {torch.bfloat16}
    assert given["tensors"].keys() == UNET.keys() | OTHERS.keys()
    as_packed = load(packed, OTHERS)
    for key, value in given["tensors"].items():
        if key in UNET:
            assert value.is_meta is (len(UNET[key]) > 1) and tuple(value.shape) == UNET[key]
        elif memory == "packed" and isinstance(as_packed[key], NFTensor):
            assert torch.equal(value._qdata, as_packed[key].data) and value._params.orig_shape == OTHERS[key]
        else:
            assert type(value) is torch.Tensor and torch.equal(value, wanted[key])
    custom = given["options"]["te_model_options"].get("custom_operations")
    assert (custom is not None) is (memory == "packed")


@pytest.mark.parametrize("memory", ["packed", "resident"])
def test_a_whole_checkpoint(loading: tuple[ModuleType, dict], packed: Path, memory: str) -> None:
    module, given = loading
    # The stub of the host makes neither.
    with pytest.raises(Exception, match="contains neither CLIP nor VAE"):
        module.load_checkpoint(str(packed), memory, lambda *_: None)
    check(given, packed, memory)
    is_packed = [type(value).__name__ == "NFTensor" for value in given["model"].values()]
    assert any(is_packed) is (memory == "packed") and len(given["model"]) == len(UNET)


@pytest.mark.parametrize("memory", ["packed", "resident"])
def test_loading_clip_and_vae_again(loading: tuple[ModuleType, dict], packed: Path, memory: str) -> None:
    module, given = loading
    module._companions_of(str(packed), memory, False)
    check(given, packed, memory)


def test_a_text_encoder_in_the_loader_of_unets(loading: tuple[ModuleType, dict], tmp_path: Path) -> None:
    module, _ = loading
    save_file(random_tensors(clip(SMALL_L)), tmp_path / "clip_l.safetensors")
    quantize_file(tmp_path / "clip_l.safetensors", tmp_path / "clip_l.nfq.safetensors")
    assert len(load_file(tmp_path / "clip_l.safetensors")) == 20
    for load_it in (module.load_unet, module.load_checkpoint):
        with pytest.raises(
            Exception,
            match=r"is a text encoder \(CLIP-L\), .*models/text_encoders, where Load NFQ CLIP",
        ):
            load_it(str(tmp_path / "clip_l.nfq.safetensors"))
