"""What a calibration gains where a size is asked for, on the demo model: `python -m benchmarks.quality.sizes`.

Every layer gets a trellis format by how sensitive it is: by its role without a calibration, as measured with one, and
then with error feedback too. Presets and one size more are measured as `calibrated` does, on other captions
than those of the calibration; the first and last convolution are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from nfq_core import NFTensor, quantize
from nfq_core.calibration.statistics import Calibration
from nfq_core.demo.calibrate import collect_demo
from nfq_core.demo.model import load_weights
from nfq_core.files.safefile import describe
from nfq_core.planning.allocation import PRESETS
from nfq_core.planning.policy import Settings, plan_tensors

from ..shared import machine, markdown_table, write_results
from .judge import PROMPTS, Judge

SIZES = {**PRESETS, "": 4.15}
"""Packed bits per weight by preset; the last is what K-quants are compared at."""


def run(calibration: Calibration, names: list[str]) -> dict:
    """All measurements of the sizes with these names, as written to the results."""
    weights = load_weights()
    entries = describe(weights)
    measured = calibration.sensitivities_of({key: entry.shape for key, entry in entries.items()})
    made: dict[tuple[str, str, bool], NFTensor] = {}
    judge, rows = Judge(weights), []
    for name in names:
        row = {"preset": name, "asked": SIZES[name]}
        for kind, sensitivities in (("without", None), ("calibrated", measured)):
            info, plans = plan_tensors(entries, Settings(target_bpw=SIZES[name]), sensitivities)
            found, _ = calibration.for_plans(info, plans) if sensitivities else ({}, [])
            decoded: dict[str, torch.Tensor] = {}
            packed = total = 0
            for key, plan in plans.items():
                if not plan.format:
                    continue
                at = key, plan.format.id, key in found
                if at not in made:
                    statistics = found[key].arguments() if key in found else {}
                    made[at] = quantize(weights[key], format=plan.format.id, **statistics)
                decoded[key] = made[at].dequantize()
                packed, total = packed + made[at].nbytes, total + weights[key].numel()
            row[kind] = {"packed_bits_per_weight": 8 * packed / total, **judge.judge(weights | decoded)}
        rows.append(row)
        print(row, flush=True)
    return {"prompts": calibration.prompts, "rows": rows}


def table(results: dict) -> str:
    """Bits, output dB and picture dB of each size, without and with a calibration."""
    lines = []
    for row in results["rows"]:
        without, calibrated = row["without"], row["calibrated"]
        cells = [f"`{row['preset']}`" if row["preset"] else "", f"{row['asked']}"]
        cells += [f"{kind['packed_bits_per_weight']:.2f}" for kind in (without, calibrated)]
        for figure in ("output_db", "picture_db"):
            gain = calibrated[figure] - without[figure]
            cells += [f"{without[figure]:.1f}", f"{calibrated[figure]:.1f} ({gain:+.1f})"]
        lines.append(cells)
    header = ["preset", "bits asked for", "packed bits", "calibrated", "output, dB", "calibrated", "pictures, dB"]
    return markdown_table([*header, "calibrated"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", help="a file that `nfq calibrate-demo` wrote; by default it is collected anew")
    parser.add_argument("--only", nargs="+", choices=[name or "4.15" for name in SIZES], help="these sizes alone")
    parser.add_argument("--out", type=Path, help="where the results go; by default among the benchmarks' results")
    options = parser.parse_args(arguments)
    if options.only and not options.out:
        parser.error("--only needs --out: the repository holds the results of all sizes")
    print(machine())
    calibration = Calibration.load(options.calibration) if options.calibration else collect_demo(PROMPTS)
    chosen = [name for name in SIZES if options.only is None or (name or "4.15") in options.only]
    print(write_results("sizes", run(calibration, chosen), options.out))


if __name__ == "__main__":
    main()
