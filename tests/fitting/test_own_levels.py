"""When levels of its own pay for a tensor."""

from __future__ import annotations

import pytest

from nfq_core.fitting.own_levels import SMALL_TENSOR_MARGIN_DB, own_levels_pay
from nfq_core.packed.formats import format_by_id
from nfq_core.packed.layout import OWN_LEVELS_FROM


@pytest.mark.parametrize("weights", [4096, OWN_LEVELS_FROM - 1, OWN_LEVELS_FROM, 10**7])
@pytest.mark.parametrize("format_id", ["t4w8_b64", "t6w9_b64", "nf256_b64"])
def test_they_must_gain_what_their_table_costs_and_more_in_a_small_tensor(format_id, weights):
    fmt = format_by_id(format_id)
    # A bit per weight halves the error's root: 6.0206 dB.
    needed = 6.0206 * 16 * fmt.levels / weights + (SMALL_TENSOR_MARGIN_DB if weights < OWN_LEVELS_FROM else 0)
    for gain, pays in ((needed - 0.01, False), (needed + 0.01, True)):
        assert own_levels_pay(1.0, 10 ** (gain / 10), fmt, weights) is pays


def test_exact_levels_pay_unless_the_common_ones_are_exact_too():
    fmt = format_by_id("t4w8_b64")
    assert own_levels_pay(0.0, 1e-9, fmt, 64)
    assert not own_levels_pay(0.0, 0.0, fmt, 10**6)
