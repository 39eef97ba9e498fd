"""Article files become containers that give the same bits as the article's loader."""

from __future__ import annotations

import logging
import math
import threading

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from samples import bits, random_half

import nfq_core
from nfq_core import NFQFile, NFTensor
from nfq_core.checkpoints import article_import
from nfq_core.checkpoints.article_import import import_article, pack_article
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.checkpoints.examine import file_info, verify_file
from nfq_core.errors import CorruptFileError, NFQError, TargetExistsError, UnsupportedFileError
from nfq_core.files.article import (
    INFIX,
    article_dequantize,
    article_quantize,
    iter_article_tensors,
    write_article_file,
)
from nfq_core.files.safetensors_io import tensor_bytes
from nfq_core.packed.formats import LEVELS


def spoilt_weight() -> torch.Tensor:
    """Its second block, 1/255 of the first one's scale, holds a weight beyond the last threshold: the article's bug."""
    weight = torch.zeros(32, 64)
    weight[0, 0] = 255.0
    weight[1, 0] = 1.4
    return weight


WEIGHTS = {
    "one superblock": random_half(64, 256),
    "short last block": random_half(33, 37, seed=1),
    "several superblocks": random_half(260, 130, seed=2),
    "zero blocks": torch.cat([torch.zeros(8, 64), random_half(8, 64, seed=3)]),
    "zeros": torch.zeros(40, 40),
    # Larger ones would meet the article's bug.
    "an outlier": random_half(64, 64, seed=4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(20.0).half()),
    "one weight": random_half(1, 1, seed=5),
}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_same_bits_in_memory(levels, weight):
    tensor = article_quantize(weight, levels)
    assert tensor.corrupt_weights() == 0
    packed = pack_article(tensor)
    assert packed.format.id == f"article{levels}_b64"
    packed.validate()
    assert torch.equal(bits(packed.dequantize()), bits(article_dequantize(tensor)))


@pytest.fixture
def model() -> dict[str, torch.Tensor]:
    return {
        "linear.weight": random_half(50, 60),
        "conv.weight": random_half(16, 8, 3, 3, seed=1),
        "time_emb.weight": random_half(64, 64, seed=2),
        "norm.bias": random_half(7, seed=3),
        "wide.bias": random_half(7, seed=4).float(),
    }


def unmapped(path) -> dict[str, torch.Tensor]:
    """The tensors of a file that may be written anew: Windows keeps one that `load_file` has mapped."""
    return safetensors.torch.load(path.read_bytes())


def article_result(path) -> dict[str, torch.Tensor]:
    """What the article's loader returns."""
    stored = load_file(path)
    return {
        key: tensor if isinstance(tensor, torch.Tensor) else article_dequantize(tensor)
        for key, tensor in iter_article_tensors(stored, stored.__getitem__)
    }


@pytest.mark.parametrize("levels", LEVELS)
def test_a_file_gives_the_same_bits(model, tmp_path, levels):
    write_article_file(tmp_path / "a", model, levels, 32)
    result = import_article(tmp_path / "a", tmp_path / "b")
    assert (result["quantized"], result["kept"], result["warnings"]) == (2, 3, [])
    assert result["file_bytes"] == (tmp_path / "b").stat().st_size
    assert result["original_bytes"] == (tmp_path / "a").stat().st_size
    assert verify_file(tmp_path / "b")["ok"]
    layers = {layer["name"]: layer["format"] for layer in file_info(tmp_path / "b")["layers"]}
    assert layers == {"linear.weight": f"article{levels}_b64", "conv.weight": "article32_b64"}

    wanted = article_result(tmp_path / "a")
    loaded = nfq_core.load(tmp_path / "b")
    dequantize_file(tmp_path / "b", tmp_path / "c")
    restored = load_file(tmp_path / "c")
    assert loaded.keys() == restored.keys() == wanted.keys() == model.keys()
    for key, tensor in wanted.items():
        value = loaded[key].dequantize() if isinstance(loaded[key], NFTensor) else loaded[key]
        assert value.dtype == restored[key].dtype == tensor.dtype
        assert tensor_bytes(value) == tensor_bytes(restored[key]) == tensor_bytes(tensor)


def test_a_spoilt_tensor_is_kept_with_a_warning(model, tmp_path, caplog):
    model["spoilt.weight"] = spoilt_weight()
    stored = tmp_path / "a"
    write_article_file(stored, model, 16, 32)
    with caplog.at_level(logging.WARNING, logger="nfq"):
        result = import_article(stored, tmp_path / "b")
    (warning,) = result["warnings"]
    assert warning == "tensor 'spoilt.weight' has 1 weights spoilt by the article's rounding bug; it is kept as fp16"
    assert [record.getMessage() for record in caplog.records] == [f"{stored}: {warning}"]
    assert (result["quantized"], result["kept"]) == (2, 4)
    loaded = nfq_core.load(tmp_path / "b")
    wanted = article_result(stored)
    assert loaded["spoilt.weight"].dtype == torch.float16
    assert torch.equal(bits(loaded["spoilt.weight"]), bits(wanted["spoilt.weight"]))
    assert loaded["spoilt.weight"][1, 0] == 207
    assert torch.equal(bits(loaded["linear.weight"].dequantize()), bits(wanted["linear.weight"]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("levels", [16, 20])
def test_a_tensor_that_is_not_finite_is_kept_with_a_warning(model, tmp_path, caplog, value, levels):
    model["large.weight"] = random_half(260, 130, seed=5)
    write_article_file(tmp_path / "a", model, levels, 32)
    stored = unmapped(tmp_path / "a")
    stored[f"large.weight{INFIX}c2"][1] = value
    save_file(stored, tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="nfq"):
        result = import_article(tmp_path / "a", tmp_path / "b")
    (warning,) = result["warnings"]
    assert warning == "tensor 'large.weight' holds NaN or Inf; it is kept as fp16"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'a'}: {warning}"]
    assert result["quantized"] == (2 if levels == 16 else 1)
    assert verify_file(tmp_path / "b")["ok"]
    kept = nfq_core.load(tmp_path / "b")["large.weight"]
    assert kept.dtype == torch.float16
    assert not torch.isfinite(kept.flatten()[256 * 64 : 512 * 64]).any()
    assert torch.isfinite(kept.flatten()[: 256 * 64]).all()
    assert torch.equal(bits(kept), bits(article_result(tmp_path / "a")["large.weight"]))


def test_tensors_are_decoded_on_the_threads_of_the_pool(model, tmp_path, monkeypatch):
    write_article_file(tmp_path / "a", model, 16, 32)
    threads = set()

    def read(*arguments):
        threads.add(threading.current_thread())
        return read_article_tensor(*arguments)

    read_article_tensor = article_import.read_article_tensor
    monkeypatch.setattr(article_import, "read_article_tensor", read)
    import_article(tmp_path / "a", tmp_path / "b")
    assert threads
    assert threading.current_thread() not in threads


def test_bytes_do_not_depend_on_threads(model, tmp_path, monkeypatch):
    write_article_file(tmp_path / "a", model, 16, 32)
    for threads in (1, 3):
        monkeypatch.setattr("nfq_core.parallel.default_threads", lambda threads=threads: threads)
        import_article(tmp_path / "a", tmp_path / f"{threads}")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_progress_ends_at_the_total(model, tmp_path):
    write_article_file(tmp_path / "a", model, 16, 32)
    seen = []
    import_article(tmp_path / "a", tmp_path / "b", progress=lambda *args: seen.append(args))
    assert {name for _, _, name in seen} == model.keys()
    # What the fp16 weights take; the bias of four bytes each is kept.
    assert seen[-1][0] == seen[-1][1] == sum(2 * tensor.numel() for tensor in model.values()) + 7 * 2


def test_an_unusual_number_of_levels_is_kept_as_fp16(model, tmp_path):
    write_article_file(tmp_path / "a", model, 20, 24)
    result = import_article(tmp_path / "a", tmp_path / "b")
    assert (result["quantized"], result["kept"], result["warnings"]) == (1, 4, [])
    loaded = nfq_core.load(tmp_path / "b")
    assert torch.equal(bits(loaded["linear.weight"]), bits(article_result(tmp_path / "a")["linear.weight"]))


def test_there_is_no_format_for_an_unusual_number_of_levels():
    with pytest.raises(ValueError, match="got 20"):
        pack_article(article_quantize(random_half(4, 64), 20))


def test_the_source_is_recorded(model, tmp_path):
    write_article_file(tmp_path / "a.safetensors", model, 16, 32)
    import_article(tmp_path / "a.safetensors", tmp_path / "b")
    with NFQFile(tmp_path / "b") as file:
        assert file.facts.source.name == "a.safetensors"
        assert file.facts.source.bytes == (tmp_path / "a.safetensors").stat().st_size
        assert file.facts.settings == {"imported": "article"}


def test_an_ordinary_file_is_refused(model, tmp_path):
    save_file(model, tmp_path / "a")
    with pytest.raises(UnsupportedFileError, match=r"a was not written by the article's code; `nfq quantize` converts"):
        import_article(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_container_is_refused(model, tmp_path):
    save_file(model, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "b")
    with pytest.raises(NFQError, match="is quantised already"):
        import_article(tmp_path / "b", tmp_path / "c")


def test_existing_targets(model, tmp_path):
    write_article_file(tmp_path / "a", model, 16, 32)
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(TargetExistsError):
        import_article(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"old"
    import_article(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert verify_file(tmp_path / "b")["ok"]


def changed(part, change):
    def make(stored):
        stored[f"linear.weight{INFIX}{part}"] = change(stored[f"linear.weight{INFIX}{part}"]).clone()

    return make


def without(part):
    def make(stored):
        del stored[f"linear.weight{INFIX}{part}"]

    return make


def flipped(codes):
    codes = codes.clone()
    codes[len(codes) // 2] ^= 64
    return codes


DAMAGE = {
    "codes flipped": (changed("M", flipped), CorruptFileError),
    "codes cut": (changed("M", lambda codes: codes[:-9]), CorruptFileError),
    "codes of another type": (changed("M", lambda codes: codes.int()), CorruptFileError),
    "no codes": (without("M"), CorruptFileError),
    "no scales": (without("c1"), CorruptFileError),
    "scales cut": (changed("c1", lambda scales: scales[:-1]), CorruptFileError),
    "maxima doubled": (changed("c2", lambda maxima: maxima.repeat(2)), CorruptFileError),
    "negative maxima": (changed("c2", lambda maxima: -maxima), CorruptFileError),
    "another shape": (changed("orig_shape", lambda shape: shape + 1), CorruptFileError),
    "an enormous shape": (changed("orig_shape", lambda shape: shape << 40), CorruptFileError),
    "no shape": (changed("orig_shape", lambda shape: shape[:0]), CorruptFileError),
    "another block size": (
        changed("param", lambda param: param * torch.tensor([1, 1, 1, 2, 1]).int()),
        UnsupportedFileError,
    ),
    "one level": (changed("param", lambda param: param * torch.tensor([1, 0, 1, 1, 1]).int()), CorruptFileError),
}


@pytest.mark.parametrize(("make", "error"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_with_file_and_tensor_named(model, tmp_path, make, error):
    write_article_file(tmp_path / "a", model, 16, 32)
    stored = unmapped(tmp_path / "a")
    make(stored)
    save_file(stored, tmp_path / "a")
    with pytest.raises(NFQError) as caught:
        import_article(tmp_path / "a", tmp_path / "b")
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: tensor 'linear.weight")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_workflow_and_prompt_stand_where_the_page_looks(model, tmp_path):
    write_article_file(tmp_path / "plain", model, 16, 32)
    save_file(load_file(tmp_path / "plain"), tmp_path / "a", metadata={"workflow": "{}", "title": "t"})
    import_article(tmp_path / "a", tmp_path / "b")
    with NFQFile(tmp_path / "b") as file:
        assert file.metadata["workflow"] == "{}"
        assert file.facts.source.metadata == {"title": "t"}


def test_a_source_that_changes_while_it_is_read(model, tmp_path):
    write_article_file(tmp_path / "a", model, 16, 32)

    def append(*_: object) -> None:
        with open(tmp_path / "a", "ab") as file:
            file.write(b"!")

    with pytest.raises(NFQError, match="a changed while it was read; nothing was written, try again"):
        import_article(tmp_path / "a", tmp_path / "b", progress=append)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
