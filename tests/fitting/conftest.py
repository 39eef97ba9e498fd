"""Both ways in which codes are searched."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["numba", "torch"])
def backend(request, monkeypatch) -> str:
    """Compiled loops, and plain torch."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("NFQ_BACKEND", {"numba": "", "torch": "torch"}[request.param])
    return request.param
