"""Every attack of `tests/attacks` against every reader: refused in one line or read, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.corpus import FILES, NAMES, OBJECTS, make_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it, and pipes made")

HEADER_FACTOR = 32
"""Bytes that JSON takes as Python's objects, at most, for each of its own: `[]` is one of 64 and has a comma."""

ROOM = 48 << 20
"""For what is read, decoded and kept by allocators, of files whose honest contents are a few kilobytes."""

SOUND = {f"{kind} {name}" for kind in ("name", "said") for name in NAMES}
SOUND |= {"metadata of a container in the source", "100,000 lists", "100,000 objects"}
"""Odd, and still containers."""

SOUND_HEADERS = SOUND | {"a bomb in one frame", "64 GiB of frames"}
"""Those whose header tells nothing wrong."""

PLAIN = {
    "names that look alike",
    "5,000 tensors",
    "100,000 texts of metadata",
    "a UNet of empty weights",
    "a UNet twice",
    "a UNet with a block too many",
    "10,000 text encoders",
    "10,000 families of blocks",
}
"""Odd, and still files that can be quantised."""

CALIBRATIONS = {
    "a calibration of no correlation",
    "a calibration of tiny numbers",
    "a calibration that says",
    "a calibration of huge numbers",
    "a calibration of correlations beyond 1",
}
"""Nonsense: a weight is rounded with it, badly, or without it."""

ARTICLES = {"an article's NaN", "an article's scale beyond floats"}


@pytest.fixture(scope="module")
def attacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("attacks"))


@pytest.fixture(scope="module")
def results(attacks: dict[str, Path]) -> dict[str, dict[str, tuple[str, int]]]:
    """What came of each attack with each reader, and the bytes it took."""
    folder = next(iter(attacks.values())).parent
    script = Path(__file__).parents[1] / "attacks" / "attempt.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    assert {path.name for path in folder.iterdir()} == {path.name for path in attacks.values()}
    return {attack: told[path.name] for attack, path in attacks.items()}


def test_nothing_else_happens(results):
    faults = {(attack, name): told for attack, all in results.items() for name, (told, _) in all.items()}
    assert {which: told for which, told in faults.items() if told.startswith("FAULT")} == {}
    assert not Path("/tmp/nfq-attack").exists()


def test_the_documents_count_the_attacks() -> None:
    count, root = len(FILES) + len(OBJECTS), Path(__file__).parents[2]
    assert f"holds {count} attacks" in (root / "SECURITY.md").read_text("utf-8")
    assert f"| {count} files ×" in (root / "docs" / "RELIABILITY.md").read_text("utf-8")


def test_only_what_is_sound_is_read(results):
    def read_by(name: str) -> set[str]:
        return {attack for attack, told in results.items() if told[name][0] == "loaded"}

    assert read_by("load") == read_by("verify") == read_by("dequantize") == SOUND
    assert read_by("info") == SOUND_HEADERS
    assert read_by("quantize") == PLAIN | {attack for attack in FILES if "calibration" in attack}
    assert read_by("calibrate") == CALIBRATIONS
    assert read_by("import") == ARTICLES


def test_memory_is_bounded_by_what_a_file_holds(results, attacks):
    greedy = {}
    for attack, told in results.items():
        path = attacks[attack]
        size = path.stat().st_size if attack not in OBJECTS or path.is_file() else 0
        header = min(size, 8 + int.from_bytes(FILES[attack]()[:8], "little")) if attack in FILES else size
        allowed = ROOM + HEADER_FACTOR * header + 2 * size
        greedy |= {(attack, name): (grown, allowed) for name, (_, grown) in told.items() if grown > allowed}
    assert greedy == {}


@pytest.fixture
def page(plugin, attacks, tmp_path) -> Callable[..., dict[str, tuple[int, dict]]]:
    """What a route of the page answers about every attack."""
    folder = tmp_path / "models" / "diffusion_models"
    routes = sys.modules[f"{plugin.__name__}.nodes.routes"]

    def ask(route: str, ending: str = "", **query: str) -> dict[str, tuple[int, dict]]:
        for path in attacks.values():
            (folder / f"{path.name}{ending}").symlink_to(path)
        names = {attack: f"{path.name}{ending}" for attack, path in attacks.items()}
        questions = {attack: {"folder": folder.name, "name": name, **query} for attack, name in names.items()}
        return {attack: routes._answer(*routes.ROUTES[route], question) for attack, question in questions.items()}

    return ask


def test_the_page_is_told_of_every_file(plugin, page, attacks):
    report = sys.modules[f"{plugin.__name__}.nodes.report"]
    told = page("/nfq/file")
    assert {attack for attack, (status, _) in told.items() if status == 200} == SOUND_HEADERS
    for status, answer in told.values():
        json.dumps(answer, allow_nan=False)
        assert status == 200 or answer["error"].isprintable()
    for attack in SOUND_HEADERS:
        with plugin.nfq_core.NFQFile(attacks[attack]) as file:
            assert report.as_text(report.file_facts(file, "a")).replace("\n", "").isprintable()


def test_the_page_learns_a_time_or_what_is_wrong(page):
    form = {"preset": "balanced", "effort": "fast", "levels": "16", "conv_levels": "32", "device": "cpu"}
    answers = page("/nfq/time", ".safetensors", **form)
    assert {attack for attack, (status, _) in answers.items() if status == 200} >= PLAIN
    for status, answer in answers.values():
        json.dumps(answer, allow_nan=False)
        assert status == 200 or (answer["error"].isprintable() and "not a setting" not in answer["error"])
