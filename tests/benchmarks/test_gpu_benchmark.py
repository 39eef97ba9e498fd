"""The GPU benchmark without a GPU: every part works with stand-ins; what fails leaves the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the steps are computed in diffusers")

from samples import TINY

from benchmarks.speed.gpu import __main__ as gpu
from benchmarks.speed.gpu import decode, step
from benchmarks.speed.gpu.__main__ import without_device
from benchmarks.speed.gpu.part import Part, random_state
from nfq_core.layers import packed_layers
from nfq_core.models.unet_keys import SDXL_BASE
from nfq_core.packed import backends, torch_decode
from nfq_core.packed.formats import FORMATS

CPU = torch.device("cpu")


class GpuPart(Part):
    """A part that takes the CPU for a GPU."""

    on_gpu = True


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All parts but `compile`, run as on a GPU; graphs, memory and Triton have stand-ins."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    threads = torch.get_num_threads()
    # With tiny shapes, several threads mostly wait for each other.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "Part", GpuPart)
        patch.setattr(decode, "graphed", lambda device, work: work)
        patch.setattr(decode, "LARGE_SIZES", ())
        patch.setattr(step, "added_bytes", lambda device, work: 1)
        for module in (decode, step):
            patch.setattr(module, "unavailable", lambda package: f"{package} is left out")
        patch.setattr(decode, "ROUNDS", 1)
        patch.setattr(step, "FILE_ROUNDS", 1)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
        triton = backends.Backend("triton", "a stand-in", torch_decode.dequantize_into)
        patch.setattr(backends, "backend_for", lambda *_: triton)
        assert gpu.run(CPU, True, out, ["correctness", "decode", "step", "files"])
    torch.set_num_threads(threads)
    return json.loads(out.read_text(encoding="utf-8"))["parts"]


def test_correctness(parts: dict) -> None:
    found = parts["correctness"]
    assert found["checked"] == 2 * len(FORMATS) * 6 * 3 and not found["wrong"]
    assert found["skipped"] == {"the largest tensor": "needs 14 GiB of free memory"}
    assert all(one["cpu_db"] == one["device_db"] for one in found["quantise"].values())


def test_decode(parts: dict) -> None:
    assert parts["decode"]["graph"].keys() == {"decode", "copies"}
    assert parts["decode"]["eager"].keys() == {"decode", "copies", "operation", "torch", "Q4_0 in torch"}
    assert parts["decode"]["skipped"] == {"bitsandbytes NF4": "bitsandbytes is left out"}


def test_steps(parts: dict) -> None:
    steps = parts["step"]["contestants"]
    assert steps.keys() == {*step.SAME_WEIGHTS, "packed, preset balanced", "Q4_0 in torch"}
    assert all({"own_bytes", "step_bytes", "ms"} == one.keys() for one in steps.values())
    assert steps["packed"]["own_bytes"] < 0.4 * steps["fp16"]["own_bytes"]
    assert steps[step.FOUR_LORAS]["own_bytes"] > steps[step.ONE_LORA]["own_bytes"] > steps["packed"]["own_bytes"]
    difference = parts["step"]["difference"]
    assert difference["packed"] == difference["fp16"] == 0 < difference[step.ONE_LORA]


def test_files(parts: dict) -> None:
    assert parts["files"]["load"].keys() == parts["files"]["first_load_s"].keys() == {"NFQ", "fp16, safetensors"}
    assert parts["files"]["quantise"]["runs"] == 1


def test_compiled_steps() -> None:
    part = Part(CPU, True)
    step.compiled(part)
    assert part.results["compiled"].keys() == {"fp16", "packed"}
    assert all(one.keys() == {"first_call_s", "ms"} for one in part.results["compiled"].values())


def test_diffusers_has_the_same_tensors_for_sdxl() -> None:
    """`empty_unet` compares every name and shape."""
    assert len(step.empty_unet(SDXL_BASE).state_dict()) == 1680


def test_what_fails_is_recorded_and_leaves_the_rest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "decode", lambda part: 1 / 0)
    monkeypatch.setitem(gpu.PARTS, "files", lambda part: part.results.update(found=3))
    assert not gpu.run(CPU, True, tmp_path / "gpu.json", ["decode", "files"])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert found["decode"]["failures"]["decode"].startswith("ZeroDivisionError: division by zero (")
    assert found["files"]["found"] == 3 and not found["files"]["failures"]


def test_loras_are_on_every_linear_layer_of_the_transformers() -> None:
    unet = step.add_low_rank(step.make_unet(TINY, random_state(Part(CPU, True))), 1)
    layers = packed_layers(unet)
    changed = {name for name, layer in layers.items() if layer.low_rank is not None}
    ends = {name.rpartition("attentions.")[2].partition(".")[2] for name in changed}
    assert {"proj_in", "proj_out", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn2.to_k"} <= ends
    assert all(".resnets." not in name and not name.startswith("time_") for name in changed)
    one = layers["mid_block.attentions.0.proj_in"]
    change = (one.low_rank.up @ one.low_rank.down).float()
    # Weights have the standard deviation that keeps activations as large as they are, columns ** -0.5.
    assert 0.008 < change.std() / one.weight_shape[1] ** -0.5 < 0.012


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--small"], ["--only", "decode"]])
def test_a_trial_does_not_replace_the_results(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert "--small and --only need --out" in capsys.readouterr().err


def test_a_device_that_is_not_there() -> None:
    assert without_device(torch.device("cuda:99")).startswith("cannot measure cuda:99: torch sees ")
    assert without_device(CPU) == ""
