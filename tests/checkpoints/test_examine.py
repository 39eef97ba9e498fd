"""What a container is told to be, whether it is sound, and how far it is from its original."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from samples import SMALL_MODEL, random_half

import nfq_core
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import MAX_LINE, compare_files, file_info, info_lines, verify_file
from nfq_core.errors import CorruptFileError, NFQError, UnsupportedFileError
from nfq_core.files.container import Source
from nfq_core.planning.settings import Formats, Settings


@pytest.fixture
def original(tmp_path):
    save_file(SMALL_MODEL, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def container(original, tmp_path):
    quantize_file(original, tmp_path / "model.nfq.safetensors", Settings(Formats()))
    return tmp_path / "model.nfq.safetensors"


def save(path, **tensors: torch.Tensor):
    save_file({key.replace("_", "."): tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def test_info_by_hand(original, container):
    info = file_info(container)
    stored = {key: nfq_core.NFQFile(container).stored_bytes(key) for key in ("linear.weight", "conv.weight")}
    # 6,400 and 2,304 weights: 100 and 36 blocks. nf16: head 32, 50 groups of 64, 100 scales and their
    # parameters. nf32: head 64, coarse plane of 18 groups, fine plane of 5 (8 blocks each), 36 scales and parameters.
    packed = {"linear.weight": 32 + 50 * 64 + 102, "conv.weight": 64 + 18 * 64 + 5 * 64 + 38}
    assert info["weights"] == 6400 + 2304
    assert info["bits_per_weight"] == sum(stored.values()) * 8 / 8704
    assert info["packed_bits_per_weight"] == sum(packed.values()) * 8 / 8704
    assert info["file_bytes"] == container.stat().st_size
    assert info["original_bytes"] == original.stat().st_size
    assert (info["kept"], info["kept_bytes"]) == (1, 14)
    assert info["container_version"] == 1
    assert info["settings"]["levels"] == 16
    assert info["source"]["name"] == "model.safetensors"
    assert info["has_workflow"] is False
    assert {layer["name"]: layer for layer in info["layers"]} == {
        "linear.weight": {
            "name": "linear.weight",
            "format": "nf16_b64",
            "shape": [64, 100],
            "bits_per_weight": stored["linear.weight"] * 8 / 6400,
        },
        "conv.weight": {
            "name": "conv.weight",
            "format": "nf32_b64",
            "shape": [16, 16, 3, 3],
            "bits_per_weight": stored["conv.weight"] * 8 / 2304,
        },
    }
    json.dumps(info, allow_nan=False)


def test_info_in_words_is_fit_for_a_terminal(tmp_path):
    hostile = "\x1b]0;owned\x07\n" + "a" * 1000
    source = Source(hostile, 0, hostile)
    nfq_core.save({"a.bias": torch.ones(3)}, tmp_path / "a", settings={hostile: hostile}, source=source)
    lines = dict(info_lines("a", file_info(tmp_path / "a")))
    assert all(text.isprintable() and len(text) <= 2 * MAX_LINE for text in lines.values())
    assert lines["source"].startswith(r"\x1b]0;owned\x07\naaa") and " … " in lines["source"]


def test_settings_in_words(tmp_path):
    settings = {"levels": 16, "baked": ["LoRA a at 0.8", "model b"]}
    nfq_core.save({"a.bias": torch.ones(3)}, tmp_path / "a", settings=settings)
    nfq_core.save({"a.bias": torch.ones(3)}, tmp_path / "b")
    told = [dict(info_lines(name, file_info(tmp_path / name)))["settings"] for name in ("a", "b")]
    assert told == ["levels 16, baked LoRA a at 0.8, model b", "not recorded"]


def test_info_of_a_container_that_quantises_nothing(tmp_path):
    nfq_core.save({"a.bias": torch.ones(3)}, tmp_path / "a", workflow={"nodes": []})
    info = file_info(tmp_path / "a")
    assert (info["weights"], info["bits_per_weight"], info["packed_bits_per_weight"]) == (0, 0.0, 0.0)
    assert (info["layers"], info["original_bytes"], info["has_workflow"]) == ([], 0, True)


def test_info_tells_of_the_workflow_of_the_source(tmp_path):
    save_file(SMALL_MODEL, tmp_path / "a", metadata={"workflow": "{}", "title": "b"})
    quantize_file(tmp_path / "a", tmp_path / "b")
    assert file_info(tmp_path / "b")["has_workflow"] is True


def test_verify_counts_tensors(container):
    assert verify_file(container) == {"ok": True, "tensors": 3, "errors": []}


def test_verify_names_every_damaged_tensor(container):
    data = bytearray(container.read_bytes())
    with nfq_core.NFQFile(container) as file:
        for name in ("nfq.linear.weight", "norm.bias"):
            data[len(file.raw_header) + file.entries[name].start] ^= 1
    container.write_bytes(data)
    result = verify_file(container)
    assert (result["ok"], result["tensors"]) == (False, 3)
    assert len(result["errors"]) == 2
    for key in ("linear.weight", "norm.bias"):
        assert any(f"{container}: tensor {key!r} is damaged" in error for error in result["errors"])


def test_verify_refuses_an_unsound_header(container, original):
    data = bytearray(container.read_bytes())
    data[100] ^= 1
    container.write_bytes(data)
    with pytest.raises(CorruptFileError):
        verify_file(container)
    with pytest.raises(UnsupportedFileError):
        verify_file(original)


def test_verify_finds_a_code_that_names_no_level(tmp_path):
    weight = nfq_core.quantize(random_half(64, 64), 7)
    sections = weight.format.sections(4096)
    # nf7 has coarse digits 0 … 3 and one fine bit: all ones are code 3 · 2 + 1 = 7, the levels are 0 … 6.
    weight.data[sections.coarse : sections.scales] = 255
    nfq_core.save({"a.weight": weight}, tmp_path / "a")
    result = verify_file(tmp_path / "a")
    assert not result["ok"]
    assert "tensor 'a.weight': it holds a code without a level" in result["errors"][0]


def test_compare_adds_the_layers_noise_up_by_weights(original, container):
    result = compare_files(original, container)
    ratios = {}
    for key in ("linear.weight", "conv.weight"):
        weight = SMALL_MODEL[key].double()
        restored = nfq_core.load(container, [key])[key].dequantize(torch.float32).double()
        ratios[key] = (10 * torch.log10(weight.var(correction=0) / (weight - restored).square().mean())).item()
    assert {layer["name"]: layer["sqnr_db"] for layer in result["layers"]} == pytest.approx(ratios)
    noise = 6400 * 10 ** (-ratios["linear.weight"] / 10) + 2304 * 10 ** (-ratios["conv.weight"] / 10)
    assert result["sqnr_db"] == pytest.approx(-10 * math.log10(noise / 8704))
    assert {layer["format"] for layer in result["layers"]} == {"nf16_b64", "nf32_b64"}
    info = {layer["name"]: layer["bits_per_weight"] for layer in file_info(container)["layers"]}
    assert {layer["name"]: layer["bits_per_weight"] for layer in result["layers"]} == info


def test_compare_with_its_own_result_is_equal(container, tmp_path):
    dequantize_file(container, tmp_path / "back")
    result = compare_files(tmp_path / "back", container)
    assert result["sqnr_db"] is None
    assert [layer["sqnr_db"] for layer in result["layers"]] == [None, None]


def test_an_exact_layer_adds_weights_and_no_noise(tmp_path):
    rounded, exact = random_half(64, 64), nfq_core.quantize(random_half(64, 64, seed=1), 16)
    save(tmp_path / "a", rounded=rounded, exact=exact.dequantize())
    nfq_core.save({"rounded": nfq_core.quantize(rounded, 16), "exact": exact}, tmp_path / "b")
    found = compare_files(tmp_path / "a", tmp_path / "b")
    ratios = {layer["name"]: layer["sqnr_db"] for layer in found["layers"]}
    assert ratios["exact"] is None
    # Half the weights have all the noise.
    assert found["sqnr_db"] == pytest.approx(ratios["rounded"] + 10 * math.log10(2))


def test_compare_of_a_constant_is_a_number_or_equal(tmp_path):
    save(tmp_path / "a", a_weight=torch.full((64, 64), 0.1))
    quantize_file(tmp_path / "a", tmp_path / "b")
    found = compare_files(tmp_path / "a", tmp_path / "b")["sqnr_db"]
    # Half a step of the level spacing at the very worst: 16 levels over ±1 leave 2/15 between neighbours on average.
    assert found is None or found > 20


@pytest.mark.parametrize(
    "weight", [torch.full((64, 64), math.nan), torch.zeros(64, 64), torch.full((64, 64), math.inf)]
)
def test_compare_does_not_call_equal_what_it_cannot_rate(tmp_path, weight):
    save(tmp_path / "a", a_weight=random_half(64, 64))
    save(tmp_path / "other", a_weight=weight)
    quantize_file(tmp_path / "a", tmp_path / "b")
    with pytest.raises(NFQError, match=r"other: tensor 'a\.weight' is not what .*b was made from"):
        compare_files(tmp_path / "other", tmp_path / "b")


@pytest.mark.parametrize(
    ("tensors", "found"),
    [({"a_weight": random_half(64, 65)}, r"\(64, 65\)"), ({"b_weight": random_half(64, 64)}, "None")],
)
def test_compare_with_another_model(tmp_path, tensors, found):
    save(tmp_path / "a", a_weight=random_half(64, 64))
    quantize_file(tmp_path / "a", tmp_path / "b")
    save(tmp_path / "other", **tensors)
    with pytest.raises(NFQError, match=rf"tensor 'a\.weight' has shape {found}, .*b has \(64, 64\)"):
        compare_files(tmp_path / "other", tmp_path / "b")


def test_progress_ends_at_the_total(original, container):
    for examine in (
        lambda report: verify_file(container, progress=report),
        lambda report: compare_files(original, container, progress=report),
    ):
        seen = []
        examine(lambda *args, seen=seen: seen.append(args))
        assert seen[-1][0] == seen[-1][1] > 0
