"""Formats by size: the least noise that fits, the same on every run, and said of each layer."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from nfq_core import NFQError
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.checkpoints.examine import file_info
from nfq_core.cli import main
from nfq_core.files.safetensors_io import Entry
from nfq_core.files.writer import Plan
from nfq_core.fitting.codebook import EFFORTS
from nfq_core.models.sensitivities import BY_BLOCK, BY_LAYER, BY_ROLE, MEASURED, Sensitivities, layer_sensitivities
from nfq_core.models.unet import detect
from nfq_core.models.unet_keys import KOALA_700M, SDXL_BASE, UNetArchitecture, tensor_shapes
from nfq_core.packed.formats import FORMATS, TRELLIS_IDS
from nfq_core.planning.allocation import (
    EXPECTED_SQNR_DB,
    MAX_TRIES,
    MENUS,
    SizeSearch,
    allocate,
    expected_noise,
    lower_convex_hull,
    predicted_output_db,
)
from nfq_core.planning.policy import estimate_warnings, plan_tensors
from nfq_core.planning.settings import PRESETS, BitsPerWeight, FileSize, Formats, Settings
from nfq_core.sizes import parse_size

MENU = MENUS["best"]
NOISE = [10 ** (-EXPECTED_SQNR_DB[fmt.id] / 10) for fmt in MENU]


def packed(chosen: dict, shapes: dict) -> int:
    return sum(fmt.packed_bytes(prod(shapes[name])) for name, (fmt, _) in chosen.items())


def noise(chosen: dict, sensitivities: dict) -> float:
    return sum(sensitivities[name] * 10 ** (-EXPECTED_SQNR_DB[fmt.id] / 10) for name, (fmt, _) in chosen.items())


def test_trellises_are_for_the_patient() -> None:
    levels = (4, 7, 12, 16, 24, 32, 256)
    assert [fmt.id for fmt in MENUS["fast"]] == [f"nf{number}_b64" for number in levels]
    assert [fmt.id for fmt in MENUS["best"]] == [*TRELLIS_IDS, "nf256_b64"]
    for menu in MENUS.values():
        assert list(menu) == sorted(menu, key=lambda fmt: fmt.packed_bytes(1 << 20))
        assert list(menu) == sorted(menu, key=expected_noise, reverse=True)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("weights", [4096, 1 << 14, 1 << 17, 1 << 20, 1 << 24])
def test_the_hull_is_convex(effort: str, weights: int) -> None:
    """Each further byte gains less than the one before, and no format lies below the line that they form."""
    found = lower_convex_hull(weights, MENUS[effort])
    points = [(fmt.packed_bytes(weights), expected_noise(fmt)) for fmt in found]
    gains = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    sizes, levels = zip(*points, strict=True)
    for fmt in MENUS[effort]:
        assert expected_noise(fmt) >= np.interp(fmt.packed_bytes(weights), sizes, levels) * (1 - 1e-12)


def test_best_gets_trellises_for_the_same_bytes() -> None:
    shapes = {"a": (2048, 2048), "b": (2048, 2048)}
    budget = int(3.85 / 8 * 2 * 2048 * 2048)
    assert [fmt.id for fmt, _ in allocate(shapes, budget).values()] == ["nf12_b64", "nf12_b64"]
    assert [fmt.id for fmt, _ in allocate(shapes, budget, effort="best").values()] == ["t4w8_b64", "t3w8_b64"]


def test_the_sensitive_layer_gets_the_bits() -> None:
    shapes = {"dull": (256, 256), "keen": (256, 256)}
    budget = MENU[1].packed_bytes(1 << 16) + MENU[3].packed_bytes(1 << 16)
    chosen = allocate(shapes, budget, {"dull": 1.0, "keen": 30.0}, effort="best")
    assert chosen["keen"][0] is MENU[3] and chosen["dull"][0] is MENU[1]
    # Per weight, in terms of the mean: 1 and 30 of 15.5.
    assert chosen["keen"][1] == 1.935 and chosen["dull"][1] == 0.06452


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("seed", range(10))
def test_no_other_choice_of_that_size_has_less_noise(seed: int, effort: str) -> None:
    """Against all choices: what going by gains leaves over is less than one step of the largest layer."""
    formats = MENUS[effort]
    draw = random.Random(seed)
    shapes = {f"layer{number}": (64, draw.choice([64, 128, 640, 6400])) for number in range(4)}
    sensitivities = {name: draw.lognormvariate(0, 2) for name in shapes}
    least, most = (sum(fmt.packed_bytes(prod(shape)) for shape in shapes.values()) for fmt in (formats[0], formats[-1]))
    budget = draw.randint(least, most)
    found = allocate(shapes, budget, sensitivities, effort=effort)
    assert packed(found, shapes) <= budget
    largest = max(map(prod, shapes.values()))
    sizes = [fmt.packed_bytes(largest) for fmt in lower_convex_hull(largest, formats)]
    step = max(larger - smaller for smaller, larger in itertools.pairwise(sizes))
    for choice in itertools.product(formats, repeat=len(shapes)):
        other = {name: (fmt, 0.0) for name, fmt in zip(shapes, choice, strict=True)}
        if packed(other, shapes) <= budget - step:
            assert noise(found, sensitivities) <= noise(other, sensitivities) * (1 + 1e-9)


def test_the_order_of_the_tensors_does_not_matter() -> None:
    shapes = {f"layer{number}": (64, 64) for number in range(9)}
    backwards = dict(reversed(shapes.items()))
    budget = sum(fmt.packed_bytes(64 * 64) for fmt in MENU[:4]) * 9 // 4
    assert allocate(shapes, budget, effort="best") == allocate(backwards, budget, effort="best")


@pytest.mark.parametrize("bits", PRESETS.values())
def test_sdxl_in_every_preset(bits: float) -> None:
    entries = {key: Entry("F16", shape, 0, 0) for key, shape in tensor_shapes(SDXL_BASE, "ldm").items()}
    plans = [plan for plan in plan_tensors(entries, Settings(BitsPerWeight(bits)))[1].values() if plan.format]
    weights = sum(prod(plan.shape) for plan in plans)
    found = sum(plan.format.packed_bytes(prod(plan.shape)) for plan in plans) * 8 / weights
    assert len(plans) == 771
    assert 0.99 * bits <= found <= bits


def test_sdxl_s_sensitivities_choose_its_formats() -> None:
    """In each layout: the worst inner layer gets the largest format, a cross-attention's queries the smallest."""
    queries = "transformer_blocks.9.attn2.to_q"
    for layout, worst, dull in (
        ("ldm", "output_blocks.8.0.out_layers.3", f"output_blocks.2.1.{queries}"),
        ("diffusers", "up_blocks.2.resnets.2.conv2", f"up_blocks.0.attentions.2.{queries}"),
    ):
        entries = {key: Entry("F16", shape, 0, 0) for key, shape in tensor_shapes(SDXL_BASE, layout).items()}
        plans = plan_tensors(entries, Settings(BitsPerWeight(3.4)))[1]
        assert plans[f"{worst}.weight"].format.id == "nf256_b64"
        smallest = MENUS["fast"][0]
        assert plans[f"{dull}.weight"].format == smallest


@pytest.mark.parametrize(
    ("architecture", "warned"),
    [
        (SDXL_BASE, ""),
        (KOALA_700M, ""),
        (replace(SDXL_BASE, added_width=5632), "are SDXL's, layer by layer; a calibration"),
        (replace(SDXL_BASE, channels=(160, 320, 640)), "are SDXL's, by role; a calibration"),
        (
            None,
            "are SDXL's, by role and number of weights (3 of 4 layers have none of SDXL's roles and get a mean); a",
        ),
    ],
)
def test_an_unknown_architecture_says_which_sensitivities_are_used(
    architecture: UNetArchitecture | None, warned: str
) -> None:
    shapes = {f"{name}.weight": (640, 640) for name in ("a.attn1.to_q", "b", "c", "d")}
    shapes = shapes if architecture is None else tensor_shapes(architecture, "ldm")
    entries = {key: Entry("F16", shape, 0, 0) for key, shape in shapes.items()}
    info, plans = plan_tensors(entries, Settings(BitsPerWeight(3.4)))
    (warning,) = estimate_warnings(info, plans, None) or [""]
    assert warning.startswith("the architecture is unknown") == bool(warned) and warned in warning
    assert not estimate_warnings(info, plans, dict.fromkeys(shapes, 1.0))
    assert not estimate_warnings(*plan_tensors(entries, Settings(Formats())), None)


def test_the_output_is_predicted_by_hand() -> None:
    formats = {"a": FORMATS["nf256_b64"], "b": FORMATS["t2w8_b64"], "c": FORMATS["t2w8_b64"]}
    large, small = (10 ** (-EXPECTED_SQNR_DB[id] / 10) for id in ("nf256_b64", "t2w8_b64"))
    values = {"a": 0.5, "b": 0.01, "c": 0.02, "not quantised": 9.0}
    wanted = -10 * math.log10(0.5 * large + 0.03 * small)
    for basis in (BY_LAYER, MEASURED):
        assert predicted_output_db(formats, Sensitivities(values, basis)) == pytest.approx(wanted)
    for basis in (BY_BLOCK, BY_ROLE):
        assert predicted_output_db(formats, Sensitivities(values, basis)) is None
    assert predicted_output_db({}, Sensitivities(values, BY_LAYER)) is None
    unknown = {"a": FORMATS["article16_b64"]}
    assert predicted_output_db(unknown, Sensitivities(values, BY_LAYER)) is None


@pytest.mark.parametrize("effort", EFFORTS)
def test_larger_presets_predict_a_better_output(effort: str) -> None:
    shapes = tensor_shapes(SDXL_BASE, "ldm")
    entries = {key: Entry("F16", shape, 0, 0) for key, shape in shapes.items()}
    found = []
    for bits in sorted(PRESETS.values()):
        plans = plan_tensors(entries, Settings(BitsPerWeight(bits), effort))[1]
        formats = {key: plan.format for key, plan in plans.items() if plan.format}
        sensitivities = layer_sensitivities(detect(shapes), {key: shapes[key] for key in formats})
        found.append(predicted_output_db(formats, sensitivities))
    assert all(larger - smaller > 3 for smaller, larger in itertools.pairwise(found))


def test_too_small_a_size_is_told() -> None:
    with pytest.raises(NFQError, match=r"need at least [\d,]+ bytes, the target leaves 10; choose a larger target"):
        allocate({"a": (64, 64)}, 10)


def test_a_size_below_what_is_kept_is_told() -> None:
    with pytest.raises(NFQError, match=r"the tensors that are kept exceed the target size by 1,234 bytes"):
        allocate({"a": (64, 64)}, -1234)
    assert allocate({}, -1234) == {}


def test_nothing_to_quantise_is_no_reason_to_warn() -> None:
    search = SizeSearch(10**9, "best")
    assert search.accepts(1000, {"a": Plan("F16", (4,))}) and not search.warnings


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_impossible_sensitivities_are_told(value: float) -> None:
    with pytest.raises(NFQError, match=r"the sensitivity of 'a' is .*; it must be finite and not negative"):
        allocate({"a": (64, 64)}, 10**6, {"a": value})


def test_layers_that_change_nothing_get_the_least() -> None:
    shapes = dict.fromkeys("abc", (64, 64))
    budget = 2 * MENU[0].packed_bytes(64 * 64) + MENU[3].packed_bytes(64 * 64)
    found = allocate(shapes, budget, {"a": 0.0, "b": 5.0, "c": 0.0}, effort="best")
    assert [fmt for fmt, _ in found.values()] == [MENU[0], MENU[3], MENU[0]]


def search(*sizes: int) -> SizeSearch:
    """A search for a file of 1,000,000 bytes that was told these sizes of files, none of which it took."""
    found = SizeSearch(1_000_000, "best")
    for size in sizes:
        assert not found.accepts(size, LAYER)
    return found


LAYER = {"a": Plan("F16", (1000, 1000), MENU[1], 1.0)}
PACKED = MENU[1].packed_bytes(10**6)


def test_the_size_search_takes_what_is_near() -> None:
    assert SizeSearch(None, "best").accepts(1, LAYER)
    assert all(search().accepts(size, LAYER) for size in (990_000, 1_000_000))
    once = search(1_100_000)
    assert once.packed_bytes == PACKED + 995_000 - 1_100_000
    assert once.accepts(995_000, LAYER) and not once.warnings


def test_the_size_search_ends() -> None:
    with pytest.raises(
        NFQError,
        match=r"no file of at most 1,000,000 bytes was found; this model's file can have about 9.. KB to 1\.7. MB",
    ):
        search(*[1_100_000] * (MAX_TRIES - 1)).accepts(1_100_000, LAYER)
    best = search(900_000, *[1_100_000] * (MAX_TRIES - 1))
    assert best.packed_bytes == PACKED
    assert best.accepts(900_000, LAYER) and "no size nearer" in best.warnings[0]
    full = SizeSearch(1_000_000, "best")
    assert full.accepts(900_000, {"a": Plan("F16", (1000, 1000), MENU[-1], 1.0)})
    assert "the largest format" in full.warnings[0]


def test_the_size_search_leaves_fixed_formats_alone() -> None:
    """A text encoder's format is not chosen by size: it is neither in the budget nor in the way of the largest."""
    fixed = {"text": Plan("F16", (2000, 1000), MENU[0])}
    once = SizeSearch(1_000_000, "best")
    assert not once.accepts(1_100_000, LAYER | fixed)
    assert once.packed_bytes == PACKED + 995_000 - 1_100_000
    full = SizeSearch(1_000_000, "best")
    assert full.accepts(900_000, {"a": Plan("F16", (1000, 1000), MENU[-1], 1.0)} | fixed)
    assert "the largest format" in full.warnings[0]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    names = ("a.to_q", "a.to_v", "a.ff.net.2", "b.conv", "b.proj_in", "c.to_k", "c.ff.net.0.proj", "d.to_out.0")
    tensors = {
        f"{name}.weight": torch.randn(96, 8 * number, 3, 3, generator=generator).half()
        if "conv" in name
        else torch.randn(96, 64 * number, generator=generator).half()
        for number, name in enumerate(names, 2)
    }
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(tensors | {"bias": torch.randn(300).half()}, path)
    return path


@pytest.mark.parametrize("share", [0.18, 0.25])
def test_a_file_of_the_size_asked_for(small_model: Path, tmp_path: Path, share: float) -> None:
    """A model of few layers, whose steps are large: never above, and as near as layers of its size allow."""
    wanted = int(share * small_model.stat().st_size)
    target = tmp_path / "sized.nfq.safetensors"
    result = quantize_file(small_model, target, Settings(FileSize(wanted)))
    assert target.stat().st_size == result["file_bytes"] <= wanted
    assert result["file_bytes"] >= 0.93 * wanted
    info = file_info(target)
    assert info["settings"]["target_bytes"] == wanted and "levels" not in info["settings"]
    assert all(layer["sensitivity"] > 0 for layer in info["layers"])
    assert len({layer["format"] for layer in info["layers"]}) > 1
    again = tmp_path / "again.nfq.safetensors"
    quantize_file(small_model, again, Settings(FileSize(wanted)))
    assert again.read_bytes() == target.read_bytes()


def test_packed_bits_asked_for_on_the_command_line(small_model: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "sized.nfq.safetensors"
    assert main(["quantize", str(small_model), str(target), "--target-bpw", "3.6", "--json"]) == 0
    capsys.readouterr()
    assert main(["info", str(target), "--json"]) == 0
    assert 3.4 <= json.loads(capsys.readouterr().out)["packed_bits_per_weight"] <= 3.6
    assert main(["verify", str(target)]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--target-size", "10KB"], 1, "10.0 KB are too few; this model's file can have about "),
        (["--target-size", "soon"], 2, "'soon' is not a size; write one such as 1.2GB or 1200MiB"),
        (["--target-size", "3"], 2, "'3' has no unit; write 3GB, 3MB or 3B (bytes)"),
        (["--target-bpw", "1.9"], 1, "1.9 packed bits per weight are too few; this model's can have 2."),
        (["--target-bpw", "16"], 1, "16 packed bits per weight are too many; this model's can have 2."),
        (["--target-bpw", "-1"], 2, "'-1' must be a number above zero"),
        (["--target-bpw", "nan"], 2, "'nan' must be a number above zero"),
        (["--target-bpw", "1e308"], 2, "'1e308' must be a number above zero and below 2**63"),
        (["--target-size", "99999999999GB"], 2, "is too large"),
        (["--preset", "small", "--conv-levels", "32"], 2, "exclude each other; got preset and --conv-levels"),
        (["--preset", "balanced", "--levels", "16"], 2, "exclude each other; got preset and levels"),
        (["--preset", "small", "--target-bpw", "3.4"], 2, "exclude each other; got preset and --target-bpw"),
        (["--target-bpw", "3", "--conv-format", "t3w8_b64"], 2, "exclude each other"),
        (["--target-bpw", "3", "--levels", "16"], 2, "exclude each other"),
        (["--format", "t3w8_b64", "--levels", "16"], 2, "not allowed with"),
        (["--preset", "huge"], 2, "invalid choice"),
    ],
)
def test_bad_sizes(small_model: Path, tmp_path: Path, capsys, flags: list[str], code: int, told: str) -> None:
    target = tmp_path / "sized.nfq.safetensors"
    try:
        found = main(["quantize", str(small_model), str(target), *flags])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert told in capsys.readouterr().err
    assert not target.exists()


def test_limits_that_are_told_can_be_had(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(NFQError) as caught:
        quantize_file(small_model, tmp_path / "a", Settings(FileSize(1)))
    sizes = re.search("can have about ([0-9.]+ [KM]B) to ([0-9.]+ [KM]B)", str(caught.value)).groups()
    smallest, largest = (parse_size(size) / 1e6 for size in sizes)
    result = quantize_file(small_model, tmp_path / "large", Settings(FileSize(10**9)))
    assert "the largest format; this model's file can have about" in result["warnings"][-1]
    assert "the architecture is unknown" in result["warnings"][0]
    assert 0.95 * largest < result["file_bytes"] / 1e6 < 1.05 * largest
    result = quantize_file(
        small_model,
        tmp_path / "small",
        Settings(FileSize(int(1.05e6 * smallest))),
    )
    assert result["file_bytes"] <= 1.05e6 * smallest
    least = quantize_file(
        small_model,
        tmp_path / "least",
        Settings(Formats.of(format="nf4_b64", conv_format="nf4_b64")),
    )
    # Its header says more: how sensitive each layer is.
    near = int(1.02 * least["file_bytes"])
    assert quantize_file(small_model, tmp_path / "near", Settings(FileSize(near)))["file_bytes"] <= near
    with pytest.raises(NFQError, match="no file of at most"):
        quantize_file(
            small_model,
            tmp_path / "less",
            Settings(FileSize(int(0.97 * least["file_bytes"]))),
        )

    with pytest.raises(NFQError) as caught:
        quantize_file(small_model, tmp_path / "b", Settings(BitsPerWeight(0.1)))
    smallest, largest = map(float, re.findall("have ([0-9.]+) to ([0-9.]+),", str(caught.value))[0])
    for number, bits in enumerate((smallest, largest)):
        quantize_file(small_model, tmp_path / f"c{number}", Settings(BitsPerWeight(bits)))
        assert file_info(tmp_path / f"c{number}")["packed_bits_per_weight"] == pytest.approx(bits, rel=0.05)


@pytest.mark.parametrize(
    ("size", "value", "reason"),
    [
        (BitsPerWeight, -1.0, r"target_bpw must be above zero and below 2\*\*63, got -1\.0"),
        (FileSize, 0, r"target_bytes must be above zero and below 2\*\*63, got 0"),
        (BitsPerWeight, float("nan"), r"target_bpw must be above zero and below 2\*\*63, got nan"),
        (BitsPerWeight, 1e300, r"target_bpw must be above zero and below 2\*\*63, got 1e\+300"),
        (FileSize, 10**400, r"target_bytes must be above zero and below 2\*\*63, got 1000"),
    ],
)
def test_impossible_sizes(size: type, value: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        size(value)
