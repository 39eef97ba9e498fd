"""The bounded pipeline: results in order, little in flight, errors and early ends clean."""

from __future__ import annotations

import inspect
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from nfq_core import Settings
from nfq_core.checkpoints import convert
from nfq_core.checkpoints import state_dict as state
from nfq_core.fitting import quantizer, trellis
from nfq_core.packed.formats import FORMATS
from nfq_core.packed.layout import BLOCK
from nfq_core.parallel import (
    DEVICE_BYTES,
    IN_FLIGHT_BYTES,
    QUANTIZING_BYTES,
    default_threads,
    fraction_done,
    no_progress,
    ordered_map,
    seconds_left,
    threads_for,
)


def run(work, items, *, size=lambda item: 1, max_in_flight=8, threads=4):
    return ordered_map(work, items, size=size, max_in_flight=max_in_flight, threads=threads)


def test_results_come_in_order_whichever_is_ready_first():
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 4 == 0 else 0)
        return item * item

    assert list(run(slow_first, range(20))) == [n * n for n in range(20)]


def test_nothing_to_do():
    assert list(run(str, [])) == []


def test_there_is_at_least_one_thread():
    assert default_threads() >= 1


def test_work_runs_on_several_threads_at_once():
    barrier = threading.Barrier(3, timeout=10)
    assert len(list(run(lambda _: barrier.wait(), range(3), threads=3))) == 3


@pytest.mark.parametrize(("weight", "most"), [(1, 5), (4, 2), (100, 1)])
def test_items_in_flight_are_bounded(weight, most):
    # A new item is drawn only while those in flight weigh less than 5 in sum.
    drawn = 0
    taken = 0
    widest = 0

    def items():
        nonlocal drawn, widest
        for number in range(20):
            drawn += 1
            widest = max(widest, drawn - taken)
            yield number

    gate = threading.Semaphore(0)

    def work(number: int) -> int:
        gate.acquire()
        return number

    results = run(work, items(), size=lambda _: weight, max_in_flight=5)
    opener = threading.Thread(target=lambda: [(time.sleep(0.002), gate.release()) for _ in range(20)])
    opener.start()
    for number in results:
        assert number == taken
        taken += 1
    opener.join()
    assert taken == 20
    # The item just yielded counts as in flight here until the loop above has seen it.
    assert widest <= most + 1
    assert widest >= min(most, 2)


def test_items_are_drawn_on_the_calling_thread():
    threads = set()

    def items():
        for number in range(3):
            threads.add(threading.get_ident())
            yield number

    list(run(str, items()))
    assert threads == {threading.get_ident()}


def test_the_first_error_ends_everything():
    done = []

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    results = run(work, range(10_000))
    with pytest.raises(ValueError, match="three"):
        list(results)
    assert len(done) < 100


def test_an_error_of_the_items_ends_everything():
    def items():
        yield 1
        raise KeyError("items")

    with pytest.raises(KeyError):
        list(run(str, items()))


@pytest.mark.parametrize("way", ["exhausted", "abandoned", "failed"])
def test_threads_are_gone_and_torch_is_as_before(way):
    before, threads = threading.active_count(), torch.get_num_threads()
    results = run(lambda number: 1 // (number - (3 if way == "failed" else -1)), range(10))
    if way == "exhausted":
        list(results)
    elif way == "abandoned":
        next(results)
        results.close()
    else:
        with pytest.raises(ZeroDivisionError):
            list(results)
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


@pytest.fixture
def three_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_pipelines_leave_torch_as_before(three_torch_threads, first_to_end):
    pipelines = [run(str, range(10)) for _ in range(2)]
    for pipeline in pipelines:
        next(pipeline)
        assert torch.get_num_threads() == 1
    pipelines.pop(first_to_end).close()
    assert torch.get_num_threads() == 1
    assert len(list(pipelines[0])) == 9
    assert torch.get_num_threads() == 3


def test_pipelines_of_several_threads_leave_torch_as_before(three_torch_threads):
    """torch takes a thread's first number from the process's, which a thread sees that starts afterwards."""
    barrier = threading.Barrier(4, timeout=10)

    def pipeline() -> None:
        for number in run(str, range(20)):
            if number == "5":
                barrier.wait()

    threads = [threading.Thread(target=pipeline) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = []
    after = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    after.start()
    after.join()
    assert seen == [3]


def test_a_pipeline_within_another(three_torch_threads):
    assert list(run(lambda number: sum(run(int, range(number))), range(5))) == [0, 0, 1, 3, 6]
    assert torch.get_num_threads() == 3


def test_a_pipeline_is_bounded_unless_told_otherwise():
    assert inspect.signature(ordered_map).parameters["max_in_flight"].default == IN_FLIGHT_BYTES
    gate, drawn = threading.Event(), []

    def items():
        for number in range(10):
            drawn.append(number)
            yield number

    # Three items of a third of the bound fill it; the first must leave before a fourth is drawn.
    results = ordered_map(lambda number: gate.wait(10) and number, items(), size=lambda _: -(-IN_FLIGHT_BYTES // 3))
    threading.Timer(0.05, lambda: (drawn.append("open"), gate.set())).start()
    assert list(results) == list(range(10))
    assert drawn[:5] == [0, 1, 2, "open", 3]


def test_no_progress_shows_nothing(capsys):
    assert no_progress(1, 2, "a") is None
    assert capsys.readouterr() == ("", "")


def test_torch_does_not_spawn_threads_of_its_own_in_the_pool():
    assert set(run(lambda _: torch.get_num_threads(), range(4))) == {1}


@pytest.mark.parametrize(
    ("done", "total", "part", "left"),
    [(0, 0, 1.0, 0.0), (0, 8, 0.0, None), (2, 8, 0.25, 30.0), (8, 8, 1.0, 0.0)],
)
def test_share_and_time_left_by_hand(done, total, part, left):
    """After ten seconds; empty tensors leave `done` at zero, and a file of them alone `total` too."""
    assert fraction_done(done, total) == part and seconds_left(10.0, done, total) == left


@pytest.fixture
def many_processors(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "mps", torch.device("cuda", 0)])
def test_threads_on_a_device_are_as_many_as_its_memory_is_for(many_processors, device):
    assert threads_for(device) * QUANTIZING_BYTES <= DEVICE_BYTES < (threads_for(device) + 1) * QUANTIZING_BYTES
    assert threads_for(device, 2 * DEVICE_BYTES) == 1 and threads_for(device, 1) == 64


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_threads_on_a_cpu_are_one_per_processor(many_processors, device):
    assert threads_for(device) == 64


def test_quantising_bytes_are_those_of_the_largest_search():
    values = 4 * BLOCK * quantizer.DEVICE_CHUNK_BLOCKS
    states = 4 * max(fmt.states for fmt in FORMATS.values() if fmt.window) * quantizer.DEVICE_CHUNK_BLOCKS
    assert trellis.DEVICE_BYTES + 2 * values + 3 * states <= QUANTIZING_BYTES
    assert 6 * values <= QUANTIZING_BYTES


@pytest.mark.parametrize("way", ["file", "state dict", "tensors", "state dict on a device"])
def test_quantising_on_a_device_takes_bounded_memory(many_processors, tmp_path, monkeypatch, way):
    """Whatever the number of processors; the device is a stand-in that counts what its threads hold at once."""
    held, most, lock = 0, 0, threading.Lock()

    def on_device(weight: torch.Tensor, *, device: object, **options: object):
        nonlocal held, most
        with lock:
            held += QUANTIZING_BYTES
            most = max(most, held)
        time.sleep(0.02)
        with lock:
            held -= QUANTIZING_BYTES
        return quantizer.quantize(torch.zeros(weight.shape), **options)

    model = {f"{number}.weight": torch.zeros(32, 32) for number in range(100)}
    monkeypatch.setattr(convert, "quantize", on_device)
    monkeypatch.setattr(state, "quantize", on_device)
    if way == "file":
        save_file(model, tmp_path / "a")
        convert.quantize_file(tmp_path / "a", tmp_path / "b", device="cuda")
    elif way == "state dict":
        state.quantize_state_dict(model, device="cuda")
    elif way == "tensors":
        state.quantize_tensors(state.describe(model), model.__getitem__, Settings(), device="cuda")
    else:
        state.quantize_state_dict({name: weight.to("meta") for name, weight in model.items()})
    assert QUANTIZING_BYTES < most <= DEVICE_BYTES


def test_each_thread_gets_its_number_of_torch_threads_back():
    """Two pipelines in two threads overlap; the first to begin ends first."""
    torch.set_num_threads(2)
    inside, first_ended = threading.Event(), threading.Event()

    def other():
        for _ in run(str, range(2)):
            inside.set()
            first_ended.wait(10)

    thread = threading.Thread(target=other)
    for number in run(str, range(2)):
        if number == "0":
            thread.start()
            inside.wait(10)
    assert torch.get_num_threads() == 2
    first_ended.set()
    thread.join()
    assert torch.get_num_threads() == 2
