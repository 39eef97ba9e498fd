"""Patches in the real host: forced hooks with LoRAs; LoRAs for another base model; log lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphs import DENSE, OURS, lora, sample
from models import KINDS, NARROW, random_adapter
from safetensors.torch import save_file

MODEL = ["model", 0]
SKIPPED = "LoRA patches do not fit this model and are skipped"
HOST_LINE = ("ERROR", "WARNING SHAPE MISMATCH")


def with_loras(*names: str) -> dict:
    """Our loader and the dense one, each followed by LoRAs of these names, ending in `ours` and `wanted`."""
    prompt = {"model": OURS, "dense": DENSE}
    for end, last in (("ours", "model"), ("wanted", "dense")):
        for number, name in enumerate(names):
            node = end if number == len(names) - 1 else f"{end} {number}"
            prompt[node] = lora(name, 0.7, [last, 0])
            last = node
    return prompt


def for_another_width(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter as trained for a model whose layers have fewer inputs."""
    narrow = ("lora_down.weight", "hada_w1_b", "hada_w2_b", "lokr_w2")
    return {key: value[:, :-8].contiguous() if key.endswith(narrow) else value for key, value in adapter.items()}


@pytest.fixture(params=[*KINDS, "diff"])
def misfit(request, base: Path) -> str:
    """The name of a LoRA file that does not fit the tests' model."""
    if request.param == "diff":
        fitting = random_adapter(NARROW, "lora", 9)
        names = {key.rpartition(".lora_")[0] for key in fitting if ".lora_" in key}
        tensors = {f"{name}.diff": torch.ones(3, 5) for name in names}
    else:
        tensors = for_another_width(random_adapter(NARROW, request.param, 9))
    path = base / "models" / "loras" / f"misfit-{request.param}.safetensors"
    save_file(tensors, path)
    yield path.stem
    path.unlink()


def test_forced_hooks_with_a_lora(host) -> None:
    """Every state of loading and every group of forced hooks gives the result of the fully loaded dense model."""
    facts = host.check("forced_hooks", with_loras("locon"), model=["ours", 0], other=["wanted", 0])
    assert min(facts["hooks"]) > 1e-3
    assert len(facts["differences"]) == 10
    for state, difference in facts["differences"].items():
        assert difference <= 2e-4, state
    assert facts["most functions"] == 2
    assert facts["left functions"] == [0, 0]


def test_hooks_of_a_packed_text_encoder(host) -> None:
    """Loaded and encoded by the host: with a LoRA alone, with forced and scheduled hooks, and without them again."""
    facts = host.check("clip_hooks", {})
    assert facts["packed"] == 13
    assert facts["lora"] > 1e-2 and facts["hooks"] > 1e-2
    assert facts["counts"]["scheduled"] == 2 * facts["counts"]["hooks"]
    for name, difference in facts["differences"].items():
        assert difference <= 2e-4, name
    assert facts["left"] == 0


def test_a_lora_of_another_base_is_logged_once(host, misfit: str) -> None:
    """The latents equal the stock path's, with one log line instead of one line per patch."""

    def run(end: str) -> tuple[torch.Tensor, list[str]]:
        before = host.log.stat().st_size
        latent = host.latent(sample(with_loras("lora", misfit, "locon"), [end, 0], steps=3))
        lines = host.log.read_text(errors="replace").encode()[before:].decode(errors="replace").splitlines()
        return latent, [line for line in lines if any(known in line for known in (*HOST_LINE, SKIPPED))]

    dense, stock_lines = run("wanted")
    ours, lines = run("ours")
    assert len(stock_lines) > 10
    (line,) = lines
    assert f"{len(stock_lines)} {SKIPPED}" in line
    assert (ours - dense).abs().max() <= 2e-4 * dense.abs().max()


def test_a_hook_of_another_base_is_logged_once(host, base) -> None:
    path = base / "models" / "loras" / "misfit-hook.safetensors"
    save_file(for_another_width(random_adapter(NARROW, "lora", 9)), path)
    nodes = {
        "model": OURS,
        "hook": {"class_type": "CreateHookLoraModelOnly", "inputs": {"lora_name": path.name, "strength_model": 1.0}},
        "hooked": {
            "class_type": "ConditioningSetProperties",
            "inputs": {"cond_NEW": ["positive", 0], "strength": 1.0, "set_cond_area": "default", "hooks": ["hook", 0]},
        },
    }
    plain = host.latent(sample({"model": OURS}, MODEL, steps=3))
    before = host.log.read_text(errors="replace")
    hooked = host.latent(sample(nodes, MODEL, steps=3, positive=["hooked", 0]))
    new = host.log.read_text(errors="replace")[len(before) :]
    path.unlink()
    (line,) = [line for line in new.splitlines() if any(known in line for known in (*HOST_LINE, SKIPPED))]
    assert SKIPPED in line
    assert (hooked - plain).abs().max() <= 2e-4 * plain.abs().max()


def test_misfits_in_every_state_of_loading(host, base) -> None:
    """One log line per load and none per step; the host plans no memory for skipped factors."""
    path = base / "models" / "loras" / "misfit.safetensors"
    save_file(for_another_width(random_adapter(NARROW, "dora", 9)), path)
    facts = host.check("misfits_in_states", with_loras("lora", "misfit"), model=["ours", 0], other=["wanted", 0])
    path.unlink()
    fitting = host.check("misfits_in_states", with_loras("lora"), model=["ours", 0], other=["wanted", 0])
    assert facts["dense"] and not fitting["dense"]
    for state, lines in facts["lines"].items():
        loads = state in ("loaded", "loaded again", "partial")
        assert len(lines) == loads, (state, lines)
        assert all(line.startswith(f"{len(facts['dense'])} {SKIPPED}") for line in lines)
        assert facts["differences"][state] <= 2e-4, state
        assert not fitting["lines"][state], state
    assert facts["factors"] == fitting["factors"] and fitting["factors"][0] > 0


def test_adapters_in_half_precision(host) -> None:
    """Adapters give the stock path's result on an fp16 weight; adapters that fail there are logged once, as there."""
    for name, adapter in host.check("half_precision_adapters", {}).items():
        assert adapter["difference"] == 0, name
        assert adapter["lines"] == adapter["stock lines"], name
        assert adapter["change"] > 1e-3 or adapter["lines"], name
