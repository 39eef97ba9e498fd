"""Time of `nfq demo` as a whole process, imports included: `python -m benchmarks.speed.demo`."""

from __future__ import annotations

import tempfile

from ..shared import json_of, run_command, summary, timed


def run() -> dict:
    """Wall seconds of the command, three times, and the levels in its report."""
    report: dict = {}

    def demo() -> None:
        with tempfile.TemporaryDirectory() as folder:
            report.update(json_of("nfq_core", "demo", "--out", folder, "--json"))

    return {"seconds": summary([timed(demo) for _ in range(3)]), "levels": report["levels"]}


if __name__ == "__main__":
    run_command(__doc__, "demo", run)
