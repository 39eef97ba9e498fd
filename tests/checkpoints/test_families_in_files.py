"""Models of other families from file to file: quantised, described, loaded."""

from __future__ import annotations

import re

import pytest
import torch
from commands import as_json, run
from family_models import COMFYUI, random_tensors
from safetensors.torch import save_file

from nfq_core import NFTensor, load
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.dry_run import forecast_file, forecast_lines
from nfq_core.checkpoints.examine import file_info, info_lines
from nfq_core.decibels import sqnr_db
from nfq_core.errors import CorruptFileError
from nfq_core.files.container import NFQFile

PREFIX = "model.diffusion_model."


def small_model(name: str) -> dict[str, torch.Tensor]:
    """The first two blocks of a model, in bf16."""
    inner, outer = COMFYUI[name]
    shapes = {key: shape for key, shape in (inner | outer).items() if not re.search(r"s\.([2-9]|\d\d)\.", key)}
    return random_tensors({PREFIX + key: shape for key, shape in shapes.items()})


@pytest.mark.parametrize("name", COMFYUI)
def test_round_trip(tmp_path, name):
    tensors = small_model(name)
    metadata = {"config": '{"transformer": {}}', "modelspec.architecture": name}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    path = tmp_path / "a.nfq.safetensors"
    assert quantize_file(tmp_path / "a.safetensors", path)["architecture"] == name
    with NFQFile(path) as file:
        assert file.facts.source.metadata == metadata
        assert {entry.dtype for entry in file.quantized.values()} == {"BF16"}
    loaded = load(path)
    assert loaded.keys() == tensors.keys()
    packed = {key for key, tensor in loaded.items() if isinstance(tensor, NFTensor)}
    assert len(packed) > 10
    for key, tensor in loaded.items():
        if key in packed:
            assert sqnr_db(tensors[key], tensor.dequantize(torch.bfloat16)) > 8, key
        else:
            assert torch.equal(tensor, tensors[key]), key
    assert dict(info_lines(path, file_info(path)))["model"] == f"{name}, plain keys"


def test_the_command_names_the_family(tmp_path, capsys):
    save_file(small_model("Flux.1"), tmp_path / "a.safetensors")
    found = forecast_file(tmp_path / "a.safetensors", tmp_path / "b.nfq.safetensors")
    assert found["architecture"] == "Flux.1" and [each["name"] for each in found["components"]] == ["Flux.1"]
    assert f"{tmp_path / 'b.nfq.safetensors'}: Flux.1, about " in forecast_lines(found)[-2]
    code, text, error = run(capsys, "quantize", tmp_path / "a.safetensors", tmp_path / "b.nfq.safetensors")
    assert (code, error) == (
        0,
        "",
    ) and "b.nfq.safetensors: Flux.1, 159 KB, 51% of 308 KB; 26 tensors quantised, " in text
    assert as_json(capsys, "info", tmp_path / "b.nfq.safetensors")["architecture"] == "Flux.1"


def test_weights_beyond_fp16_are_kept(tmp_path):
    tensors = small_model("Wan")
    large, tiny = (f"{PREFIX}blocks.1.{part}.weight" for part in ("ffn.0", "ffn.2"))
    tensors[large][3, 5] = 1e5
    tensors[tiny] *= 1e-9
    save_file(tensors, tmp_path / "a.safetensors")
    warnings = quantize_file(tmp_path / "a.safetensors", tmp_path / "b.nfq.safetensors")["warnings"]
    loaded = load(tmp_path / "b.nfq.safetensors")
    for key in (large, tiny):
        assert any(f"tensor {key!r} is kept as it is: " in warning for warning in warnings)
        assert torch.equal(loaded[key], tensors[key])


def test_a_block_without_a_tensor(tmp_path):
    inner, outer = COMFYUI["Wan"]
    tensors = random_tensors({key: shape for key, shape in (inner | outer).items() if "blocks.7.ffn" not in key})
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CorruptFileError) as caught:
        quantize_file(tmp_path / "a.safetensors", tmp_path / "b.nfq.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'} is incomplete: tensor 'blocks.7.ffn.0.bias' of Wan is missing, and 3 more; "
        "fetch the file, or make the merge, again"
    )
