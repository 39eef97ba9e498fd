"""How long `nfq demo` takes as a whole process: `python -m benchmarks.speed.demo`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from ..shared import summary, timed, write_results

RUNS = 3


def run() -> dict:
    """Wall seconds of the command, imports included, and the levels of its report."""
    report: dict = {}

    def run_command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "nfq_core", "demo", "--out", folder, "--json"]
            report.update(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))

    seconds = summary([timed(run_command) for _ in range(RUNS)])
    return {"seconds": seconds, "levels": report["levels"]}


if __name__ == "__main__":
    print(write_results("demo", run()))
