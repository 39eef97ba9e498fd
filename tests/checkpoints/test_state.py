"""State dicts in memory: the same rules and the same bytes as converting a file."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from samples import random_weight

import nfq_core
from nfq_core import NFQFile, NFTensor, quantize
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.memory import MODES
from nfq_core.checkpoints.state_dict import quantize_tensors
from nfq_core.decibels import sqnr_db
from nfq_core.errors import NFQError, TargetExistsError
from nfq_core.files.container import Source
from nfq_core.files.safetensors_io import describe, tensor_bytes
from nfq_core.planning.settings import DEFAULTS, Settings


@pytest.fixture
def model() -> dict[str, torch.Tensor]:
    return {
        "z.weight": random_weight(40, 50).half(),
        "conv.weight": random_weight(16, 8, 3, 3, seed=1).bfloat16(),
        "norm.bias": random_weight(7, seed=2).half(),
        "ids": torch.arange(5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
    }


def same(one: NFTensor | torch.Tensor, other: NFTensor | torch.Tensor) -> bool:
    if isinstance(one, NFTensor) and isinstance(other, NFTensor):
        return (one.format, one.shape, one.dtype) == (other.format, other.shape, other.dtype) and torch.equal(
            one.data, other.data
        )
    assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return one.dtype == other.dtype and one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def test_quantises_by_the_rules_of_the_policy(model):
    before = {key: tensor.clone() for key, tensor in model.items()}
    result = nfq_core.quantize_state_dict(model, 16)
    assert list(result) == list(model)
    assert same(result["z.weight"], quantize(before["z.weight"], 16))
    assert same(result["conv.weight"], quantize(before["conv.weight"], 32))
    assert all(result[key] is model[key] for key in ("norm.bias", "ids", "empty", "scalar"))
    assert all(same(model[key], before[key]) for key in model)


def test_levels_and_effort(model):
    result = nfq_core.quantize_state_dict(model, 7, conv_levels=12, effort="best")
    assert same(result["z.weight"], quantize(model["z.weight"], 7, effort="best"))
    assert result["conv.weight"].format.id == "nf12_b64"


def test_formats(model):
    result = nfq_core.quantize_state_dict(model, format="t3w8_b64", conv_format="t5w9_b64")
    assert same(result["z.weight"], quantize(model["z.weight"], format="t3w8_b64"))
    assert result["conv.weight"].format.id == "t5w9_b64"


def test_a_preset_chooses_the_formats(model):
    large, tiny = (nfq_core.quantize_state_dict(model, preset=preset) for preset in ("large", "tiny"))
    assert sum(tensor.nbytes for tensor in large.values()) > sum(tensor.nbytes for tensor in tiny.values())
    both = (nfq_core.quantize_state_dict(model), nfq_core.quantize_state_dict(model, preset="balanced"))
    assert all(same(both[0][key], both[1][key]) for key in model)
    with pytest.raises(ValueError, match="exclude each other; got preset and levels"):
        nfq_core.quantize_state_dict(model, 16, preset="small")


@pytest.mark.parametrize("settings", [{"levels": 20}, {"conv_levels": 0}, {"effort": "slow"}, {"format": "nf5_b64"}])
def test_settings_out_of_range(model, settings):
    with pytest.raises(ValueError, match="must be one of"):
        nfq_core.quantize_state_dict(model, **settings)


def test_what_cannot_be_quantised_is_kept_with_a_warning(model, caplog):
    model["z.weight"][3, 4] = math.nan
    with caplog.at_level(logging.WARNING, logger="nfq"):
        result = nfq_core.quantize_state_dict(model)
    assert result["z.weight"] is model["z.weight"]
    assert "tensor 'z.weight' is kept as it is: it holds NaN or Inf" in caplog.text


def test_parameters_and_views_are_quantised_like_their_values():
    weight = random_weight(40, 60).half()
    views = {
        "parameter.weight": torch.nn.Parameter(weight.clone()),
        "transposed.weight": weight.T.contiguous().T,
        "slice.weight": torch.cat([weight, weight], dim=1)[:, :60],
    }
    result = nfq_core.quantize_state_dict(views, levels=16)
    assert all(same(result[key], quantize(weight)) for key in views)


def test_save_and_load_are_inverse(model, tmp_path):
    state = nfq_core.quantize_state_dict(model)
    size = nfq_core.save(state, tmp_path / "a")
    assert size == (tmp_path / "a").stat().st_size
    loaded = nfq_core.load(tmp_path / "a")
    assert loaded.keys() == state.keys()
    assert all(same(loaded[key], state[key]) for key in state)


def test_loaded_tensors_own_their_memory(model, tmp_path):
    """A tensor that the file is mapped into would change with it."""
    state = nfq_core.quantize_state_dict(model)
    size = nfq_core.save(state, tmp_path / "a")
    loaded = nfq_core.load(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.write(b"\xff" * size)
    assert all(same(loaded[key], state[key]) for key in state)


def test_loading_some_keys(model, tmp_path):
    nfq_core.save(nfq_core.quantize_state_dict(model), tmp_path / "a")
    assert list(nfq_core.load(tmp_path / "a", ["scalar", "z.weight"])) == ["scalar", "z.weight"]
    assert nfq_core.load(tmp_path / "a", keys=[]) == {}
    assert list(nfq_core.load(tmp_path / "a", keys=(key for key in ["ids"]))) == ["ids"]
    for absent in ("absent", "nfq.z.weight"):
        with pytest.raises(KeyError):
            nfq_core.load(tmp_path / "a", [absent])


@pytest.mark.parametrize("memory", ["packed", "resident"])
def test_weights_stay_packed_or_are_dequantised_once(model, tmp_path, memory):
    packed = nfq_core.quantize_state_dict(model)
    nfq_core.save(packed, tmp_path / "a")
    loaded = nfq_core.load(tmp_path / "a", memory=memory)
    assert loaded.keys() == packed.keys()
    for key, value in packed.items():
        dense = memory == "resident" and isinstance(value, NFTensor)
        assert same(loaded[key], value.dequantize(model[key].dtype) if dense else value)


@pytest.mark.parametrize(("free", "wanted"), [(1 << 20, torch.Tensor), (100, NFTensor), (None, NFTensor)])
def test_auto_decides_by_free_memory_and_says_why(model, tmp_path, monkeypatch, caplog, free, wanted):
    nfq_core.save(nfq_core.quantize_state_dict(model), tmp_path / "a")
    monkeypatch.setattr(nfq_core.checkpoints.state_dict, "free_bytes", lambda device: free)
    with caplog.at_level(logging.INFO, logger="nfq"):
        loaded = nfq_core.load(tmp_path / "a", memory="auto")
    assert type(loaded["z.weight"]) is wanted
    mode = "resident" if wanted is torch.Tensor else "packed"
    assert f"{tmp_path / 'a'}: weights are held {mode} on cpu: " in caplog.text
    assert "free" in caplog.text


def test_a_memory_mode_that_does_not_exist_is_refused(model, tmp_path):
    nfq_core.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="memory must be one of packed, resident, auto, got 'dense'"):
        nfq_core.load(tmp_path / "a", memory="dense")


def test_loading_to_another_device(model, tmp_path):
    nfq_core.save(nfq_core.quantize_state_dict(model), tmp_path / "a")
    loaded = nfq_core.load(tmp_path / "a", device="meta")
    assert {value.device.type for value in loaded.values()} == {"meta"}
    assert {key: tuple(value.shape) for key, value in loaded.items()} == {
        key: tuple(value.shape) for key, value in model.items()
    }


@pytest.mark.parametrize("memory", MODES)
def test_a_device_that_is_not_there_is_told_in_one_line(model, tmp_path, monkeypatch, memory):
    nfq_core.save(model, tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NFQError, match=r"^device 'cuda:0' cannot be used here; this machine has"):
        nfq_core.load(tmp_path / "a", device="cuda:0", memory=memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", ["packed", "resident"])
def test_loading_to_a_cuda_device(model, tmp_path, memory):
    nfq_core.save(nfq_core.quantize_state_dict(model), tmp_path / "a")
    on_cpu = nfq_core.load(tmp_path / "a", memory=memory)
    with torch.cuda.stream(torch.cuda.Stream()):
        loaded = nfq_core.load(tmp_path / "a", device="cuda", memory=memory)
        assert {value.device.type for value in loaded.values()} == {"cuda"}
        assert all(same(loaded[key].to("cpu"), on_cpu[key]) for key in on_cpu)


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        ("resident", r'resident weights need 6\.\d KB; free some, or load with memory="packed", which needs 2\.\d KB'),
        ("packed", r"packed weights need 2\.\d KB; free some, or use a smaller file"),
    ],
)
def test_too_little_memory_on_the_way_is_told_and_nothing_stays(model, tmp_path, monkeypatch, memory, told):
    nfq_core.save(nfq_core.quantize_state_dict(model, levels=16), tmp_path / "a")
    seen: list[weakref.ref] = []

    def load(self, key):
        tensor = loaded(self, key)
        seen.append(weakref.ref(tensor))
        if len(seen) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return tensor

    loaded = NFQFile.load
    monkeypatch.setattr(NFQFile, "load", load)
    gc.disable()
    try:
        with pytest.raises(NFQError) as caught:
            nfq_core.load(tmp_path / "a", memory=memory)
        # While the error, and so its traceback, is still held.
        assert len(seen) >= 5
        assert [reference() for reference in seen] == [None] * len(seen)
    finally:
        gc.enable()
    assert re.fullmatch(re.escape(f"{tmp_path / 'a'}: there is not enough memory on cpu: ") + told, str(caught.value))
    assert caught.value.__context__ is None


def test_equals_what_quantising_the_file_gives(model, tmp_path):
    save_file(model, tmp_path / "source")
    settings = Settings.of(levels=16)
    quantize_file(tmp_path / "source", tmp_path / "by file", settings)
    state = nfq_core.quantize_state_dict(model, levels=16)
    nfq_core.save(state, tmp_path / "by state", settings=settings.as_dict())
    files = [nfq_core.load(tmp_path / name) for name in ("by file", "by state")]
    assert files[0].keys() == files[1].keys() == model.keys()
    assert all(same(files[0][key], files[1][key]) for key in model)
    with NFQFile(tmp_path / "by file") as one, NFQFile(tmp_path / "by state") as other:
        assert one.facts.settings == other.facts.settings
        assert one.quantized == other.quantized
        assert one.kept == other.kept


def test_the_header_tells_where_it_comes_from(model, tmp_path):
    source = Source("m.safetensors", 123, "a" * 64, {"k": "v"})
    workflow, prompt = {"nodes": [{"title": "Größe"}]}, {"1": {"class_type": "KSampler"}}
    nfq_core.save(
        nfq_core.quantize_state_dict(model),
        tmp_path / "a",
        settings={"levels": 16},
        source=source,
        workflow=workflow,
        prompt=prompt,
    )
    with NFQFile(tmp_path / "a") as file:
        assert file.facts.source == source
        assert file.facts.settings == {"levels": 16}
        assert file.facts.layout == "plain"
    with safe_open(tmp_path / "a", "pt") as file:
        assert json.loads(file.metadata()["workflow"]) == workflow
        assert json.loads(file.metadata()["prompt"]) == prompt


def test_without_a_workflow_there_is_no_such_metadata(model, tmp_path):
    nfq_core.save(model, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert not {"workflow", "prompt"} & file.metadata().keys()


def test_views_are_saved_by_value(tmp_path):
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    views = {"transposed": base.T, "strided": base[::2, 1::2], "expanded": base[:1, :1].expand(3, 5)}
    nfq_core.save(views, tmp_path / "a")
    loaded = nfq_core.load(tmp_path / "a")
    assert all(torch.equal(loaded[key], views[key]) for key in views)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.float8_e5m2, torch.complex64, torch.float64])
def test_kept_dtypes(tmp_path, dtype):
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    nfq_core.save({"a": tensor, "b": tensor[0, 1].clone()}, tmp_path / "a")
    loaded = nfq_core.load(tmp_path / "a")
    assert same(loaded["a"], tensor)
    assert same(loaded["b"], tensor[0, 1])


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path):
    with pytest.raises(NFQError, match=r"tensor 'a' has dtype torch\.complex128, which safetensors cannot hold"):
        nfq_core.save({"a": torch.ones(3, dtype=torch.complex128)}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused(model, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(TargetExistsError):
        nfq_core.save(model, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    nfq_core.save(model, tmp_path / "a", overwrite=True)
    assert nfq_core.load(tmp_path / "a").keys() == model.keys()


def test_tensors_made_one_at_a_time(model):
    """The same bytes as from a state dict; the recorded dtype is the described one; errors are measured."""
    entries = describe(model)
    done, sqnr, asked = [], {}, []

    def read(key: str) -> torch.Tensor:
        asked.append(key)
        return model[key].float()

    packed = quantize_tensors(entries, read, DEFAULTS, progress=lambda *told: done.append(told), sqnr=sqnr)
    wanted = nfq_core.quantize_state_dict(model)
    assert sorted(asked) == sorted(model)
    assert [name for *_, name in done] == list(model)
    assert done[-1][0] == done[-1][1] == sum(value.nbytes for value in model.values())
    for key, value in wanted.items():
        if isinstance(value, NFTensor):
            assert torch.equal(packed[key].data, value.data) and packed[key].dtype == value.dtype
            assert sqnr[key] == pytest.approx(sqnr_db(model[key].float(), value.dequantize(torch.float32)))
    assert sqnr.keys() == {key for key, value in wanted.items() if isinstance(value, NFTensor)}


class Stop(Exception):
    pass


def stop_half_way(done: int, total: int, name: str) -> None:
    if 2 * done > total:
        raise Stop


def test_stopping_in_the_progress_callback(model, tmp_path):
    """An interrupt ends quantising, saving and loading; a save leaves nothing behind."""
    with pytest.raises(Stop):
        quantize_tensors(describe(model), model.__getitem__, DEFAULTS, progress=stop_half_way)
    packed = nfq_core.quantize_state_dict(model)
    with pytest.raises(Stop):
        nfq_core.save(packed, tmp_path / "model.nfq.safetensors", progress=stop_half_way)
    assert list(tmp_path.iterdir()) == []
    nfq_core.save(packed, tmp_path / "model.nfq.safetensors")
    with pytest.raises(Stop):
        nfq_core.load(tmp_path / "model.nfq.safetensors", progress=stop_half_way)


def test_the_header_hash_tells_files_apart(model, tmp_path):
    packed = nfq_core.quantize_state_dict(model)
    hashes = set()
    for number in range(2):
        path = tmp_path / f"{number}.nfq.safetensors"
        nfq_core.save({**packed, "marker": torch.tensor([float(number)])}, path)
        with NFQFile(path) as file:
            hashes.add(file.header_sha256)
    assert len(hashes) == 2 and all(len(digest) == 64 for digest in hashes)
