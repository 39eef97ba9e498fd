"""What a calibration has to collect: `python -m benchmarks.quality.collecting`.

Both small models with every weight at 16 levels, quantised with error feedback from calibrations of several ranks,
numbers of captions and steps. Judged by the UNet's output on noisy pictures of other captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import torch

from nfq_core import Calibration, quantize
from nfq_core.calibration.expectation import expectation
from nfq_core.calibration.prompts import STEPS
from nfq_core.demo.calibrate import CALIBRATION_SEED
from nfq_core.files.safetensors_io import describe
from nfq_core.parallel import ordered_map
from nfq_core.planning.policy import plan_tensors
from nfq_core.planning.settings import Formats, Settings

from ..shared import markdown_table, run_command
from .worlds import CAPTIONS_SEEN, WORLDS, Judge

SETTINGS = Settings(Formats.of(16, 16))
USUAL = {"prompts": 32, "steps": 20, "rank": 64}
CASES = (
    USUAL,
    *({**USUAL, "rank": rank} for rank in (8, 16, 32, 128)),
    *({**USUAL, "prompts": prompts} for prompts in (2, 4, 8, 16, 64)),
    *({**USUAL, "steps": steps} for steps in (2, 5, 10)),
    {**USUAL, "steps": STEPS},
)


def figures(judge: Judge, calibration: Calibration | None) -> dict[str, float]:
    """`output_db`: SQNR of the output with all weights at 16 levels; `expected_gain_db` if that can be predicted."""
    entries = describe(judge.weights)
    info, plans = plan_tensors(entries, SETTINGS)
    formats = {key: plan.format.id for key, plan in plans.items() if plan.format}
    inputs = calibration.for_plans(info, plans)[0] if calibration else {}

    def make(key: str) -> torch.Tensor:
        statistics = inputs[key].arguments() if key in inputs else {}
        return quantize(judge.weights[key], format=formats[key], **statistics).dequantize()

    made = ordered_map(make, formats, size=lambda key: 16 * judge.weights[key].numel())
    expected = expectation(entries, SETTINGS, info, plans, calibration).get("calibration_db")
    found = judge.figures(dict(zip(formats, made, strict=True)), pictures=False)
    return found | ({} if expected is None else {"expected_gain_db": expected})


def run() -> dict:
    """A row for each model and case; `prompts` 0 is without a calibration."""
    rows = []
    for world in WORLDS.values():
        if not world.weights.exists():
            print(f"  {world.weights} is missing, so {world.name} is left out")
            continue
        judge = Judge(world, world.captions(CAPTIONS_SEEN, CALIBRATION_SEED), captions=0, seeds=())
        rows.append({"model": world.name, "prompts": 0, **figures(judge, None)})
        for case in CASES:
            started = perf_counter()
            # Only with sensitivities is the gain predicted.
            collected = world.calibrate(case["prompts"], case["steps"], rank=case["rank"], sensitivities=case is USUAL)
            seconds = perf_counter() - started
            found = figures(judge, collected)
            rows.append({"model": world.name, **case, **found, "seconds": round(seconds, 1)})
            print(f"  {world.name} {case}: {found['output_db']:.2f} dB", flush=True)
    return {"rows": rows}


def table(results: Mapping) -> str:
    """Output by what was collected, one column per model."""
    rows: dict[tuple, dict[str, float]] = {}
    for row in results["rows"]:
        rows.setdefault((row["prompts"], row.get("steps"), row.get("rank")), {})[row["model"]] = row["output_db"]
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    lines = [
        [*(["none", "–", "–"] if not case[0] else map(str, case)), *(f"{found[model]:.1f}" for model in models)]
        for case, found in rows.items()
    ]
    return markdown_table(["captions", "steps of each", "rank", *(f"{model}, output dB" for model in models)], lines)


if __name__ == "__main__":
    run_command(__doc__, "collecting", run)
