"""UNets quantised by diffusers while they are loaded, read from `.nfq.safetensors`, saved, cast, copied, compiled."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from samples import TINY, random_buffer, random_weight

from nfq_core import Calibration, NFTensor, load, save
from nfq_core.calibration.statistics import LayerInputs
from nfq_core.checkpoints.convert import dequantize_file, quantize_file
from nfq_core.files.container import NFQFile
from nfq_core.files.safetensors_io import Entry, SafetensorsFile
from nfq_core.layers import packed_layers
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, diffusers_to_ldm
from nfq_core.packed.formats import format_by_id
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import BitsPerWeight, Settings

diffusers = pytest.importorskip("diffusers", reason="what is tested works in diffusers")
pytest.importorskip("accelerate", reason="diffusers quantises only with it")

from diffusers_models import noise_of, packed_unet, reads_folders, stock_unet, write_config  # noqa: E402

import nfq_core.diffusers as nfq_diffusers  # noqa: E402
from nfq_core.diffusers import NFQConfig, load_unet  # noqa: E402

UNet = diffusers.UNet2DConditionModel
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`stock`, a fp16 UNet; `nfq.safetensors`, the same by `quantize_file`; `dense.safetensors`, back from it."""
    root = tmp_path_factory.mktemp("diffusers")
    stock_unet().save_pretrained(root / "stock")
    quantize_file(root / "stock" / WEIGHTS, root / "unet.nfq.safetensors")
    dequantize_file(root / "unet.nfq.safetensors", root / "dense.safetensors")
    write_config(root / "config")
    return root


@pytest.fixture(scope="module")
def loaded(folders: Path) -> torch.nn.Module:
    return load_unet(folders / "unet.nfq.safetensors", folders / "config", dtype=torch.float32)


@pytest.fixture(scope="module")
def noise(loaded: torch.nn.Module) -> torch.Tensor:
    return noise_of(loaded)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Stands in for `quantize`, which takes long for some formats: the arguments of each call, by name."""
    calls = []

    def pack(weight: torch.Tensor, *, format: str, **arguments: object) -> NFTensor:
        calls.append({"format": format, **arguments})
        fmt, count = format_by_id(format), weight.numel()
        data = random_buffer(format, count, own_levels=fmt.expects_own_levels(count))
        return NFTensor(data, fmt, weight.shape, weight.dtype)

    monkeypatch.setattr(nfq_diffusers.quantizer, "quantize", pack)
    return calls


def layer_inputs() -> dict[str, LayerInputs]:
    """Statistics for every layer, each its own."""
    ldm = diffusers_to_ldm(TINY)
    weights = {key: value for key, value in stock_unet().state_dict().items() if value.dim() > 1 and "emb" not in key}
    return {ldm[key]: LayerInputs(torch.rand(value.shape[1]) + 1, 100) for key, value in weights.items()}


def dense_weights(folders: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with SafetensorsFile(folders / "dense.safetensors") as file:
        yield from [(name, file.tensor(name)) for name in file.entries]


def test_the_package_does_not_hide_the_real_one() -> None:
    assert nfq_diffusers.__name__ == "nfq_core.diffusers"
    assert nfq_diffusers.loading.UNet2DConditionModel is diffusers.UNet2DConditionModel


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantised_at_load_as_by_the_command(folders: Path, dtype: torch.dtype) -> None:
    unet = UNet.from_pretrained(folders / "stock", quantization_config=NFQConfig(), torch_dtype=dtype)
    assert isinstance(unet, UNet) and not unet.training and unet.dtype == dtype
    layers, tensors = packed_layers(unet), load(folders / "unet.nfq.safetensors")
    for name, tensor in tensors.items():
        if isinstance(tensor, NFTensor):
            packed = layers.pop(name.removesuffix(".weight")).packed
            assert torch.equal(packed.data, tensor.data) and packed.format == tensor.format
            assert packed.dtype == torch.float16, "what the file had, whatever is computed in"
        else:
            assert torch.equal(unet.get_parameter(name), tensor.to(dtype))
    assert not layers


def test_a_file_and_a_config_are_enough(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: NFTensor, *args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was dequantised")

    with monkeypatch.context() as patched:
        patched.setattr(NFTensor, "dequantize", never)
        unet = load_unet(folders / "unet.nfq.safetensors", folders / "config")
    assert unet.dtype == torch.float16 and not unet.training
    stock = UNet.from_config(UNet.load_config(folders / "config")).half()
    stock.load_state_dict(dict(dense_weights(folders)))
    assert torch.equal(noise_of(unet.float()), noise_of(stock.float()))


def test_a_whole_checkpoint_in_ldm_names(folders: Path, tmp_path: Path, noise: torch.Tensor) -> None:
    ldm = diffusers_to_ldm(TINY)
    checkpoint = {CHECKPOINT_PREFIX + ldm[key]: value for key, value in load(folders / "unet.nfq.safetensors").items()}
    checkpoint["first_stage_model.decoder.conv_in.weight"] = random_weight(8, 4, 3, 3)
    save(checkpoint, tmp_path / "whole.nfq.safetensors")
    unet = load_unet(tmp_path / "whole.nfq.safetensors", folders / "config", dtype=torch.float32)
    assert torch.equal(noise_of(unet), noise)


@pytest.mark.parametrize("memory", ["packed", "resident"])
def test_memory(folders: Path, noise: torch.Tensor, memory: str) -> None:
    unet = load_unet(folders / "unet.nfq.safetensors", folders / "config", dtype=torch.float32, memory=memory)
    assert bool(packed_layers(unet)) == (memory == "packed") == hasattr(unet, "hf_quantizer")
    assert torch.equal(noise_of(unet), noise)


@reads_folders
@pytest.mark.parametrize("variant", [None, "nf16"])
def test_saved_and_back(
    folders: Path, loaded: torch.nn.Module, noise: torch.Tensor, tmp_path: Path, variant: str | None
) -> None:
    loaded.save_pretrained(tmp_path, variant=variant)
    name = WEIGHTS if variant is None else "diffusion_pytorch_model.nf16.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", name]
    back = UNet.from_pretrained(tmp_path, variant=variant)
    assert type(back) is type(loaded) and torch.equal(noise_of(back), noise)
    assert torch.equal(noise_of(load_unet(tmp_path / name, tmp_path, dtype=torch.float32)), noise)
    with NFQFile(folders / "unet.nfq.safetensors") as first, NFQFile(tmp_path / name) as second:
        assert first.facts == second.facts
        assert {key: (entry.crc32, entry.dtype) for key, entry in first.quantized.items()} == {
            key: (entry.crc32, entry.dtype) for key, entry in second.quantized.items()
        }
    back.save_pretrained(tmp_path, variant=variant)
    assert torch.equal(noise_of(UNet.from_pretrained(tmp_path, variant=variant)), noise)


def test_config_json_says_how(folders: Path, tmp_path: Path, quantised: list[dict]) -> None:
    config = NFQConfig(12, conv_levels=24, quantize_first_last=True)
    unet = UNet.from_pretrained(folders / "stock", quantization_config=config)
    assert type(unet).__name__ == "UNet2DConditionModel" and "conv_in" in packed_layers(unet)
    unet.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    wanted = {"levels": 12, "conv_levels": 24, "effort": "fast", "quantize_first_last": True}
    assert written["quantization_config"] == {"quant_method": "nfq", **wanted}
    assert written["_class_name"] == "UNet2DConditionModel"
    with NFQFile(tmp_path / WEIGHTS) as file:
        assert file.facts.settings == wanted
    assert NFQConfig.from_dict(written["quantization_config"]).settings == config.settings


def test_a_preset_is_recorded_and_read_back() -> None:
    for config, words in ((NFQConfig(), "balanced"), (NFQConfig(preset="tiny", effort="best"), "tiny")):
        written = config.to_dict()
        assert written["preset"] == words
        assert NFQConfig.from_dict(written).settings == config.settings


@pytest.mark.parametrize("size", [{"preset": "small"}, {"target_bpw": 3.4}])
def test_sizes(folders: Path, quantised: list[dict], size: dict) -> None:
    unet = UNet.from_pretrained(folders / "stock", quantization_config=NFQConfig(**size, effort="best"))
    tensors = [layer.packed for layer in packed_layers(unet).values()]
    bits = 8 * sum(tensor.nbytes for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
    assert 3.2 < bits <= 3.4 and {call["effort"] for call in quantised} == {"best"}


def test_formats(folders: Path, quantised: list[dict]) -> None:
    config = NFQConfig(format="t2w8_b64", conv_format="t3w8_b64")
    unet = UNet.from_pretrained(folders / "stock", quantization_config=config)
    found = {(layer.format_id, len(layer.weight_shape)) for layer in packed_layers(unet).values()}
    assert found == {("t2w8_b64", 2), ("t3w8_b64", 4)}


def test_measured_sensitivities_choose_formats(folders: Path, quantised: list[dict]) -> None:
    ldm = diffusers_to_ldm(TINY)
    entries = {name: Entry("F16", tuple(value.shape), 0, 0) for name, value in stock_unet().state_dict().items()}
    measured = {name: float(number % 7 + 1) for number, name in enumerate(entries)}
    formats = []
    for sensitivities in (measured, None):
        _, plans = plan_tensors(entries, Settings(BitsPerWeight(3.4)), sensitivities)
        formats.append({name: plan.format.id for name, plan in plans.items() if plan.format})
    calibration = Calibration(layer_inputs(), sensitivities={ldm[name]: value for name, value in measured.items()})
    config = NFQConfig(preset="small", calibration=calibration)
    unet = UNet.from_pretrained(folders / "stock", quantization_config=config)
    found = {f"{name}.weight": layer.format_id for name, layer in packed_layers(unet).items()}
    assert found == formats[0] != formats[1]


@reads_folders
def test_calibration(folders: Path, tmp_path: Path, quantised: list[dict]) -> None:
    ldm, inputs = diffusers_to_ldm(TINY), layer_inputs()
    calibration = Calibration(inputs)
    calibration.save(tmp_path / "c.safetensors")
    for given in (tmp_path / "c.safetensors", calibration):
        quantised.clear()
        unet = UNet.from_pretrained(folders / "stock", quantization_config=NFQConfig(16, calibration=given))
        found = sorted(float(call["importance"].sum()) for call in quantised)
        assert found == sorted(float(inputs[ldm[f"{name}.weight"]].importance.sum()) for name in packed_layers(unet))
        unet.save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        recorded = {"calibration": "", "calibration_sha256": ""}
        if given is not calibration:
            recorded = Calibration.load(given).as_dict()
        assert written.items() >= recorded.items()
        UNet.from_pretrained(tmp_path / "saved")


def test_casts_leave_packed_weights_alone(folders: Path, noise: torch.Tensor) -> None:
    unet = load_unet(folders / "unet.nfq.safetensors", folders / "config")
    before = {name: layer.packed.data.clone() for name, layer in packed_layers(unet).items()}
    for cast in ("half", "float", "bfloat16", "half"):
        assert getattr(unet, cast)() is unet
    assert unet.to(torch.float32) is unet and unet.to("cpu", dtype=torch.float16).dtype == torch.float16
    assert unet.is_quantized
    for name, layer in packed_layers(unet).items():
        assert torch.equal(layer.packed.data, before[name]) and layer.packed.dtype == torch.float16
    assert (
        unet(
            torch.zeros(1, 4, 8, 8).half(),
            1,
            torch.zeros(1, 5, 48).half(),
            added_cond_kwargs={"text_embeds": torch.zeros(1, 32).half(), "time_ids": torch.zeros(1, 6)},
        ).sample.dtype
        == torch.float16
    )


def test_dequantize_gives_a_stock_model(folders: Path, loaded: torch.nn.Module, tmp_path: Path) -> None:
    unet = copy.deepcopy(loaded).dequantize()
    assert type(unet) is UNet and not hasattr(unet, "hf_quantizer") and not unet.is_quantized
    weights = dict(dense_weights(folders))
    assert weights.keys() == unet.state_dict().keys()
    assert all(torch.equal(unet.get_parameter(name), weight.float()) for name, weight in weights.items())
    unet.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(noise_of(UNet.from_pretrained(tmp_path)), noise_of(loaded))
    assert packed_layers(loaded), "the copy was another model"


@reads_folders
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies(loaded: torch.nn.Module, noise: torch.Tensor, tmp_path: Path, way: str) -> None:
    twin = copy.deepcopy(loaded) if way == "copy" else pickle.loads(pickle.dumps(loaded))
    assert type(twin) is type(loaded) and torch.equal(noise_of(twin), noise)
    twin.save_pretrained(tmp_path)
    assert torch.equal(noise_of(UNet.from_pretrained(tmp_path)), noise)


def test_a_compiled_unet_is_one_graph(tmp_path: Path) -> None:
    small = replace(TINY, channels=(32,), down_depths=((1,),), middle_depth=None, up_depths=((1, 1),))
    save(packed_unet(small, "diffusers"), tmp_path / "small.nfq.safetensors")
    unet = load_unet(tmp_path / "small.nfq.safetensors", write_config(tmp_path, small), dtype=torch.float32)
    assert torch.equal(noise_of(torch.compile(unet, backend="aot_eager", fullgraph=True)), noise_of(unet))
    torch.compiler.reset()


@reads_folders
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(
    folders: Path, loaded: torch.nn.Module, noise: torch.Tensor, quantised: list[dict], tmp_path: Path, device_map: str
) -> None:
    loaded.save_pretrained(tmp_path)
    assert torch.equal(noise_of(UNet.from_pretrained(tmp_path, device_map=device_map)), noise)
    fresh = UNet.from_pretrained(folders / "stock", quantization_config=NFQConfig(), device_map=device_map)
    assert packed_layers(fresh).keys() == packed_layers(loaded).keys() and noise_of(fresh).shape == noise.shape


def test_a_weight_that_cannot_be_quantised_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock, name = stock_unet(), "mid_block.resnets.0.conv1.weight"
    stock.get_parameter(name).data[0, 0, 0, 0] = float("inf")
    stock.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="nfq"):
        unet = UNet.from_pretrained(tmp_path, quantization_config=NFQConfig(), torch_dtype=torch.float16)
    assert f"tensor {name!r} is kept as it is: it holds NaN or Inf" in caplog.text
    assert torch.equal(unet.get_parameter(name), stock.get_parameter(name))


@reads_folders
def test_a_file_of_the_articles_code_and_mixed_formats(folders: Path, tmp_path: Path) -> None:
    tensors = packed_unet(TINY, "diffusers")
    name = next(key for key, value in tensors.items() if isinstance(value, NFTensor))
    fmt, shape = format_by_id("article7_b64"), tensors[name].shape
    data = torch.zeros(fmt.packed_bytes(shape.numel()), dtype=torch.uint8)
    tensors[name] = NFTensor(data, fmt, shape, torch.float16)
    save(tensors, tmp_path / "a.nfq.safetensors", settings={"imported": "article"})
    unet = load_unet(tmp_path / "a.nfq.safetensors", folders / "config", dtype=torch.float32)
    unet.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "nfq", "imported": "article"}
    assert torch.equal(noise_of(UNet.from_pretrained(tmp_path / "saved")), noise_of(unet))


def test_two_copies_of_the_package(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise) -> None:
    package = Path(nfq_diffusers.__file__).parent.parent
    shutil.copytree(package, tmp_path / "nfq_twin", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    from diffusers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    import nfq_twin.diffusers

    nfq_diffusers._register()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    unet = UNet.from_pretrained(folders / "stock", quantization_config=nfq_twin.diffusers.NFQConfig())
    assert type(unet.hf_quantizer).__module__ == "nfq_twin.diffusers.quantizer" and not packed_layers(unet)
    assert torch.equal(noise_of(unet), noise)
    for name in [name for name in sys.modules if name.split(".")[0] == "nfq_twin"]:
        del sys.modules[name]
