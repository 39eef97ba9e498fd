"""The quality benchmark: the peers' code against known vectors, figures, mixes and checks by hand."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import pytest
import torch
from samples import random_half, random_weight

from benchmarks import shared as report
from benchmarks.quality import __main__ as quality
from benchmarks.quality import ggml
from benchmarks.quality import peers as quality_peers
from benchmarks.quality import plot as quality_plot
from benchmarks.quality import weights as quality_weights
from benchmarks.quality.checks import checks, left_of
from benchmarks.quality.checks import table as quality_table
from benchmarks.quality.peers import Contestant, Stored
from benchmarks.quality.weights import Layer, figures, row
from nfq_core.errors import NFQError
from nfq_core.packed.formats import FORMATS, WRITABLE_IDS


def needs(package: str) -> None:
    reason = report.unavailable(package)
    if reason:
        pytest.skip(reason)


def point(name: str, bits: float, db: float, *, source: str = "s", **more: object) -> dict:
    values = {"bits_per_weight": bits, "packed_bits_per_weight": bits, "sqnr_db": db}
    return row(source, name, more.pop("family", "NFQ"), calibrated=more.pop("calibrated", False), **values | more)


def test_q8_0_by_hand():
    needs("xllamacpp")
    weight = torch.zeros(2, 20)
    weight[0, :4] = torch.tensor([127.0, 1.0, -63.4, 0.4])
    decoded, nbytes = ggml.round_trip(weight, "Q8_0")
    # Blocks of 32 share a scale of largest ÷ 127: here 1, and 0 for the second block, of eight weights and 24 zeros.
    assert decoded[0, :4].tolist() == [127, 1, -63, 0]
    assert not decoded[0, 4:].any() and not decoded[1].any()
    assert nbytes == 2 * (2 + 32)


@pytest.mark.parametrize(("name", "bits"), [("Q2_K", 2.625), ("Q3_K", 3.4375), ("Q4_K", 4.5), ("IQ4_XS", 4.25)])
def test_k_quants_take_any_shape_and_count_their_padding(name, bits):
    needs("xllamacpp")
    weight = random_weight(4, 32, 3, 3)
    decoded, nbytes = ggml.round_trip(weight, name)
    assert decoded.shape == weight.shape
    assert nbytes == 5 * 256 * bits / 8
    whole = ggml.round_trip(weight.view(-1)[:1024], name)[0]
    assert torch.equal(decoded.view(-1)[:1024], whole)


def test_an_importance_matrix_spares_what_counts():
    needs("xllamacpp")
    weight = random_weight(64, 96)
    importance = torch.ones(96)
    importance[::3] = 100.0
    plain, weighed = (ggml.round_trip(weight, "Q3_K", given)[0] for given in (None, importance))
    errors = [((decoded - weight).square() * importance).mean().item() for decoded in (plain, weighed)]
    assert errors[1] < 0.9 * errors[0]


def test_blocks_of_one_phase_begin_at_the_same_column():
    importance = torch.arange(96.0)
    phases = ggml._phases(7, 256, importance)
    assert [(chosen.start, chosen.step) for chosen, _ in phases] == [(0, 3), (1, 3), (2, 3)]
    assert [matrix[0].item() for _, matrix in phases] == [0, 256 % 96, 512 % 96]
    assert phases[0][1][95:97].tolist() == [95, 0]


def test_other_types_of_a_library_are_refused(monkeypatch):
    needs("xllamacpp")
    ggml.library.cache_clear()
    monkeypatch.setitem(ggml.TYPES, "Q4_K", 13)
    with pytest.raises(RuntimeError, match="type 13 is q5_K, Q4_K was expected"):
        ggml.library()
    ggml.library.cache_clear()


def test_nf4_of_its_own_levels_is_exact():
    needs("bitsandbytes")
    contestant = quality_peers.PACKAGES["bitsandbytes"][1]()[0]
    # Blocks whose largest magnitudes are equal: their scales are quantised without loss.
    weight = torch.tensor([1.0, -1.0, 0.0, 0.0]).repeat(64, 64)
    made = contestant.store(weight)
    assert torch.equal(made.weight.float(), weight)
    # Codes, a byte for each block's scale, 4 bytes for each 256 of these, and their mean.
    assert made.packed_bytes == made.disk_bytes == 64 * 256 // 2 + 256 + 4 + 4


@pytest.mark.parametrize("family", ["HQQ", "SDNQ"])
def test_equal_steps_are_exact(family):
    package, make = quality_peers.PACKAGES[family]
    needs(package)
    contestant = next(one for one in make() if "4" in one.name)
    weight = torch.arange(16.0).repeat(128, 8)
    made = contestant.store(weight)
    assert made.weight.shape == weight.shape
    assert (made.weight.float() - weight).abs().max() < 0.02
    assert 8 * made.packed_bytes / weight.numel() >= 4.25


def test_rotated_types_are_near_and_other_layers_stay():
    """Of 48 columns 16 are rotated together; 40 columns fit no rotation."""
    package, make = quality_peers.PACKAGES["comfy-kitchen"]
    needs(package)
    floors = {"W4A8": 20.0, "int8 ConvRot": 38.0}
    for contestant in make():
        weight = random_half(64, 48)
        assert Layer.of(weight, contestant.store(weight)).sqnr_db > floors[contestant.name]
        other = random_half(64, 40)
        made = contestant.store(other)
        assert torch.equal(made.weight, other) and made.packed_bytes == 2 * other.numel()


def test_int8_per_tensor_by_hand():
    contestant = quality_peers.PACKAGES["torch"][1]()[0]
    made = contestant.store(torch.tensor([[127.5, 1.0, -3.4, 0.2]]))
    # The scale is largest ÷ 127.5: 1.
    assert made.weight.tolist() == [[127, 1, -3, 0]]


def test_palettes():
    values = torch.tensor([-1.0, -0.5, 0.25, 2.0])
    weight = values.repeat(8, 4)
    made = quality_peers.palette(weight, 2)
    assert torch.equal(made.weight.float(), weight)
    assert made.packed_bytes == 128 * 2 // 8 + 2 * 4
    gaussian = random_half(1 << 16)
    # Lloyd and Max: 9.30, 14.62 and 20.22 dB for a Gaussian source.
    for bits, wanted in ((2, 9.30), (3, 14.62), (4, 20.22)):
        assert Layer.of(gaussian, quality_peers.palette(gaussian, bits)).sqnr_db == pytest.approx(wanted, abs=0.1)


def test_peers_that_are_missing_say_so(monkeypatch):
    monkeypatch.setattr(quality_peers, "unavailable", lambda package: f"{package} is not installed")
    contestants, skipped = quality_peers.peers()
    assert skipped == {family: f"{package} is not installed" for family, (package, _) in quality_peers.PACKAGES.items()}
    assert {one.family for one in contestants} == {"article", "palettisation"}


def test_a_peer_that_changed_is_left_out_with_a_reason(monkeypatch):
    def make() -> list:
        raise AttributeError("no such function")

    monkeypatch.setattr(quality_peers, "PACKAGES", {"GGUF": ("torch", make)})
    assert quality_peers.peers()[1] == {"GGUF": "torch is not as expected (AttributeError: no such function)"}


def test_figures_by_hand():
    layers = [Layer(300, 150, 160, 10.0), Layer(100, 50, 60, 20.0)]
    found = figures(layers)
    assert found["bits_per_weight"] == 4
    assert found["packed_bits_per_weight"] == pytest.approx(4.4)
    # Noise 0.1 of three quarters and 0.01 of one: 0.0775.
    assert found["sqnr_db"] == pytest.approx(11.107, abs=1e-3)
    assert figures([Layer(1, 1, 1, math.inf)])["sqnr_db"] is None


def test_a_model_is_measured_layer_by_layer(tmp_path, capsys):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {f"{number}.weight": torch.randn(64, 64, generator=generator).half() for number in range(4)}
    tensors["2.weight"][0, 0] = float("nan")
    tensors["norm"] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors")
    layers = list(quality_weights.model_layers(tmp_path / "model.safetensors"))
    assert [key for key, _ in layers] == ["0.weight", "1.weight", "2.weight", "3.weight"]
    contestants = [one for one in quality_peers.our_formats("fast") if one.name.startswith("nf")]
    found, shapes = quality_weights.measure_layers(layers, contestants)
    assert list(shapes) == ["0.weight", "1.weight", "3.weight"]
    assert "2.weight is left out: it holds NaN or Inf" in capsys.readouterr().out
    assert {len(of_one) for of_one in found.values()} == {3}
    save_file({"norm": torch.ones(64)}, tmp_path / "none.safetensors")
    with pytest.raises(NFQError, match="no weights to quantise"):
        list(quality_weights.model_layers(tmp_path / "none.safetensors"))


def test_a_mix_takes_what_was_measured_and_keeps_its_size():
    shapes = {"a": (64, 64), "b": (128, 64)}
    measured = {
        id: {key: Layer(rows * 64, 0, FORMATS[id].packed_bytes(rows * 64), 0.0) for key, (rows, _) in shapes.items()}
        for id in WRITABLE_IDS
    }
    chosen = quality_weights.mix(measured, shapes, 5.0, "fast")
    assert chosen is not None and list(chosen) == ["a", "b"]
    assert sum(layer.packed_bytes for layer in chosen.values()) * 8 <= 5.0 * 3 * 64 * 64
    assert quality_weights.mix(measured, shapes, 0.5, "fast") is None


def test_mixes_are_of_one_effort_each():
    contestants = quality_peers.our_formats("fast") + quality_peers.our_formats("best")
    shapes = {"a": (64, 64), "b": (128, 64)}
    found = {
        one.name: {
            key: Layer(
                rows * 64, 0, FORMATS[one.format].packed_bytes(rows * 64), 20.0 if one.effort == "best" else 10.0
            )
            for key, (rows, _) in shapes.items()
        }
        for one in contestants
    }
    rows = quality_weights.mix_rows("s", contestants, found, shapes)
    fast, best = ([row for row in rows if row["name"].endswith(", best") == kind] for kind in (False, True))
    assert [row["sqnr_db"] for row in fast] == pytest.approx([10.0] * len(fast))
    assert [row["sqnr_db"] for row in best] == pytest.approx([20.0] * len(best))
    assert fast[0]["name"].startswith("mix ") and fast[0]["ours"]
    # Where the largest format is everywhere, more bits make no other mix.
    assert len({row["packed_bits_per_weight"] for row in fast}) == len(fast)


PEERS = [
    point("Q4_K", 4.5, 23.0, family="GGUF", output_db=27.0, picture_db=None),
    point("Q3_K", 3.44, 16.4, family="GGUF"),
    point("NF4", 4.13, 20.7, family="bitsandbytes"),
    point("article 16", 4.1, 20.9, family="article", output_db=24.0),
]


def test_floors():
    ours = [
        point("t4", 4.14, 23.2),
        point("t3", 3.16, 17.0),
        point("mix", 3.8, 20.5),
    ]
    found = {line["peer"]: line for line in checks([*PEERS, *ours], []) if line["measure"] == "weights"}
    assert found["Q4_K"]["met"] is True and found["Q4_K"]["ours"] == "t4"
    assert found["Q4_K"]["gain_db"] == pytest.approx(0.2)
    # At ≤ 3.15 bits there is none of ours.
    assert found["Q3_K"]["met"] is False and found["Q3_K"]["ours"] is None
    assert found["NF4"]["met"] is False and found["NF4"]["gain_db"] == pytest.approx(-0.2)
    # A peer that was not measured is neither.
    assert found["Q5_K"]["met"] is None


def test_the_tables_show_the_figures():
    rows = [*PEERS, point("mix", 3.8, 20.5), point("size 4.1, calibrated", 4.1, 21.0, calibrated=True, sqnr_db=None)]
    results = {"rows": rows, "checks": checks(rows, []), "left_of": left_of(rows), "skipped": {}}
    text = quality_table(results)
    assert (
        "| s | weights: as good as NF4 at ≤ 3.85 bits | 20.70 dB at 4.13 | mix: 20.50 dB at 3.80 | -0.20 | **no** |"
        in text
    )
    assert "| **mix** | 3.800 | 3.800 | 20.50 |" in text
    assert "| **size 4.1, calibrated** | 4.100 | 4.100 | – |" in text


def test_calibrated_promises():
    ours = [
        point("size 4.1", 4.1, 22.0, output_db=26.0),
        point("size 4.1, calibrated", 4.1, 21.0, output_db=30.5, picture_db=40.0, calibrated=True),
    ]
    rows = [*PEERS, *ours]
    found = [line for line in checks(rows, ["article 16"]) if line["measure"] == "output"]
    assert [(line["peer"], line["met"], line["ours"]) for line in found] == [
        ("Q4_K", True, "size 4.1, calibrated"),
        ("article 16", True, "size 4.1, calibrated"),
    ]
    assert found[1]["limit"] == 4.1 and found[1]["gain_db"] == pytest.approx(6.5)


def test_left_of():
    ours = [point("small", 3.0, 18.0), point("large", 4.5, 23.0)]
    lines = left_of([*PEERS, *ours])
    assert [(line["measure"], line["calibrated"]) for line in lines] == [("weights", False)]
    assert lines[0]["peers"] == 4
    assert [(miss["name"], miss["gain_db"]) for miss in lines[0]["missed"]] == [
        ("NF4", pytest.approx(-2.7)),
        ("article 16", pytest.approx(-2.9)),
    ]
    tiny = point("palette", 2.0, 9.0, family="palettisation")
    assert left_of([tiny, *ours])[0]["missed"] == [{"name": "palette", "bits": 2.0, "db": 9.0, "gain_db": None}]


def test_calibrated_peers_are_compared_with_calibrated_rows_only():
    rows = [
        point("size 3.4", 3.4, 16.0, output_db=20.0),
        point("size 3.4, calibrated", 3.4, 15.0, output_db=24.0, calibrated=True),
        point("Q3_K imatrix", 3.44, 16.0, family="GGUF", output_db=22.0, calibrated=True),
    ]
    lines = {(line["measure"], line["calibrated"]): line for line in left_of(rows)}
    assert lines["output", False]["peers"] == 0
    assert lines["output", True]["peers"] == 1 and not lines["output", True]["missed"]


def rounded(format: str, weight: torch.Tensor) -> Stored:
    nbytes = FORMATS[format].packed_bytes(weight.numel())
    return Stored((weight * 100).round() / 100, nbytes, nbytes)


def test_the_command_runs_without_any_peer(tmp_path, monkeypatch):
    ours = [Contestant(id, "NFQ", partial(rounded, id), id, "fast") for id in WRITABLE_IDS]
    monkeypatch.setattr(quality, "peers", lambda: ([], {"GGUF": "xllamacpp is not installed"}))
    monkeypatch.setattr(quality, "our_formats", lambda effort: ours)
    weights = quality_weights.random_weights((64, 512), (64, 64, 3, 3))
    monkeypatch.setattr(quality, "random_weights", lambda: weights)
    monkeypatch.setattr(quality, "collect_demo", lambda prompts: None)
    monkeypatch.setattr(quality, "demo_rows", lambda contestants, calibration: [])
    monkeypatch.setattr(quality.plot, "main", lambda: [])
    arguments = ["--out", str(tmp_path / "quality.json")]
    monkeypatch.setattr(sys, "argv", [quality.__file__, *arguments])
    quality.main(arguments)
    results = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert {row["source"] for row in results["rows"]} == {"gaussian", "student_t5", "convolution"}
    assert {check["met"] for check in results["checks"]} == {None}
    assert results["skipped"] == {"GGUF": "xllamacpp is not installed"}
    assert results["command"] == "python -m benchmarks.quality --out quality.json"


def test_the_curve_is_what_nothing_smaller_equals():
    figures = [("a", 3.0, 17.0), ("b", 4.0, 16.0), ("c", 4.0, 22.0), ("d", 4.5, 22.0)]
    points = [quality_plot.Point(name, "NFQ", "fast", True, bits, db) for name, bits, db in figures]
    assert [point.name for point in quality_plot.curve(points)] == ["a", "c"]


def test_points_pool_the_sources_as_noise():
    """20 and 10 dB are 0.01 and 0.1 of noise, 0.055 on average; what one source lacks is left out."""
    here, there = quality_weights.GAUSSIAN, quality_weights.STUDENT_T
    rows = [point("mix 3, best", 3.0, 20.0) | {"source": here}, point("mix 3, best", 3.2, 10.0) | {"source": there}]
    rows += [
        point("nf7_b64", 3.1, 17.0) | {"source": here},
        point("other", 3.1, 17.0, calibrated=True) | {"source": here},
    ]
    rows += [point("demo", 3.1, 17.0) | {"source": quality_weights.DEMO}]
    [pooled] = quality_plot.pooled_points(rows)
    assert pooled[:4] == ("mix 3, best", "NFQ", "best", True)
    assert pooled.bits == pytest.approx(3.1) and pooled.db == pytest.approx(-10 * math.log10(0.055))


def test_predicted_points_shift_formats_by_the_sensitivities():
    rows = [point("nf7_b64", 3.1, 17.0) | {"source": quality_weights.GAUSSIAN}]
    rows += [row | {"source": quality_weights.GAUSSIAN} for row in PEERS[:1]]
    prediction = {"uniform_gain_db": 9.5, "sizes": [{"effort": "best", "packed": 3.4, "db": 33.0}]}
    ours, theirs, size = quality_plot.predicted_points(rows, prediction)
    assert (ours.effort, ours.mixed, ours.db) == ("fast", False, 26.5)
    assert (theirs.effort, theirs.db) == ("", PEERS[0]["sqnr_db"] + 9.5)
    assert size == ("", "NFQ", "best", True, 3.4, 33.0)


def test_plot(tmp_path):
    needs("matplotlib")
    rows = [row | {"source": quality_weights.GAUSSIAN} for row in [*PEERS, point("mix 3.1", 3.1, 17.0)]]
    points = quality_plot.pooled_points(rows)
    path = quality_plot.draw(points, "title", "dB", "note", tmp_path / "plots" / "quality.png")
    assert path.read_bytes().startswith(b"\x89PNG")
