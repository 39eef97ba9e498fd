"""The decode benchmark without the peers' packages."""

from __future__ import annotations

from benchmarks.speed import decode
from nfq_core.packed.formats import LEVELS


def test_missing_peers_are_left_out_and_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(decode, "SHAPE", (8, 640))
    # torch plays an installed package.
    peers = {"here": ("torch", decode.copied), "missing": ("no_such_package", decode.copied)}
    monkeypatch.setattr(decode, "PEERS", peers)
    results = decode.run(1)
    assert results["skipped"] == {"missing": "no_such_package is not installed"}
    assert "missing is left out: no_such_package is not installed" in capsys.readouterr().out
    for found in results["nanoseconds_per_weight"].values():
        assert found.keys() == {"copy", "here", *(f"nf{levels}" for levels in LEVELS)}
