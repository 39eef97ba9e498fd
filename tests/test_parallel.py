"""The bounded pipeline: results in order, little in flight, errors and early ends clean."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from nfq_core.parallel import default_threads, ordered_map


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


def test_torch_does_not_spawn_threads_of_its_own_in_the_pool():
    assert set(run(lambda _: torch.get_num_threads(), range(4))) == {1}
