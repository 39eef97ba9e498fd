"""Text encoders of transformers: packed at load, read from files, saved, dequantised, with LoRAs, and refusals."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from samples import random_weight

from benchmarks.checkpoint_shapes import text_encoders as sdxl_text_encoders
from nfq_core import Calibration, NFQError, NFTensor, load, quantize_state_dict, save
from nfq_core.layers import PackedEmbedding, packed_layers
from nfq_core.models.text_encoders import find_text_encoders

transformers = pytest.importorskip("transformers", reason="the text encoders are transformers'")
for package in ("accelerate", "diffusers", "peft"):
    pytest.importorskip(package, reason="what is tested needs it")

from clip_models import aligned, clip_names, hidden_states, open_clip_names, text_encoder  # noqa: E402
from diffusers_models import write_config  # noqa: E402

from nfq_core.diffusers import NFQConfig, load_text_encoder, load_unet  # noqa: E402
from nfq_core.diffusers.text_names import rename  # noqa: E402

KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
L, G, T5 = KINDS
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock and a packed folder of each kind."""
    root = tmp_path_factory.mktemp("text")
    for kind in KINDS:
        text_encoder(kind).half().save_pretrained(root / kind)
        at_load(root / kind).save_pretrained(root / "packed" / kind)
    return root


def at_load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    stock = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return stock.from_pretrained(folder, quantization_config=NFQConfig(**settings), dtype=dtype)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = list(zip(hidden_states(aligned(one)), hidden_states(aligned(other)), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_the_dequantised_model(folders: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """The dense model is loaded by transformers from a folder that holds dequantised weights."""
    packed = at_load(folders / kind, dtype)
    states = hidden_states(packed)
    assert all(state.isfinite().all() for state in states)
    dense = copy.deepcopy(packed).dequantize()
    assert type(dense) is getattr(transformers, kind) and not packed_layers(dense)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert equal(packed, type(dense).from_pretrained(tmp_path / "dense", dtype=dtype)) and equal(packed, dense)
    stock = type(dense).from_pretrained(folders / kind, dtype=dtype)
    assert not torch.equal(hidden_states(stock)[-1], states[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed(folders: Path, kind: str) -> None:
    """Layers and the table of tokens, to the bytes of `quantize_state_dict`; positions and projection stay dense."""
    stock = text_encoder(kind).half()
    wanted = quantize_state_dict(stock.state_dict(), text_encoders="5bit")
    model = at_load(folders / kind, text_encoders="5bit")
    layers = {f"{name}.weight": layer.packed for name, layer in packed_layers(model).items()}
    assert layers.keys() == {name for name, tensor in wanted.items() if isinstance(tensor, NFTensor)}
    assert all(torch.equal(packed.data, wanted[name].data) for name, packed in layers.items())
    assert {packed.format.id for packed in layers.values()} == {"nf32_b64", "nf256_b64"}
    assert not any("position" in name or "projection" in name or "bias" in name for name in layers)
    assert model.config.quantization_config["text_encoders"] == "5bit"
    tables = [layer for layer in model.modules() if isinstance(layer, PackedEmbedding)]
    assert len({table.weight.data_ptr() for table in tables}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(folders: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = folders / "packed" / kind
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype)
    assert packed_layers(model) and not model.training
    assert equal(model, load_text_encoder(folder / "model.safetensors", folder, dtype=dtype))
    dense = load_text_encoder(folder / "model.safetensors", folder, dtype=dtype, memory="resident")
    assert type(dense) is getattr(transformers, kind) and not packed_layers(dense) and equal(model, dense)
    model.save_pretrained(tmp_path)
    before, after = load(folder / "model.safetensors"), load(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert not isinstance(tensor, NFTensor) or torch.equal(tensor.data, after[name].data), name


def test_a_saved_clip_has_the_names_of_other_programs(folders: Path) -> None:
    assert load(folders / "packed" / L / "model.safetensors").keys() == clip_names(text_encoder(L)).keys()


def test_no_weights_are_missing_or_unknown(folders: Path, capfd: pytest.CaptureFixture) -> None:
    for kind in KINDS:
        stock = getattr(transformers, kind)
        _, found = stock.from_pretrained(folders / "packed" / kind, output_loading_info=True)
        assert not any(found.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_casts_and_pickles(folders: Path, kind: str) -> None:
    model = load_text_encoder(folders / "packed" / kind / "model.safetensors", folders / kind, dtype=torch.float32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert equal(twin, model) and packed_layers(twin).keys() == packed_layers(model).keys()
    half = copy.deepcopy(model).half()
    dense = copy.deepcopy(model).dequantize().half()
    assert equal(half, dense)


def test_the_recorded_dtype_is_the_default(folders: Path) -> None:
    weights = quantize_state_dict(clip_names(text_encoder(L).bfloat16()))
    save(weights, folders / "bf16.nfq.safetensors")
    assert load_text_encoder(folders / "bf16.nfq.safetensors", folders / L).dtype == torch.bfloat16


@pytest.mark.parametrize("memory", ["packed", "resident"])
@pytest.mark.parametrize("bits", ["keep", "8bit", "5bit"])
def test_open_clip_names(folders: Path, tmp_path: Path, bits: str, memory: str) -> None:
    """The fused projections are split while they are packed; the result has the values of the whole ones."""
    stock = text_encoder(G).half()
    whole = quantize_state_dict(open_clip_names(stock, "conditioner.embedders.1.model."), text_encoders=bits)
    save(whole, tmp_path / "g.nfq.safetensors")
    model = load_text_encoder(tmp_path / "g.nfq.safetensors", folders / G, dtype=torch.float16, memory=memory)
    dense = {name: one.dequantize() if isinstance(one, NFTensor) else one for name, one in whole.items()}
    fused = dense["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"]
    reference = copy.deepcopy(model).dequantize() if packed_layers(model) else model
    attention = reference.text_model.encoder.layers[1].self_attn
    split = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(torch.cat(split), fused)
    assert torch.equal(reference.text_projection.weight.T, dense["conditioner.embedders.1.model.text_projection"])
    assert open_clip_names(reference).keys() == {name.rpartition("model.")[2] for name in whole}
    for name, tensor in open_clip_names(reference, "conditioner.embedders.1.model.").items():
        assert name.endswith("logit_scale") or torch.equal(tensor, dense[name]), name
    assert bool(packed_layers(model)) is (memory == "packed" and bits != "keep") and equal(model, reference)


@pytest.mark.parametrize("kind", [L, G])
def test_names_of_a_whole_sdxl_checkpoint(kind: str) -> None:
    """Every tensor of its text encoders has a place in transformers' models of SDXL's sizes, and none is left empty."""
    shapes = sdxl_text_encoders()
    first, second = find_text_encoders(shapes)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if kind == G:
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with torch.device("meta"):
        config = transformers.CLIPTextConfig(**sizes, projection_dim=1280)
        model = getattr(transformers, kind)(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    encoder = second if kind == G else first
    renamed = rename(shapes, encoder, wanted)
    assert {name: each.shape(shapes[each.key]) for each in renamed for name in each.names} == wanted
    unused = {key for key in shapes if encoder.owns(key)} - {each.key for each in renamed}
    assert unused == ({f"{encoder.prefix}logit_scale"} if kind == G else set())


def lora(model: torch.nn.Module, seed: int, rank: int = 4) -> tuple[Any, dict[str, torch.Tensor]]:
    """PEFT's configuration and tensors of a LoRA on all attention of a text encoder."""
    from peft import LoraConfig

    targets = ["q", "v"] if type(model).__name__ == T5 else ["q_proj", "fc1"]
    tensors = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in targets:
            tensors[f"{name}.lora_A.weight"] = random_weight(rank, layer.in_features, seed=seed) / 8
            tensors[f"{name}.lora_B.weight"] = random_weight(layer.out_features, rank, seed=seed + 1) / 8
    return LoraConfig(r=rank, target_modules=targets), tensors


@pytest.mark.parametrize("kind", KINDS)
def test_loras(folders: Path, kind: str) -> None:
    """Attached, they give what a stock model of the same weights gives; merged, weights stay packed."""
    from diffusers.utils import delete_adapter_layers, set_weights_and_activate_adapters
    from peft.tuners.tuners_utils import BaseTunerLayer

    file = folders / "packed" / kind / "model.safetensors"
    packed = load_text_encoder(file, folders / kind, dtype=torch.float32)
    dense = load_text_encoder(file, folders / kind, dtype=torch.float32, memory="resident")
    before = hidden_states(packed)
    for model in (packed, dense):
        for number, name in enumerate(("one", "two")):
            config, tensors = lora(text_encoder(kind), 10 * number)
            model.load_adapter(peft_config=config, adapter_state_dict=tensors, adapter_name=name)
        set_weights_and_activate_adapters(model, ["one", "two"], [0.5, 1.0])
    assert equal(packed, dense) and not torch.equal(hidden_states(packed)[-1], before[-1])
    for model in (packed, dense):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
    for one, other in zip(hidden_states(packed), hidden_states(dense), strict=True):
        # Both sum the same three fp32 products, in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for module in packed.modules():
        if isinstance(module, BaseTunerLayer):
            module.unmerge()
    with pytest.raises(NFQError, match="LoRAs are attached"):
        packed.save_pretrained(folders / "never")
    for name in ("one", "two"):
        delete_adapter_layers(packed, name)
    assert all(torch.equal(*pair) for pair in zip(hidden_states(packed), before, strict=True))


@pytest.mark.parametrize("change", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_need_dense_weights(folders: Path, change: dict[str, Any]) -> None:
    model = load_text_encoder(folders / "packed" / L / "model.safetensors", folders / L)
    before = hidden_states(model)
    config, tensors = lora(text_encoder(L), 0)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(NFQError, match="needs dense weights"):
        model.load_adapter(peft_config=config, adapter_state_dict=tensors, adapter_name="one")
    with pytest.raises(NFQError, match="needs dense weights"):
        model.add_adapter(config, "one")
    assert all(torch.equal(*pair) for pair in zip(hidden_states(model), before, strict=True))


def test_new_tokens(folders: Path) -> None:
    """The table of tokens becomes dense; all other layers stay packed."""
    model = load_text_encoder(folders / "packed" / L / "model.safetensors", folders / L, dtype=torch.float32)
    table = model.get_input_embeddings().dense_weight(torch.float32)
    layers = len(packed_layers(model))
    model.resize_token_embeddings(len(table) + 2)
    assert torch.equal(model.get_input_embeddings().weight[: len(table)], table)
    assert len(packed_layers(model)) == layers - 1 and model.config.vocab_size == len(table) + 2


def test_quantised_and_foreign_sources(folders: Path, tmp_path: Path) -> None:
    Path(tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "config.json").write_text((folders / L / "config.json").read_text())
    (tmp_path / "twice" / "model.safetensors").write_bytes((folders / "packed" / L / "model.safetensors").read_bytes())
    with pytest.raises(NFQError, match=r"quantised already, .*load_text_encoder\(FILE, FOLDER\) reads it"):
        at_load(tmp_path / "twice")
    Path(tmp_path / "bnb").mkdir()
    (tmp_path / "bnb" / "config.json").write_text((folders / L / "config.json").read_text())
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    save_file(
        {name: torch.zeros(2048, 1, dtype=torch.uint8), f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(1)},
        tmp_path / "bnb" / "model.safetensors",
    )
    with pytest.raises(NFQError, match="quantised already by bitsandbytes"):
        at_load(tmp_path / "bnb")


def test_other_models_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(NFQError, match=r"packs CLIPTextModel, .* not BertModel"):
        transformers.BertModel.from_pretrained(tmp_path, quantization_config=NFQConfig())


def test_one_device(folders: Path) -> None:
    with pytest.raises(NFQError, match="one device"):
        transformers.CLIPTextModel.from_pretrained(folders / "packed" / L, device_map={"": "cpu", "encoder": "disk"})


def test_files_and_configs_that_do_not_match(folders: Path, tmp_path: Path) -> None:
    clip = folders / "packed" / L / "model.safetensors"
    with pytest.raises(NFQError, match=r"holds CLIP, but .*config.json describes a text encoder of width 128"):
        load_text_encoder(clip, folders / G)
    text_encoder(L, num_hidden_layers=3).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [L]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NFQError, match=r"does not fit .*config.json: the file lacks 'encoder.layers.2.*15 more"):
        load_text_encoder(clip, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(NFQError, match=r"the config has no 'encoder.layers.1."):
        load_text_encoder(clip, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(NFQError, match="describes BertModel; name the folder of a CLIPTextModel"):
        load_text_encoder(clip, tmp_path)
    with pytest.raises(NFQError, match=r"no such file; name the folder of the text encoder's config.json"):
        load_text_encoder(clip, tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(NFQError, match="transformers cannot build a text encoder from it"):
        load_text_encoder(clip, tmp_path)
    with pytest.raises(NFQError, match=r"is a text encoder \(CLIP\), not a UNet; load_text_encoder reads it"):
        load_unet(clip, write_config(tmp_path / "unet"))
    save({"a.weight": torch.zeros(4, 4)}, tmp_path / "other.nfq.safetensors")
    with pytest.raises(NFQError, match="holds no text encoder of a known kind; name a file with CLIP or T5"):
        load_text_encoder(tmp_path / "other.nfq.safetensors", folders / L)


def test_arguments_that_cannot_work(folders: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        load_text_encoder(folders / "packed" / L / "model.safetensors", folders / L, dtype=torch.int8)
    calibration = Calibration({})
    with pytest.raises(NFQError, match="a calibration is of a diffusion model"):
        at_load(folders / L, calibration=calibration)
