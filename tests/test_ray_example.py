"""The example that quantises a folder as tasks of Ray, run with a local Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import SMALL_MODEL

from nfq_core import NFQFile, quantize_file

ROOT = Path(__file__).resolve().parent.parent

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Ray reports nothing to its makers, and its workers need not wait for everything else on a busy machine."""

pytest.importorskip("ray", reason="the example needs Ray: pip install ray")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The example in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_batch.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | QUIET,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_a_folder_of_models(tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "out"
    models.mkdir()
    for name in ("a", "b", "c"):
        save_file(SMALL_MODEL, models / f"{name}.safetensors")
    (models / "damaged.safetensors").write_bytes(b"no model")
    done = run(models, "--out", out, "--preset", "small")
    assert done.returncode == 1, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if " -> " in line or line.startswith("failed"))
    assert [line.partition(":")[0] for line in lines] == [*(str(models / f"{n}.safetensors") for n in "abc"), "failed"]
    assert "damaged.safetensors is not a safetensors file" in lines[-1]
    alone = quantize_file(models / "a.safetensors", tmp_path, preset="small")["target"]
    assert (out / "a-small.nfq.safetensors").read_bytes() == Path(alone).read_bytes()
    for name in ("a", "b", "c"):
        made = out / f"{name}-small.nfq.safetensors"
        with NFQFile(made) as file:
            assert file.facts.settings["preset"] == "small"

    (models / "damaged.safetensors").unlink()
    again = run(models, "--out", out, "--preset", "small")
    assert (again.returncode, again.stdout.count("done before")) == (0, 3), again.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpus(tmp_path: Path) -> None:
    done = run(tmp_path, "--out", tmp_path / "out", "--gpus", 0.5)
    assert done.returncode == 1
    assert "Ray has no 0.5 GPUs here; leave --gpus out" in done.stderr
