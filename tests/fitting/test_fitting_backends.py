"""Which code searches for trellis codes, and why."""

from __future__ import annotations

import builtins
import sys

import pytest
import torch
from samples import gaussian

from nfq_core import quantize
from nfq_core.fitting import trellis_numba
from nfq_core.fitting.backends import search_backend, trellis_coder
from nfq_core.fitting.trellis import TrellisCoder
from nfq_core.fitting.trellis_fit import OtherScales, gaussian_trellis, other_scales
from nfq_core.packed.formats import format_by_id

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_again():
    """The obstacle is looked for once a process."""
    trellis_numba.obstacle.cache_clear()
    yield
    trellis_numba.obstacle.cache_clear()


@pytest.fixture
def broken_import(monkeypatch):
    """Makes `import numba` raise the given error."""

    def broken(error: Exception) -> None:
        original = builtins.__import__

        def importing(name, *arguments, **keywords):
            if name == "numba":
                raise error
            return original(name, *arguments, **keywords)

        monkeypatch.delitem(sys.modules, "numba", raising=False)
        monkeypatch.setattr(builtins, "__import__", importing)

    return broken


def test_numba_is_used_where_it_is_installed():
    pytest.importorskip("numba")
    assert search_backend(CPU) == ("numba", "loops compiled for this processor")
    fmt = format_by_id("t4w8_b64")
    assert isinstance(trellis_coder(gaussian_trellis(fmt).levels, fmt, CPU), trellis_numba.CompiledCoder)
    small, large = (other_scales("best", fmt, weights, CPU) for weights in (1 << 16, 1 << 20))
    assert (small.count, large.count) == (16, 6)
    assert other_scales("fast", fmt, 1 << 20, CPU) == OtherScales() and OtherScales().count == 2


def test_plain_torch_by_request(monkeypatch):
    monkeypatch.setenv("NFQ_BACKEND", "torch")
    assert search_backend(CPU) == ("torch", "requested by NFQ_BACKEND=torch")
    fmt = format_by_id("t4w8_b64")
    assert type(trellis_coder(gaussian_trellis(fmt).levels, fmt, CPU)) is TrellisCoder
    assert other_scales("best", fmt, 1 << 20, CPU) == OtherScales()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("No module named 'numba'"), f"numba is not installed ({sys.executable} -m pip install numba)"),
        (
            SystemError("Numba needs NumPy 2.3 or less.\nGot 2.9."),
            "numba cannot be used: Numba needs NumPy 2.3 or less. Got 2.9.",
        ),
    ],
)
def test_a_missing_or_broken_numba_leaves_plain_torch(broken_import, error, reason):
    broken_import(error)
    assert search_backend(CPU) == ("torch", reason)
    assert quantize(gaussian(64, 64), format="t3w8_b64", effort="best").format.id == "t3w8_b64"


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_other_devices_use_plain_torch_and_try_other_scales(device):
    name, reason = search_backend(torch.device(device))
    assert name == "torch" and device in reason
    assert other_scales("best", format_by_id("t4w8_b64"), 1 << 20, torch.device(device)).steps
