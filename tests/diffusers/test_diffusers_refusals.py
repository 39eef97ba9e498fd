"""What cannot work in diffusers is refused with one sentence, and nothing is harmed."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers_models import packed_unet, reads_folders, stock_unet, write_config
from forging import Draft
from samples import SMALL_MODEL, TINY
from systems import words

from nfq_core import CorruptFileError, NFQError, UnsupportedFileError, quantize_state_dict, save
from nfq_core.diffusers import NFQConfig, load_unet
from nfq_core.diffusers.quantizer import NFQQuantizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
WIDER = replace(TINY, context_width=56)
DEEPER = replace(TINY, down_depths=((0,), (2,)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders to combine; nothing is written there."""
    root = tmp_path_factory.mktemp("refusals")
    for layout in ("ldm", "diffusers"):
        save(packed_unet(TINY, layout), root / f"{layout}.nfq.safetensors")
    save(quantize_state_dict(SMALL_MODEL), root / "plain.nfq.safetensors")
    whole = packed_unet(TINY, "ldm")
    save({key: value for key, value in whole.items() if "middle_block.1" not in key}, root / "part.nfq.safetensors")
    (root / "newer.nfq.safetensors").write_bytes(newer((root / "ldm.nfq.safetensors").read_bytes()))
    (root / "short.nfq.safetensors").write_bytes((root / "ldm.nfq.safetensors").read_bytes()[:-100])
    stock_unet().save_pretrained(root / "stock")
    write_config(root / "tiny")
    write_config(root / "pipeline" / "unet")
    write_config(root / "wider", WIDER)
    write_config(root / "deeper", DEEPER)
    write_config(root / "inpainting", replace(TINY, in_channels=9))
    write_config(root / "other", _class_name="FluxTransformer2DModel")
    write_config(root / "impossible", down_block_types=["NoSuchBlock", "DownBlock2D"])
    for name, text in (("broken", "{"), ("list", "[1]")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    return root


def newer(container: bytes) -> bytes:
    """The same file with a container version that only a later program writes."""
    draft = Draft.of(container)
    draft.facts["container_version"] = 9
    return draft.data()


@pytest.mark.parametrize(
    ("file", "folder", "error", "message"),
    [
        (
            "ldm.nfq",
            "wider",
            UnsupportedFileError,
            r"does not fit .*attn2.to_k.weight' is \(64, 48\) in the file, \(64, 56\)",
        ),
        ("ldm.nfq", "deeper", UnsupportedFileError, r"the file lacks 'down_blocks.1.*, and \d+ more tensors differ"),
        (
            "ldm.nfq",
            "inpainting",
            UnsupportedFileError,
            r"'conv_in.weight' is \(32, 4, 3, 3\) in the file, \(32, 9, 3, 3\)",
        ),
        ("diffusers.nfq", "wider", UnsupportedFileError, "use the config of the model that was quantised"),
        ("plain.nfq", "tiny", UnsupportedFileError, "plain.nfq.safetensors has no UNet"),
        ("part.nfq", "tiny", UnsupportedFileError, "cannot be used: its UNet is not of the SDXL family"),
        ("newer.nfq", "tiny", UnsupportedFileError, "has container version 9, this version reads up to 1; update"),
        ("short.nfq", "tiny", CorruptFileError, "short.nfq.safetensors is cut short"),
        (
            "stock/diffusion_pytorch_model",
            "tiny",
            UnsupportedFileError,
            "is not an .nfq.safetensors file; `nfq quantize`",
        ),
        ("absent.nfq", "tiny", NFQError, "absent.nfq.safetensors: no such file"),
        ("ldm.nfq", "absent", NFQError, "absent/config.json: no such file; name the folder of the UNet's config.json"),
        ("ldm.nfq", "pipeline", NFQError, "pipeline/config.json: no such file; name .*pipeline/unet"),
        ("ldm.nfq", "ldm.nfq.safetensors", NFQError, "ldm.nfq.safetensors/config.json: no such file"),
        ("ldm.nfq", "other", NFQError, "describes FluxTransformer2DModel; name the folder of a UNet2DConditionModel's"),
        ("ldm.nfq", "list", NFQError, "describes no model"),
        ("ldm.nfq", "broken", NFQError, "broken/config.json is not valid JSON"),
        ("ldm.nfq", "impossible", NFQError, "impossible/config.json: diffusers cannot build a model from it: "),
    ],
)
def test_files_and_configs(root: Path, file: str, folder: str, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        load_unet(root / f"{file}.safetensors", root / folder)
    told = str(caught.value)
    assert re.search(message, told.replace(os.sep, "/")) and "\n" not in told


def test_a_folder_instead_of_a_file(root: Path) -> None:
    with pytest.raises(NFQError, match=r"tiny is a directory; name the \.safetensors file in it"):
        load_unet(root / "tiny", root / "tiny")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.int8}, ValueError, "dtype must be fp16, bf16, fp32 or fp64, got torch.int8"),
        ({"memory": "some"}, ValueError, "memory must be one of packed, resident, auto, got 'some'"),
        ({"device": "cuda:99"}, NFQError, "device 'cuda:99' cannot be used here"),
    ],
)
def test_arguments(root: Path, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_unet(root / "ldm.nfq.safetensors", root / "tiny", **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 15}, "levels"),
        ({"conv_levels": "many"}, "levels"),
        ({"effort": "much"}, "effort"),
        ({"format": "nf15_b64"}, "nf15_b64"),
        ({"preset": "huge"}, "preset must be one of large, balanced, small, tiny, got 'huge'"),
        ({"preset": "tiny", "target_bpw": 3.0}, "exclude each other; got preset and target_bpw"),
        ({"preset": "balanced", "levels": 16}, "exclude each other; got preset and levels"),
        ({"target_bpw": -1}, "target_bpw must be above zero"),
        ({"quant_method": "gguf"}, "quant_method must be 'nfq', got 'gguf'"),
    ],
)
def test_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NFQConfig(**settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"quantization_config": {"quant_method": "nfq", "lvls": 16}},
            ValueError,
            "this quantization_config cannot quantise a model: got an unexpected keyword argument 'lvls'",
        ),
        ({"quantization_config": NFQConfig(target_bpw=0.1)}, NFQError, "too few"),
        ({"quantization_config": NFQConfig(calibration="absent")}, NFQError, "absent: no such file"),
        ({"torch_dtype": torch.float8_e4m3fn}, NFQError, "torch_dtype must be fp16, bf16, fp32 or fp64"),
        ({"device_map": {"": "disk"}}, NFQError, "packed weights cannot be offloaded to disk"),
        ({"low_cpu_mem_usage": False}, ValueError, "`low_cpu_mem_usage` cannot be False"),
    ],
)
def test_quantising_at_load(root: Path, options: dict, error: type, message: str) -> None:
    unet = type(stock_unet())
    with pytest.raises(error, match=message):
        unet.from_pretrained(root / "stock", **{"quantization_config": NFQConfig(), **options})


@reads_folders
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ("dense", UnsupportedFileError, "is not an .nfq.safetensors file"),
        ("unsaid", NFQError, "is quantised already, and its config.json does not say so"),
        ("config", UnsupportedFileError, r"does not fit config.json: 'conv_in.weight' is \(32, 4, 3, 3\) in the file"),
        ("damaged", CorruptFileError, "is damaged"),
        ("newer", UnsupportedFileError, "update the plugin"),
        ("shards", NFQError, "its weights are in several files; a quantised model has one"),
    ],
)
def test_packed_folders(root: Path, tmp_path: Path, spoil: str, error: type, message: str) -> None:
    unet = load_unet(root / "ldm.nfq.safetensors", root / "tiny")
    unet.save_pretrained(tmp_path)
    path, config = tmp_path / WEIGHTS, json.loads((tmp_path / "config.json").read_text())
    options: dict = {}
    if spoil == "dense":
        path.write_bytes((root / "stock" / WEIGHTS).read_bytes())
    elif spoil == "unsaid":
        del config["quantization_config"]
        options = {"quantization_config": NFQConfig()}
    elif spoil == "config":
        config["in_channels"] = 9
    elif spoil == "damaged":
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    elif spoil == "newer":
        path.write_bytes(newer(path.read_bytes()))
    else:
        path.unlink()
        stock_unet().save_pretrained(tmp_path / "shards", max_shard_size="1MB")
        for shard in (tmp_path / "shards").glob("diffusion*"):
            shard.rename(tmp_path / shard.name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        type(stock_unet()).from_pretrained(tmp_path, **options)


def test_a_diffusers_that_cannot_read_packed_folders(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(root / "ldm.nfq.safetensors", root / "tiny")
    unet.save_pretrained(tmp_path)
    monkeypatch.setattr(NFQQuantizer, "maybe_update_loaded_keys", lambda self, keys, files: keys)
    monkeypatch.setattr(NFQQuantizer, "maybe_update_state_dict", lambda self, state: state)
    with pytest.raises(UnsupportedFileError, match=r"0\.39 or newer can; load_unet\(FILE, FOLDER\) reads it"):
        type(stock_unet()).from_pretrained(tmp_path)


def test_weights_that_lack_a_tensor(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(root / "stock" / WEIGHTS)
    del state["mid_block.resnets.0.conv1.weight"]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    write_config(tmp_path)
    with pytest.raises(NFQError, match=r"the weights lack tensor 'mid_block\.resnets\.0\.conv1\.weight'"):
        type(stock_unet()).from_pretrained(tmp_path, quantization_config=NFQConfig())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("sharded", {}, "sharded holds a model in several files; choose another folder"),
        ("new", {"safe_serialization": False}, "as safetensors only"),
        ("new", {"push_to_hub": True}, "use the model's push_to_hub"),
    ],
)
def test_saving(root: Path, tmp_path: Path, target: str, options: dict, message: str) -> None:
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / f"{WEIGHTS}.index.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    unet = load_unet(root / "ldm.nfq.safetensors", root / "tiny")
    with pytest.raises(NFQError, match=message):
        unet.save_pretrained(tmp_path / target, **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["file", "file/inside"])
def test_saving_where_no_folder_can_be(root: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("precious")
    unet = load_unet(root / "ldm.nfq.safetensors", root / "tiny")
    folder = tmp_path / target
    with pytest.raises(NFQError) as caught:
        unet.save_pretrained(folder)
    reason = words(lambda: folder.mkdir(parents=True))
    assert str(caught.value) == f"{folder} cannot be made a folder: {reason}; nothing was changed"
    assert (tmp_path / "file").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_folder_as_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = load_unet(root / "ldm.nfq.safetensors", root / "tiny")
    unet.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self: object, offset: int, data: bytes) -> None:
        raise NFQError("no space left")

    monkeypatch.setattr("nfq_core.files.atomic.AtomicFile.write_at", full)
    with pytest.raises(NFQError, match="no space left"):
        unet.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_config_that_cannot_be_written_leaves_the_weights(root: Path, tmp_path: Path) -> None:
    unet = load_unet(root / "ldm.nfq.safetensors", root / "tiny")
    (tmp_path / "config.json").mkdir()
    (tmp_path / WEIGHTS).write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NFQError, match=r"config\.json is a directory"):
        unet.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == b"precious" and sorted(tmp_path.rglob("*")) == before


def test_saving_elsewhere_in_a_group_of_processes(root: Path, tmp_path: Path) -> None:
    load_unet(root / "ldm.nfq.safetensors", root / "tiny").save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        (None, r"needs diffusers 0\.33 or newer: \S+ -m pip install \"diffusers>=0\.33\" accelerate$"),
        ("0.32.2", r"needs diffusers 0\.33 or newer, this is 0\.32\.2: \S+ -m pip install"),
    ],
)
def test_diffusers_missing_or_too_old(monkeypatch: pytest.MonkeyPatch, stand_in: str | None, message: str) -> None:
    for name in [name for name in sys.modules if name.startswith("nfq_core.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", stand_in and SimpleNamespace(__version__=stand_in))
    with pytest.raises(ImportError, match=message):
        importlib.import_module("nfq_core.diffusers")


def test_accelerate_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfq_core.diffusers.quantizer.is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match=r"needs accelerate \(load_unet does not\): \S+ -m pip install accelerate$"):
        type(stock_unet()).from_pretrained(root / "stock", quantization_config=NFQConfig())
    assert load_unet(root / "ldm.nfq.safetensors", root / "tiny")
