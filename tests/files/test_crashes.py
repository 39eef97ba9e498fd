"""Writers killed at every step and at random: the target is the old file or the new one, and leftovers go away."""

from __future__ import annotations

import random
import signal
import tempfile
from pathlib import Path

import pytest

if not hasattr(signal, "SIGKILL"):
    pytest.skip("this system has no SIGKILL", allow_module_level=True)

from crashes import AIMS, Bench, aimed_kills, changes_while_loading, locked_folder, random_kills


@pytest.fixture(scope="module")
def bench():
    # Not in pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        made = Bench(Path(folder))
        made.prepare()
        yield made


def test_killed_at_every_step_of_a_write(bench):
    found = aimed_kills(bench, "save")
    assert found["faults"] == 0
    assert found["kills"] == 2 * len(AIMS)
    # Before the file has its name, the temporary one is left; afterwards the new file is there.
    assert found["leftovers"] == 2 * (len(AIMS) - 1)
    assert found["new"] == 2
    assert found["old"] == found["absent"] == len(AIMS) - 1


@pytest.mark.parametrize("operation", ["quantize", "batch", "import"])
def test_killed_at_random(bench, operation):
    found = random_kills(bench, operation, 3, random.Random(0))
    assert found["faults"] == 0
    assert found["kills"] == 3


def test_a_folder_without_permission(bench):
    assert locked_folder(bench, "save") == {"folders": 1, "faults": 0}


def test_a_file_that_changes_while_it_is_loaded(bench):
    """Replaced, cut or overwritten: nothing that was loaded is wrong."""
    found = changes_while_loading(bench, 60, random.Random(0))
    assert found["faults"] == 0
    assert found["right"] + found["refused"] == 60
    assert min(found["right"], found["refused"]) > 0
