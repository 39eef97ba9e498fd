"""A model to quantise: one file, or the parts of a sharded model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import random_unet, random_weight

from nfq_core.checkpoints.batch import convert_folders
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import compare_files
from nfq_core.errors import CorruptFileError, NFQError, UnsupportedFileError
from nfq_core.files.original import Original, sharded_model

NAME = "diffusion_pytorch_model"
INDEX = f"{NAME}.safetensors.index.json"


def shard(folder: Path, tensors: dict[str, torch.Tensor], parts: int = 3, suffix: str = ".safetensors") -> Path:
    """Write a model in parts as diffusers and transformers do; returns its index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = list(tensors), {}
    for number in range(parts):
        name = f"{NAME}-{number + 1:05}-of-{parts:05}{suffix}"
        own = {key: tensors[key] for key in keys[number::parts]}
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder / INDEX


@pytest.fixture
def whole(tmp_path):
    save_file(random_unet(), tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


@pytest.fixture
def index(tmp_path):
    return shard(tmp_path / "unet", random_unet())


@pytest.mark.parametrize("by", ["index", "folder", "folder/"])
def test_a_sharded_model_becomes_what_the_whole_file_becomes(tmp_path, whole, index, by):
    source = {"index": index, "folder": index.parent, "folder/": f"{index.parent}/"}[by]
    result = quantize_file(source, tmp_path / "shards.nfq.safetensors")
    quantize_file(whole, tmp_path / "whole.nfq.safetensors")
    parts = sorted(index.parent.glob("*.safetensors"))
    assert result["original_bytes"] == sum(part.stat().st_size for part in parts)
    for name in ("shards", "whole"):
        dequantize_file(tmp_path / f"{name}.nfq.safetensors", tmp_path / f"{name}-back.safetensors")
    ours, twins = load_file(tmp_path / "shards-back.safetensors"), load_file(tmp_path / "whole-back.safetensors")
    assert ours.keys() == twins.keys()
    assert all(torch.equal(ours[key], twins[key]) for key in twins)
    target = tmp_path / "shards.nfq.safetensors"
    assert compare_files(source, target)["sqnr_db"] == compare_files(whole, target)["sqnr_db"]


def test_the_hash_is_that_of_the_parts_one_behind_the_other(tmp_path, index):
    target = tmp_path / "a.nfq.safetensors"
    quantize_file(index, target)
    parts = sorted(index.parent.glob("*.safetensors"))
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    with Original(index) as original, Original(target) as made:
        assert original.sha256() == wanted
        assert json.loads(made.metadata["nfq"])["source"] == {
            "name": INDEX,
            "bytes": original.file_bytes,
            "sha256": wanted,
            "metadata": {"format": "pt"},
        }


def refusal(path, error=NFQError) -> str:
    with pytest.raises(error) as caught:
        Original(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_single_part_is_refused(index):
    part = index.parent / f"{NAME}-00002-of-00003.safetensors"
    assert refusal(part) == f"{part} is part 2 of 3 of a sharded model; name {INDEX} instead"
    index.unlink()
    assert f"its index {INDEX} is missing" in refusal(part)
    assert "without the index of a sharded model" in refusal(index.parent)


def test_a_variants_index_is_named_as_diffusers_names_it(tmp_path, index):
    for part in sorted(index.parent.glob("*.safetensors")):
        part.rename(part.with_name(part.name.replace(NAME, f"{NAME}.fp16")))
    variant = index.with_name(f"{NAME}.safetensors.index.fp16.json")
    variant.write_text(index.read_text().replace(f"{NAME}-", f"{NAME}.fp16-"))
    index.unlink()
    assert f"; name {variant.name} instead" in refusal(index.parent / f"{NAME}.fp16-00001-of-00003.safetensors")
    for source in (variant, index.parent):
        with Original(source) as original:
            assert original.entries.keys() == random_unet().keys()
    report = convert_folders([tmp_path], tmp_path / "out")
    (made,) = [row for row in report["files"] if row["result"] == "converted"]
    assert Path(made["source"]).name == variant.name and made["target"].endswith(".fp16-balanced.nfq.safetensors")


def test_every_part_says_how_its_weights_are_quantised(tmp_path):
    codes = (20 * random_weight(16, 16)).to(torch.int8)
    layers = {
        "format_version": "1.0",
        "layers": {"b": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}},
    }
    own = {"b.weight": codes, "b.weight_scale": torch.ones(16, 1)}
    described = {"_quantization_metadata": json.dumps(layers)}
    first, second = (f"m-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file({"a.bias": torch.ones(4)}, tmp_path / first)
    save_file(own, tmp_path / second, metadata=described)
    weight_map = {"a.bias": first} | dict.fromkeys(own, second)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(own, tmp_path / "alone.safetensors", metadata=described)
    with Original(tmp_path) as sharded, Original(tmp_path / "alone.safetensors") as alone:
        assert torch.equal(sharded.tensor("b.weight"), alone.tensor("b.weight"))
        assert not torch.equal(sharded.tensor("b.weight"), codes.half())


def test_a_part_whose_name_is_too_long_for_the_disk(tmp_path):
    name = "x" * 300 + ".safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"{tmp_path / INDEX}" in refusal(tmp_path / INDEX)


def test_a_sole_part_is_a_file_like_any_other(tmp_path):
    index = shard(tmp_path / "a", random_unet(), parts=1)
    part = index.parent / f"{NAME}-00001-of-00001.safetensors"
    assert sharded_model(part) is None
    for source in (part, index, index.parent):
        with Original(source) as original:
            assert original.entries.keys() == random_unet().keys()


def test_a_missing_part_is_named(index):
    (index.parent / f"{NAME}-00002-of-00003.safetensors").unlink()
    assert f"its part {NAME}-00002-of-00003.safetensors is missing" in refusal(index)
    (index.parent / f"{NAME}-00001-of-00003.safetensors").unlink()
    assert f"its part {NAME}-00001-of-00003.safetensors and 1 more is missing" in refusal(index)


def test_a_damaged_part_is_named(index):
    part = index.parent / f"{NAME}-00003-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert str(part) in refusal(index, CorruptFileError)


def test_a_part_of_another_model_is_told(index):
    first, second = (index.parent / f"{NAME}-0000{n}-of-00003.safetensors" for n in (1, 2))
    shutil.copyfile(first, second)
    assert "two of its parts hold the same tensor" in refusal(index, CorruptFileError)


INDICES = {
    "no JSON": "hello",
    "no weight map": "{}",
    "a list": "[]",
    "an empty map": '{"weight_map":{}}',
    "a folder above": '{"weight_map":{"a":"../secret.safetensors"}}',
    "an absolute path": '{"weight_map":{"a":"/etc/passwd"}}',
    "numbers": '{"weight_map":7}',
    "deep nesting": '{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("text", INDICES.values(), ids=INDICES)
def test_a_foreign_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert "is not the index of a sharded model" in refusal(tmp_path / INDEX, UnsupportedFileError)


def test_folders_that_are_no_model(tmp_path, index):
    assert f"name {index.parent} or a file in it" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "name the .safetensors file in it" in refusal(tmp_path / "empty")
    shutil.copyfile(index, index.with_name("other.safetensors.index.json"))
    assert f"2 sharded models; name one of them: {INDEX}, other" in refusal(index.parent)


def test_a_part_that_changes_meanwhile_is_noticed(tmp_path, index):
    part = index.parent / f"{NAME}-00002-of-00003.safetensors"

    def touch(*_):
        part.write_bytes(part.read_bytes())

    with pytest.raises(NFQError, match=re.escape(f"{part} changed while it was read")):
        quantize_file(index, tmp_path / "a.nfq.safetensors", progress=touch)
    assert not (tmp_path / "a.nfq.safetensors").exists()


def test_a_part_is_never_the_target(index):
    part = index.parent / f"{NAME}-00002-of-00003.safetensors"
    before = part.read_bytes()
    with pytest.raises(NFQError):
        quantize_file(index, part, overwrite=True)
    assert part.read_bytes() == before


def test_a_library_converts_the_index_and_skips_the_parts(tmp_path, index):
    report = convert_folders([tmp_path], tmp_path / "out")
    found = {Path(row["source"]).name: (row["result"], row["reason"]) for row in report["files"]}
    assert found.pop(INDEX) == ("converted", "")
    assert all(result == "skipped" and f"name {INDEX} instead" in reason for result, reason in found.values())
    assert len(found) == 3
    assert [path.name for path in (tmp_path / "out").rglob("*.nfq.safetensors")] == [
        "tmp-balanced.nfq.safetensors"
    ] or (len(list((tmp_path / "out").rglob("*-balanced.nfq.safetensors"))) == 1)
    assert convert_folders([tmp_path], tmp_path / "out")["totals"]["done"] == 1
