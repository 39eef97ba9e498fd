"""Models of other families in diffusers: packed while they load, saved, and loaded from a file."""

from __future__ import annotations

import pytest
import torch
from diffusers_models import reads_folders
from family_models import COMFYUI, diffusers_models, random_tensors
from safetensors.torch import save_file

from nfq_core.checkpoints.convert import quantize_file
from nfq_core.diffusers import NFQConfig, load_model
from nfq_core.errors import UnsupportedFileError
from nfq_core.files.container import NFQFile
from nfq_core.layers.packing import packed_layers

NAMES = ("Stable Diffusion 1", "Stable Diffusion 3", "Flux.1", "Qwen-Image", "Wan")


def stable_diffusion_1() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (32, 64)}
    return UNet2DConditionModel(
        **blocks,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def output_of(name: str, model: torch.nn.Module) -> torch.Tensor:
    """What a model makes of fixed inputs, in fp32."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    time = torch.tensor([0.5])
    with torch.no_grad():
        if name == "Stable Diffusion 1":
            return model(random(1, 4, 8, 8), torch.tensor(500), random(1, 5, 768)).sample
        if name == "Stable Diffusion 3":
            return model(random(1, 4, 8, 8), random(1, 5, 64), random(1, 32), time).sample
        if name == "Flux.1":
            places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
            return model(random(1, 16, 16), random(1, 5, 64), random(1, 32), time, guidance=time, **places).sample
        if name == "Qwen-Image":
            mask, places = torch.ones(1, 5, dtype=torch.bool), [(1, 4, 4)]
            return model(random(1, 16, 16), random(1, 5, 64), mask, time, img_shapes=places).sample
        return model(random(1, 4, 2, 4, 4), time, random(1, 5, 64)).sample


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock model of each family, in a folder of its own."""
    models = {"Stable Diffusion 1": stable_diffusion_1(), **diffusers_models()}
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        models[name].to(torch.bfloat16).save_pretrained(root / name)
    return {name: (type(models[name]), root / name) for name in NAMES}


@reads_folders
@pytest.mark.parametrize("name", NAMES)
def test_packed_at_load_saved_and_loaded_again(folders, tmp_path, name):
    kind, folder = folders[name]
    model = kind.from_pretrained(folder, quantization_config=NFQConfig(), torch_dtype=torch.float32)
    assert packed_layers(model) and model.hf_quantizer.facts.architecture == name
    wanted = output_of(name, model)
    assert torch.equal(output_of(name, model.dense_copy()), wanted)

    model.save_pretrained(tmp_path / "packed")
    again = kind.from_pretrained(tmp_path / "packed", torch_dtype=torch.float32)
    assert torch.equal(output_of(name, again), wanted)

    path = tmp_path / "file.nfq.safetensors"
    quantize_file(folder / "diffusion_pytorch_model.safetensors", path)
    with NFQFile(path) as file:
        assert file.facts.architecture == name
        assert {entry.dtype for entry in file.quantized.values()} == {"BF16"}
        assert {f"{layer}.weight" for layer in packed_layers(model)} == set(file.quantized)
    loaded = load_model(path, folder, dtype=torch.float32)
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    assert torch.equal(output_of(name, loaded), wanted)
    resident = load_model(path, folder, dtype=torch.float32, memory="resident")
    assert not packed_layers(resident) and torch.allclose(output_of(name, resident), wanted, atol=0.05)


def test_names_of_comfyui_are_refused(folders, tmp_path):
    inner, outer = COMFYUI["Flux.1"]
    save_file(random_tensors(inner | outer), tmp_path / "flux")
    quantize_file(tmp_path / "flux", tmp_path / "flux.nfq.safetensors")
    with pytest.raises(UnsupportedFileError, match=r"is Flux\.1 with ComfyUI's names; quantise the transformer"):
        load_model(tmp_path / "flux.nfq.safetensors", folders["Flux.1"][1])


def test_a_prefix_before_the_names(folders, tmp_path):
    from safetensors.torch import load_file

    _, folder = folders["Qwen-Image"]
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a")
    quantize_file(tmp_path / "a", tmp_path / "a.nfq.safetensors")
    model = load_model(tmp_path / "a.nfq.safetensors", folder)
    assert packed_layers(model) and model.dtype == torch.bfloat16


def test_a_config_of_another_model(folders, tmp_path):
    _, folder = folders["Wan"]
    quantize_file(folder / "diffusion_pytorch_model.safetensors", tmp_path / "wan.nfq.safetensors")
    with pytest.raises(UnsupportedFileError, match=r"\(architecture: Wan\) does not fit .*config.json"):
        load_model(tmp_path / "wan.nfq.safetensors", folders["Qwen-Image"][1])
