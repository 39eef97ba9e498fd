"""Time of `nfq demo` as a whole process, imports included: `python -m benchmarks.speed.demo`."""

from __future__ import annotations

import tempfile

from ..shared import json_of, run_command, summary, timed


def demo() -> None:
    """Run the command once, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        json_of("nfq_core", "demo", "--out", folder, "--json")


def run() -> dict:
    """Wall seconds of the command, three times."""
    return {"seconds": summary([timed(demo) for _ in range(3)])}


if __name__ == "__main__":
    run_command(__doc__, "demo", run)
