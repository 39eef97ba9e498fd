"""The GPU's benchmark, tried without one: every part works or says why not; what breaks leaves the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from systems import WINDOWS

from benchmarks.speed.gpu import __main__ as gpu
from benchmarks.speed.gpu import decode as gpu_decode
from benchmarks.speed.gpu import part as gpu_bench
from benchmarks.speed.gpu import step as gpu_step
from nfq_core.layers import packed_layers
from nfq_core.models.unet_keys import SDXL_BASE
from nfq_core.packed import backends, torch_decode
from nfq_core.packed.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_part_works_or_says_why_not(results: dict) -> None:
    assert list(results["parts"]) == list(gpu.PARTS)
    status = {name: part["status"] for name, part in results["parts"].items()}
    assert status == dict.fromkeys(gpu.PARTS, "ok") | {"host": "skipped"}
    assert results["parts"]["host"]["reason"] == "not asked for: --host"
    skipped = {name: set(part.get("skipped", ())) - {"bitsandbytes NF4"} for name, part in results["parts"].items()}
    assert skipped == {
        "correctness": {"triton"},
        "decode": set(),
        "step": {"peak memory", "CUDA graphs"},
        "files": set(),
        "tuning": {"tuning"},
        "compile": {"peak memory"},
        "host": set(),
    }


def test_what_is_measured(results: dict) -> None:
    parts = results["parts"]
    assert parts["correctness"]["checked"] == len(FORMATS) * 6 * 3 and not parts["correctness"]["wrong"]
    assert {"decode", "copies", "even copies", "operation", "torch", "Q4_0 in torch"} <= parts["decode"]["eager"].keys()
    steps = parts["step"]["contestants"]
    assert {"fp16", *gpu_step.AT_MOST, gpu_step.BALANCED, "Q4_0 in torch"} <= steps.keys()
    assert steps["packed"]["own_bytes"] < 0.4 * steps["fp16"]["own_bytes"]
    assert steps["packed, 4 LoRAs"]["own_bytes"] > steps["packed, 1 LoRA"]["own_bytes"] > steps["packed"]["own_bytes"]
    difference = parts["step"]["difference"]
    assert difference["packed"] == difference["fp16"] == 0 < difference["packed, 1 LoRA"]
    assert difference["packed, 4 LoRAs"] < difference["standard_deviation"]
    assert parts["compile"]["compiled"].keys() == {"transformer blocks", "whole UNet"}
    assert parts["files"]["load"].keys() == parts["files"]["first_load_s"].keys() == {"NFQ", "fp16, safetensors"}


def test_the_table(results: dict) -> None:
    told = gpu.table(results)
    assert told.startswith("| tiny shapes, to try the script |")
    assert "| SDXL's UNet, 1024 px, CFG |" in gpu.table(results | {"small": False})
    assert "| packed, 1 LoRA |" in told and "| quantise |" in told and "Missed: " in told
    assert "| first load: NFQ |" in told
    assert "| whole UNet: packed |" in told and ", 0 with others than the CPU's;" in told
    assert "In a ComfyUI: no tests, not asked for: --host." in told
    tests = {"tests": {"one": "passed", "other": "failure: broke"}}
    assert "1 of 2 tests passed" in gpu.table(results | {"parts": results["parts"] | {"host": tests}})
    broken = {name: {"status": "failed", "failures": {"all": "broke"}} for name in gpu.PARTS}
    told = gpu.table(results | {"parts": broken})
    assert told.startswith("Failed: correctness, all; decode, all")


@pytest.fixture
def diffusers_alone(monkeypatch) -> None:
    """As the benchmark's own processes import it; once it is imported, it relies on what it found then."""
    for name in () if "diffusers" in sys.modules else gpu.UNNEEDED:
        monkeypatch.setitem(sys.modules, name, None)


def test_diffusers_has_the_same_tensors_for_sdxl(diffusers_alone) -> None:
    """`empty_unet` compares every name and shape."""
    assert len(gpu_step.empty_unet(SDXL_BASE).state_dict()) == 1680
    assert sum(fmt is not None for _, fmt in gpu_bench.layer_formats(SDXL_BASE).values()) == 771


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_random_buffers_are_valid(fmt) -> None:
    generator = torch.Generator().manual_seed(0)
    for weights in (1, 65, 64 * 24 + 1):
        gpu_bench.random_packed((weights,), fmt, generator).validate()


def test_random_weights_have_the_spread_asked_for() -> None:
    packed = gpu_bench.random_packed((300, 300), FORMATS["nf16_b64"], torch.Generator().manual_seed(0), 0.03)
    # Scales lie on a grid of eight to an octave, and vary over half an octave.
    assert 0.9 < packed.dequantize().float().std() / 0.03 < 1.15


def small_part(path: Path) -> gpu_bench.Part:
    return gpu_bench.Part(CPU, True, float("inf"), path)


@pytest.fixture
def one_thread():
    """With tiny shapes, several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class GpuPart(gpu_bench.Part):
    """A part that takes the CPU for a GPU."""

    on_gpu = True


@pytest.mark.parametrize(
    ("work", "results"),
    [
        (gpu_decode.correctness, {"backend", "backend_reason", "checked", "wrong", "quantise"}),
        (gpu_decode.decode, {"layers", "weights", "packed_bytes", "bytes_moved", "graph", "eager"}),
        (gpu_decode.tuning, {"settings"}),
        (gpu_step.step, {"contestants", "difference", "graphs"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_only_a_gpu_does(
    request, tmp_path: Path, monkeypatch, one_thread, work: Callable, results: set[str]
) -> None:
    """Graphs, memory and Triton have stand-ins."""
    if work is gpu_decode.tuning:
        pytest.importorskip("triton", reason="Triton is not installed; it is for Linux only")
    if work is gpu_step.step:
        request.getfixturevalue("diffusers_alone")
    for module in (gpu_decode, gpu_step):
        monkeypatch.setattr(module, "graphed", lambda device, work, pool=None: work)
        monkeypatch.setattr(module, "without_bitsandbytes", lambda: "it is left out")
    monkeypatch.setattr(gpu_step, "added_bytes", lambda device, work: 1)
    monkeypatch.setattr(gpu_decode, "LARGE_SIZES", ())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    triton = backends.Backend("triton", "a stand-in", torch_decode.dequantize_into)
    monkeypatch.setattr(backends, "choose", lambda *_: triton)
    part = GpuPart(CPU, True, float("inf"), tmp_path / "part.json")
    work(part)
    assert not part.failures and part.results.keys() == results
    if work is gpu_decode.correctness:
        assert part.results["checked"] == 2 * len(FORMATS) * 6 * 3
    if work is gpu_step.step:
        assert part.results["graphs"].keys() == {"fp16", *gpu_step.AT_MOST, gpu_step.BALANCED}


def test_what_fails_is_noted_and_leaves_the_rest(tmp_path: Path) -> None:
    part = small_part(tmp_path / "part.json")
    assert part.attempt("first", lambda: 1 / 0) is None and part.attempt("second", lambda: 2) == 2
    part.note(found=3)
    told = json.loads(part.path.read_text(encoding="utf-8"))
    assert told["found"] == 3 and told["failures"]["first"].startswith("ZeroDivisionError: division by zero (")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; time.sleep(60)", "stopped after 3 s"),
        ("import os; os.abort()", f"ended with status {'' if WINDOWS else '-6'}"),
        ("raise SystemExit('no torch')", "did not begin: no torch"),
    ],
)
def test_parts_that_hang_or_break_down(tmp_path: Path, monkeypatch, code: str, told: str) -> None:
    """What they had found by then is kept."""
    begins = "begin" not in told
    begin = "import sys; open(sys.argv[sys.argv.index('--out') + 1], 'w').write('{\"found\": 1}'); " if begins else ""
    popen = subprocess.Popen

    def instead(command: list[str], **options: object) -> subprocess.Popen:
        return popen([sys.executable, "-c", begin + code, *command[3:]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", instead)
    options = gpu.argparse.Namespace(device="cpu", small=True)
    found = gpu.run_apart("decode", options, 3)
    assert found["status"] == "failed" and found.get("found") == (1 if begins else None)
    assert told in found["failures"]["decode"]


@pytest.mark.parametrize("groups", [True, False])
def test_a_part_is_ended_also_where_there_are_no_groups_of_processes(monkeypatch, groups: bool) -> None:
    if not groups:
        monkeypatch.delattr(gpu.os, "killpg", raising=False)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    gpu._end(process)
    assert process.returncode not in (None, 0)


@pytest.mark.parametrize(
    ("left", "skipped"),
    [
        (gpu_step.FULL_COMPILE_SECONDS - 1, {"whole UNet: fp16", "whole UNet: packed"}),
        (gpu_step.FULL_COMPILE_SECONDS + 1, {"whole UNet: packed"}),
    ],
)
def test_whole_unets_are_compiled_where_time_is_left(
    tmp_path: Path, monkeypatch, one_thread, left: float, skipped: set[str]
) -> None:
    """The first one's time is the estimate for the next."""

    def first_call(*args: object) -> tuple[Callable[[], None], dict[str, float]]:
        return lambda: None, {"first_call_s": left + 1}

    monkeypatch.setattr(gpu_step, "without_diffusers", lambda part: False)
    monkeypatch.setattr(gpu_step, "_first_call", first_call)
    monkeypatch.setattr(GpuPart, "left", lambda self: left)
    part = GpuPart(CPU, True, 0, tmp_path / "part.json")
    gpu_step.compiled(part)
    assert part.skipped.keys() == skipped | {"transformer blocks: packed"} and not part.failures


def test_loras_are_on_every_linear_layer_of_the_transformers(diffusers_alone) -> None:
    generator = torch.Generator().manual_seed(0)
    unet = gpu_step.make_unet(gpu_bench.SMALL, gpu_bench.random_unet(gpu_bench.SMALL, generator))
    gpu_step.add_low_rank(unet, 1, generator)
    layers = packed_layers(unet)
    changed = {name for name, layer in layers.items() if layer.low_rank is not None}
    ends = {name.rpartition("attentions.")[2].partition(".")[2] for name in changed}
    assert {"proj_in", "proj_out", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn2.to_k"} <= ends
    assert all(".resnets." not in name and not name.startswith("time_") for name in changed)
    one = layers["mid_block.attentions.0.proj_in"]
    change = (one.low_rank.up @ one.low_rank.down).float()
    assert 0.008 < change.std() / one.packed.dequantize().float().std() < 0.012


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--small"], ["--only", "decode"]])
def test_a_trial_does_not_replace_the_results(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--small and --only need --out" in done.stderr


def test_a_device_that_is_not_there() -> None:
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--device", "cuda:99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("cannot measure cuda:99: ") and done.stderr.count("\n") == 1


def test_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = gpu.argparse.Namespace(device="cpu", small=True, budget=10, only=None, host=True, out=out)
    assert gpu.run(options)
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert all(part["status"] == "skipped" and "s were left, it takes" in part["reason"] for part in parts.values())
