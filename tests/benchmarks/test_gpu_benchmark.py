"""The GPU benchmark without a GPU: every part works with stand-ins; what fails leaves the rest."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the steps are computed in diffusers")

from reference import COMMON_IDS
from samples import TINY

from benchmarks.speed import gpu, gpu_models, gpu_parts
from benchmarks.speed.gpu_parts import Part
from nfq_core.layers import packed_layers
from nfq_core.models.unet_keys import SDXL_BASE
from nfq_core.packed import backends, torch_decode
from nfq_core.packed.formats import FORMATS, WRITABLE_IDS

CPU = torch.device("cpu")


def part_in(folder: Path, **others: object) -> Part:
    return Part(CPU, True, folder, **others)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What all parts find in this process, where a stand-in plays the kernel."""
    folder, threads = tmp_path_factory.mktemp("gpu"), torch.get_num_threads()
    # With tiny shapes, several threads mostly wait for each other.
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parts, "ROUNDS", 1)
        patch.setattr(gpu_parts, "unavailable", lambda package: f"{package} is left out")
        kernel = backends.Backend("kernel", "a stand-in", torch_decode.dequantize_into)
        patch.setattr(backends, "backend_for", lambda *_: kernel)
        for name in gpu.PARTS:
            path = folder / f"{name}.json"
            gpu.work_on(name, part_in(folder), path)
            found[name] = {"seconds": 1.0, **json.loads(path.read_text(encoding="utf-8"))}
    torch.set_num_threads(threads)
    return found


def test_nothing_fails_and_what_is_left_out_is_named(parts: dict) -> None:
    assert not any(found["failures"] for found in parts.values())
    left_out = {"bitsandbytes NF4": "bitsandbytes is left out"}
    assert parts["decode"]["skipped"] == parts["step"]["skipped"] == left_out


def test_bits(parts: dict) -> None:
    found = parts["bits"]
    assert found["backend"] == "kernel" and not found["wrong"]
    assert found["checked"] == 2 * (len(FORMATS) + len(COMMON_IDS)) * len(gpu_parts.SIZES) * 3


def test_a_kernel_with_other_bits_is_found(tmp_path: Path, monkeypatch) -> None:
    def broken(out: torch.Tensor, data: torch.Tensor, fmt: object) -> None:
        torch_decode.dequantize_into(out, data, fmt)
        if fmt.id == "nf12_b64" and out.dtype == torch.bfloat16:
            out[-1] += 1

    monkeypatch.setattr(backends, "backend_for", lambda *_: backends.Backend("kernel", "", broken))
    monkeypatch.setattr(gpu_parts, "SIZES", (64, 65))
    part = part_in(tmp_path)
    gpu_parts.bits(part)
    assert part.failures.keys() == {"nf12_b64, 64 weights", "nf12_b64, 65 weights"}
    wrong = part.results["wrong"][0]
    assert (wrong["decoder"], wrong["dtype"], wrong["different"]) == ("kernel", "torch.bfloat16", 1)


def test_decode(parts: dict) -> None:
    assert parts["decode"]["formats"].keys() == set(WRITABLE_IDS)
    assert all(one.keys() == {"decode", "copies", "torch"} for one in parts["decode"]["formats"].values())
    assert parts["decode"]["model"].keys() == {"decode", "copies", "torch", "Q4_0 in torch"}


def test_steps(parts: dict) -> None:
    steps = parts["step"]["contestants"]
    assert steps.keys() == gpu_models.contestants(TINY, CPU).keys() - {"bitsandbytes NF4"}
    assert all({"own_bytes", "ms"} == one.keys() for one in steps.values())
    assert steps["packed"]["own_bytes"] < 0.4 * steps["fp16"]["own_bytes"]
    own = [steps[name]["own_bytes"] for name in ("packed", "packed, 1 LoRA", "packed, 4 LoRAs")]
    assert own[0] < own[1] < own[2]
    differences = parts["step"]["differences"]
    assert {names for names, one in differences.items() if one} == {
        f"packed, {n} − packed" for n in ("1 LoRA", "4 LoRAs")
    }


def test_a_step_that_differs_is_found(tmp_path: Path) -> None:
    part = part_in(tmp_path)
    one, other = torch.ones(3), torch.zeros(3)
    outputs = {"resident": one, "packed": other, "packed, 1 LoRA": other, "fp16": one, "packed, 4 LoRAs": None}
    with pytest.raises(AssertionError, match=r"packed − resident: 1.0, packed, 1 LoRA − packed: 0.0$"):
        gpu_parts._compare(part, outputs)


def test_conversion_and_loading(parts: dict) -> None:
    assert all(parts["convert"][effort]["fraction"] == 1 for effort in gpu_parts.EFFORTS)
    assert parts["load"]["ms"].keys() == {"NFQ", "NFQ, resident", "fp16, safetensors"}


def test_a_conversion_ends_with_its_time(tmp_path: Path) -> None:
    part = part_in(tmp_path)
    source = gpu_parts._dense_file(part)
    part.deadline = time.time() + 60
    # The first tensor takes longer than is left then.
    part.save = lambda part: setattr(part, "deadline", 0.0)
    part.attempt("fast", lambda: gpu_parts._convert(part, source, "fast"))
    assert part.skipped["fast"].startswith("no time left after ") and not part.failures
    assert 0 < part.results["fast"]["fraction"] < 1
    part.attempt("best", lambda: gpu_parts._convert(part, source, "best"))
    assert part.skipped["best"] == "no time left" and "best" not in part.results


def test_tensors_of_offloaded_layers_are_back_after_a_step() -> None:
    unet = gpu_models.offload(gpu_models.add_low_rank(gpu_models.make_unet(TINY, CPU), 1), CPU)
    before = {name: tensor.data_ptr() for name, tensor in unet.state_dict(keep_vars=True).items()}
    gpu_models.step_of(unet, CPU, gpu_parts.SMALL_SIDE)()
    assert {name: tensor.data_ptr() for name, tensor in unet.state_dict(keep_vars=True).items()} == before


def test_loras_are_on_every_linear_layer_of_the_transformers() -> None:
    unet = gpu_models.add_low_rank(gpu_models.make_unet(TINY, CPU), 1)
    layers = packed_layers(unet)
    changed = {name for name, layer in layers.items() if layer.low_rank is not None}
    ends = {name.rpartition("attentions.")[2].partition(".")[2] for name in changed}
    assert {"proj_in", "proj_out", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn2.to_k"} <= ends
    assert all(".resnets." not in name and not name.startswith("time_") for name in changed)
    one = layers["mid_block.attentions.0.proj_in"]
    change = (one.low_rank.up @ one.low_rank.down).float()
    # Weights have the standard deviation that keeps activations as large as they are, columns ** -0.5.
    assert 0.008 < change.std() / one.weight_shape[1] ** -0.5 < 0.012


def test_diffusers_has_the_same_tensors_for_sdxl() -> None:
    """`empty_unet` compares every name and shape."""
    assert len(gpu_models.empty_unet(SDXL_BASE).state_dict()) == 1680


def test_what_fails_is_recorded_and_leaves_the_rest(tmp_path: Path) -> None:
    part, saved = part_in(tmp_path), []
    part.save = lambda part: saved.append(dict(part.failures))
    assert part.attempt("first", lambda: 1 / 0) is None
    assert part.attempt("second", lambda: 3) == 3
    assert part.failures["first"].startswith("ZeroDivisionError: division by zero (")
    assert len(saved) == 2 and saved[0].keys() == {"first"}


def test_parts_run_in_processes_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """One that cannot begin, and one that is stopped, leave the others."""
    monkeypatch.setattr(gpu, "PARTS", {"no such part": (print, 60.0), "load": (print, 600.0), "step": (print, -9.0)})
    assert not gpu.run(CPU, True, tmp_path / "gpu.json", ["no such part", "load", "step"])
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    found = results["parts"]
    assert found["no such part"]["failures"] == {"no such part": "its process ended with status 1"}
    assert found["load"]["ms"]["NFQ"]["runs"] >= 1 and not found["load"]["failures"]
    assert found["step"]["failures"] == {"step": "stopped after 1 s"}
    assert "Failed: no such part, no such part; step, step." in gpu.table(results)


def test_the_table_has_every_part(parts: dict) -> None:
    results = {"small": True, "device": {"name": "cpu"}, "machine": {"torch": "2", "date": "today"}, "parts": parts}
    text = gpu.table(results)
    layers = f"all {parts['decode']['layers']} layers: copies"
    for words in ("packed, 4 LoRAs", "`t3w8_b64`", layers, "effort `best`", "NFQ, resident", "reference's bits"):
        assert words in text
    assert "Left out: bitsandbytes NF4 (bitsandbytes is left out)." in text and "Failed" not in text
    # A part that was stopped early leaves its row out, not the table.
    parts = {name: {"seconds": 1.0, "skipped": {}, "failures": {}} for name in parts}
    assert gpu.table(results | {"parts": parts}) == "cpu, torch 2, today."


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--small"], ["--only", "decode"]])
def test_a_trial_does_not_replace_the_results(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert "--small and --only need --out" in capsys.readouterr().err


def test_a_device_that_is_not_there() -> None:
    assert gpu.without_device(torch.device("cuda:99")).startswith("cannot measure cuda:99: torch sees ")
    assert gpu.without_device(CPU) == ""


def test_the_budgets_are_less_than_eight_minutes() -> None:
    assert sum(budget + gpu.GRACE_SECONDS for _, budget in gpu.PARTS.values()) <= 480
