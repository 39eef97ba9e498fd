"""SDXL's table of sensitivities, and the output predicted with it."""

from __future__ import annotations

import json
from math import log10

import pytest

from benchmarks.quality import sdxl_sensitivities
from benchmarks.quality.prediction import (
    ALIKE,
    ONE_FORMAT,
    SIZES,
    predictions,
    quantized_shapes,
    sizes,
    table,
    uniform_output_db,
)
from benchmarks.quality.prediction import sdxl_sensitivities as sensitivities
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.models.sensitivities import BY_BLOCK, BY_LAYER, BY_ROLE, SDXL_SENSITIVITIES


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return predictions()


def test_the_table_by_hand() -> None:
    layers = {"conv_in": "35.06", "time_embedding.linear_1": "20", "up_blocks.2.resnets.2.conv2": "34.80"}
    made = sdxl_sensitivities.table({"layer": name, "output_db_weight_4bit": db} for name, db in layers.items())
    assert made["decibels"] == {"conv_in": -18.1, "up_blocks.2.resnets.2.conv2": -17.8}
    shipped = json.loads(SDXL_SENSITIVITIES.read_text("utf-8"))
    assert shipped["source"] == made["source"] and shipped["unit"] == made["unit"]
    assert made["decibels"].items() <= shipped["decibels"].items() and len(shipped["decibels"]) == 773


def test_the_goals_are_reached(rows: list[dict]) -> None:
    assert len(rows) == 8
    for row in rows:
        own = row["choices"][BY_LAYER]
        assert own["packed"] <= row["bits"] and own["db"] >= row["goal"]


def test_what_is_known_better_predicts_a_better_output(rows: list[dict]) -> None:
    for row in rows:
        found = [row["choices"][name]["db"] for name in (ALIKE, BY_ROLE, BY_BLOCK, BY_LAYER)]
        assert found == sorted(found)
        assert row["choices"][ONE_FORMAT]["packed"] <= row["bits"]


def test_one_noise_for_all_weights_by_hand() -> None:
    own = sensitivities(quantized_shapes())[BY_LAYER]
    assert uniform_output_db(23.0, own) == pytest.approx(23 - 10 * log10(sum(own.values.values())))
    # SDXL.md's table of formats everywhere: 31.4 dB of output at 23.43 dB of weights.
    assert uniform_output_db(23.43, own) == pytest.approx(31.4, abs=0.1)


def test_the_table_in_the_page(rows: list[dict]) -> None:
    lines = table({"rows": rows}).splitlines()
    assert len(lines) == 10 and lines[2].startswith("| fast | 2.8 |")


def test_more_bits_predict_a_better_output() -> None:
    found = sizes(quantized_shapes())
    for effort in EFFORTS:
        own = [size for size in found if size["effort"] == effort]
        assert len(own) == len(SIZES)
        assert all(size["packed"] <= bits for size, bits in zip(own, SIZES, strict=True))
        assert [size["db"] for size in own] == sorted(size["db"] for size in own)
