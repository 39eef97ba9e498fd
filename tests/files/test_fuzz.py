"""A few hundred of the mutated files of `tests/slow/fuzz.py`, the same every time, drawn by hypothesis."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from forging import Draft
from golden.make import paths
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trial import Fault, Trials, by_the_document, try_container

import nfq_core

trials = pytest.fixture(scope="module")(lambda tmp_path_factory: Trials(tmp_path_factory.mktemp("fuzz")))


@settings(derandomize=True, max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_file_is_read_right_or_refused(trials: Trials, rng: Random) -> None:
    trials.draw(rng).run()


def test_most_mutations_get_past_the_checksums(trials: Trials) -> None:
    """A fuzzer all of whose files are refused at the door would find nothing."""
    told: list[tuple[str, str]] = []
    for number in range(200):
        attempt = trials.draw(Random(number))
        told.append((attempt.kind, attempt.run()))
    assert told.count(("container", "loaded")) >= 10
    assert {kind for kind, _ in told} == set(Trials.KINDS)


WRONG_READERS = {
    "other numbers": lambda tensors: tensors["weight"].data.bitwise_xor_(1) is None or tensors,
    "nothing": lambda tensors: {},
    "another error": lambda tensors: 1 / 0,
    "a refusal": lambda tensors: nfq_core.NFQFile("nowhere"),
}


@pytest.mark.parametrize("wrong", WRONG_READERS.values(), ids=WRONG_READERS)
def test_a_reader_that_is_wrong_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    path = tmp_path / "a"
    path.write_bytes(Draft.of(paths("nf16_b64")[0].read_bytes()).data())
    wanted = by_the_document(path)
    assert try_container(path, wanted, tmp_path) == "loaded"
    load = nfq_core.load
    monkeypatch.setattr(nfq_core, "load", lambda path: wrong(load(path)))
    with pytest.raises(Fault):
        try_container(path, wanted, tmp_path)
