"""Some tests of the host suite in a real ComfyUI on the GPU, and what the host says of its memory management."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ...shared import ROOT
from .part import Part

TESTS = (
    "test_sampling.py::test_samplers_give_the_same_latents[euler]",
    "test_sampling.py::test_adapter_kinds[lora]",
    "test_states.py::test_the_host_sees_packed_bytes",
    "test_states.py::test_load_states",
    "test_states.py::test_lora_factors_stay_with_their_layers",
    "test_states.py::test_resident_is_a_stock_model",
)


def host(part: Part) -> None:
    """Sampling, a LoRA, partial loads: which of the tests pass where the host has a GPU."""
    if not os.environ.get("COMFYUI_PATH"):
        part.skip("host", "COMFYUI_PATH does not name a ComfyUI")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "NFQ_HOST_LOGS": folder, "NFQ_HOST_DEVICE": part.device.type}
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
        command += [str(ROOT / "tests" / "host" / name) for name in TESTS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(part.left(), 1))
        logs = "\n".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("host-*.log")))
        part.note(host_says=sorted(set(re.findall(r".*(?:vram|pinned|Device:).*", logs, re.IGNORECASE)))[:40])
        if not report.exists():
            raise RuntimeError(f"pytest made no report: {done.stdout[-500:]} {done.stderr[-500:]}")
        tests = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            told = "passed" if problem is None else f"{problem.tag}: {problem.get('message', '')[:300]}"
            tests[case.get("name", "")] = told
    part.note(tests=tests)
    failed = [name for name, told in tests.items() if told.startswith(("failure", "error"))]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(tests)} tests failed: {', '.join(failed)}")
