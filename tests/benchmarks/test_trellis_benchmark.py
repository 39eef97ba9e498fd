"""The trellis benchmark: goals by hand, every format measured, a missing peer named."""

from __future__ import annotations

from itertools import product
from math import log10
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import peers as quality_peers
from benchmarks.quality import trellis
from benchmarks.quality.peers import Contestant, Stored
from benchmarks.shared import gaussian
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.packed.formats import FORMATS, TRELLIS_IDS, WRITABLE_IDS

PEER_ROWS = {"Q4_K": 4.5, "NF4": 4.125}


def rows_of(decibels: dict[str, float], peers: dict[str, float]) -> list[dict]:
    """Rows in which every format of ours has so many dB at an effort, and every peer 15."""
    ours = [
        {"source": "gaussian", "format": id, "effort": effort, "sqnr_db": decibels[effort]}
        | {"packed_bits_per_weight": 4.0, "seconds_per_million": 0.5}
        for id, effort in product(WRITABLE_IDS, EFFORTS)
    ]
    theirs = [
        {"source": "gaussian", "format": name, "effort": "", "sqnr_db": 15.0, "packed_bits_per_weight": bits}
        for name, bits in peers.items()
    ]
    return ours + theirs


def test_a_mix_of_formats_that_err_alike_errs_as_they_do():
    found = trellis.goals(rows_of({"fast": 20.0, "best": 21.0}, PEER_ROWS))
    assert [(row["peer"], row["peer_bits"], row["effort"]) for row in found] == [
        ("NF4", 4.125, "fast"),
        ("NF4", 4.125, "best"),
        ("Q4_K", 4.5, "fast"),
        ("Q4_K", 4.5, "best"),
    ]
    assert [row["gaussian"]["sqnr_db"] for row in found] == pytest.approx([20, 21, 20, 21])
    assert {row["gaussian"]["peer_db"] for row in found} == {15.0}
    assert all(
        0.99 * limit < row["packed_bits_per_weight"] <= limit
        for row, limit in zip(found[1:3], (3.85, 4.15), strict=True)
    )


def test_the_noise_of_a_mixs_formats_adds_up(monkeypatch):
    """A third of the weights in the second format."""
    shapes = {"a": (128, 64), "b": (64, 64)}
    monkeypatch.setattr(trellis, "tensor_shapes", lambda *_: shapes)
    plans = {name: SimpleNamespace(shape=shape, format="any") for name, shape in shapes.items()}
    monkeypatch.setattr(trellis, "plan_tensors", lambda *_: (None, plans))
    formats = {"a": FORMATS["nf7_b64"], "b": FORMATS["nf32_b64"]}
    monkeypatch.setattr(trellis, "allocate", lambda *_, **__: {name: (fmt, 1.0) for name, fmt in formats.items()})
    rows = rows_of({"fast": 10.0, "best": 10.0}, {"NF4": 4.125})
    rows = [row | {"sqnr_db": 20.0} if row["format"] == "nf32_b64" else row for row in rows]
    # Noise 0.1 of two thirds and 0.01 of one third: 0.07.
    assert [row["gaussian"]["sqnr_db"] for row in trellis.goals(rows)] == pytest.approx([-10 * log10(0.07)] * 2)


def test_every_format_is_measured_at_both_efforts_and_missing_peers_are_named(monkeypatch, capsys):
    pytest.importorskip("numba")

    def store(weight: torch.Tensor) -> Stored:
        return Stored(0.9 * weight, weight.numel(), weight.numel())

    names = ("Q8_0", "Q4_K")
    families = {
        "GGUF": ("torch", lambda: [Contestant(name, "GGUF", store) for name in names]),
        "bitsandbytes": ("no_such_package", list),
    }
    monkeypatch.setattr(quality_peers, "PACKAGES", families)
    for name, value in (("SHAPE", (8, 64)), ("TIMED_BLOCKS", 2), ("ROUNDS", 1), ("WINDOWS", (8,))):
        monkeypatch.setattr(trellis, name, value)
    monkeypatch.setattr(trellis, "random_weights", lambda *shapes: {"gaussian": gaussian((8, 64), 1)})
    monkeypatch.setattr(
        trellis, "model_layers", lambda path: [("a", gaussian((64, 64), 2)), ("b", gaussian((64, 64), 3))]
    )
    threads = torch.get_num_threads()
    try:
        results = trellis.run()
    finally:
        torch.set_num_threads(threads)
    measured = {(row["format"], row["effort"]) for row in results["rows"]}
    # Q8_0 is not among the peers compared.
    plain = product(TRELLIS_IDS, [trellis.PLAIN])
    assert measured == {*product(WRITABLE_IDS, EFFORTS), *plain, ("Q4_K", "")}
    assert {row["peer"] for row in results["goals"]} == {"Q4_K"}
    assert [(row["peer"], row["effort"]) for row in results["demo"]] == [("Q4_K", effort) for effort in EFFORTS]
    assert all(row["packed_bits_per_weight"] <= 4.15 for row in results["demo"])
    assert results["decode_billions_per_second"].keys() == set(WRITABLE_IDS)
    assert results["skipped"] == {"bitsandbytes": "no_such_package is not installed"}
    assert "bitsandbytes is left out: no_such_package is not installed" in capsys.readouterr().out
