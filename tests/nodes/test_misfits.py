"""LoRA patches that do not fit: skipped, logged once per load and not at each step; with a stand-in for the host.

`tests/host/test_patches.py` compares with the real host.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stub_lora import KEY, ROOT, Adapter, Failing, patch


def fitting(value: float = 1.0) -> tuple:
    return patch(Adapter(torch.full((4, 1), value), torch.ones(1, 6)))


def of_another_base() -> tuple:
    return patch(Adapter(torch.ones(4, 1), torch.ones(1, 5)))


@pytest.mark.parametrize("resident", [True, False])
def test_a_lora_of_another_base_is_skipped_and_logged_once_a_load(lora, caplog, resident: bool) -> None:
    misfits = lora.Misfits()
    misfits.start()
    layers = [
        lora.WeightPatch(f"{number}.weight", [fitting(), of_another_base(), fitting(2.0)], (4, 6), misfits)
        for number in range(3)
    ]
    misfits.report()
    for _ in range(5):
        for layer in layers:
            assert torch.equal(layer(torch.zeros(4, 6)), torch.full((4, 6), 3.0))
    misfits.report()
    (line,) = caplog.messages
    assert line.startswith("3 LoRA patches do not fit this model and are skipped") and "0.weight" in line
    assert caplog.records[0].levelno == logging.ERROR and caplog.records[0].name == "nfq"
    # Without the misfit, its neighbours are one operation.
    assert len(layers[0]._steps(torch.device("cpu"), torch.float32)) == 1


def test_the_next_load_logs_again(lora, caplog) -> None:
    misfits = lora.Misfits()
    for _ in range(2):
        misfits.start()
        lora.WeightPatch(KEY, [of_another_base()], (4, 6), misfits)
        misfits.report()
    assert len(caplog.messages) == 2


def test_hooks_are_logged_once_however_often_they_switch(lora, caplog) -> None:
    misfits, hook = lora.Misfits(), of_another_base()
    misfits.start()
    for _ in range(4):
        weight = lora.HookPatch(KEY, [hook], (4, 6), misfits)(torch.zeros(4, 6))
        assert not weight.any()
        misfits.report()
    assert len(caplog.messages) == 1


def test_a_difference_of_another_shape(lora, caplog) -> None:
    misfits = lora.Misfits()
    layer = lora.WeightPatch(
        KEY, [patch((torch.ones(4, 6),), 0.5), patch((torch.ones(5, 6),)), of_another_base()], (4, 6), misfits
    )
    misfits.report()
    for _ in range(3):
        assert torch.equal(layer(torch.zeros(4, 6)), torch.full((4, 6), 0.5))
    (line,) = caplog.messages
    assert line.startswith("2 LoRA patches") and "SHAPE MISMATCH" in line


def test_a_failure_at_the_first_step_is_logged_once_and_dropped(lora, caplog) -> None:
    """The host's own line is shown once; the next steps do not try again."""
    misfits, failing = lora.Misfits(), Failing(ValueError("singular"))
    layer = lora.WeightPatch(KEY, [patch(failing), fitting()], (4, 6), misfits, resident=True)
    misfits.report()
    assert not caplog.messages
    for _ in range(3):
        assert torch.equal(layer(torch.zeros(4, 6)), torch.ones(4, 6))
        failing.error = AssertionError("tried again")
        misfits.report()
    assert caplog.messages == [f"ERROR lora {KEY} singular"]


def test_a_patch_that_scales_the_weight_before_it_fails_stays(lora, caplog) -> None:
    """As in a merge: the host scales, then logs."""
    misfits = lora.Misfits()
    layer = lora.WeightPatch(KEY, [patch((torch.ones(5, 6),), 1.0, 0.25)], (4, 6), misfits)
    misfits.report()
    for _ in range(3):
        assert torch.equal(layer(torch.ones(4, 6)), torch.full((4, 6), 0.25))
    assert len(caplog.messages) == 1


def test_a_patch_with_a_function_is_not_tried_without_data(lora, caplog) -> None:
    calls = []
    odd = patch(Adapter(torch.ones(4, 1), torch.ones(1, 6), "special"), function=lambda x: calls.append(x) or 2 * x)
    misfits = lora.Misfits()
    layer = lora.WeightPatch(KEY, [odd], (4, 6), misfits)
    misfits.report()
    assert not calls
    assert torch.equal(layer(torch.zeros(4, 6)), torch.full((4, 6), 2.0))
    assert not caplog.messages


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_missing_memory_ends_the_run(lora, caplog, error: Exception) -> None:
    """If it were logged and skipped, one step of a picture would lack its LoRA."""
    layer = lora.WeightPatch(KEY, [patch(Failing(error))], (4, 6), lora.Misfits())
    with pytest.raises(torch.cuda.OutOfMemoryError, match="memory"):
        layer(torch.zeros(4, 6))
    assert not caplog.messages


def test_log_lines_of_other_threads_are_unaffected(lora, caplog) -> None:
    def shout(x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ROOT.warning, "from elsewhere").result()
        return x

    odd = patch(Adapter(torch.ones(4, 1), torch.ones(1, 6), "special"), function=shout)
    layer = lora.WeightPatch(KEY, [odd], (4, 6), lora.Misfits())
    for _ in range(2):
        layer(torch.zeros(4, 6))
    assert caplog.messages == ["from elsewhere"] * 2
    assert not ROOT.filters


def test_adapters_compute_in_fp32(lora, monkeypatch) -> None:
    """As when the host loads a dense model; OFT fails in fp16."""
    dtypes = []

    def note(patches, weight, key, intermediate_dtype=torch.float32, original_weights=None):
        dtypes.append(intermediate_dtype)
        return weight

    monkeypatch.setattr(sys.modules["comfy.lora"], "calculate_weight", note)
    odd = patch(Adapter(torch.ones(4, 1), torch.ones(1, 6), "special"), function=lambda x: x)
    lora.WeightPatch(KEY, [odd], (4, 6), lora.Misfits())(torch.zeros(4, 6, dtype=torch.float16))
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("shapes", [((), (1, 6)), ((4, 1), ()), ((4,), (6,)), ((4, 0), (0, 6))])
def test_odd_factors_are_left_to_the_host(lora, shapes: tuple) -> None:
    """Factors with too few dimensions or rank 0 never reach our own arithmetic."""
    up, down = (torch.ones(shape) for shape in shapes)
    layer = lora.WeightPatch(KEY, [patch(Adapter(up, down))], (4, 6), lora.Misfits())
    assert not layer(torch.zeros(4, 6)).any()
