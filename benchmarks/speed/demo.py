"""Time of `nfq demo` as a whole process, imports included: `python -m benchmarks.speed.demo`."""

from __future__ import annotations

import tempfile

from ..shared import argument_parser, json_of, summary, timed, write_results

RUNS = 3


def run() -> dict:
    """Wall seconds of the command, and the levels in its report."""
    report: dict = {}

    def run_command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            report.update(json_of("nfq_core", "demo", "--out", folder, "--json"))

    return {"seconds": summary([timed(run_command) for _ in range(RUNS)]), "levels": report["levels"]}


if __name__ == "__main__":
    argument_parser(__doc__).parse_args()
    print(write_results("demo", run()))
