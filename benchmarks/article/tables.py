"""The results of `benchmarks.article` as Markdown."""

from __future__ import annotations

import json
from statistics import median

from ..shared import RESULTS, markdown_table, origin_line, spread

ACTIVATION_LEVELS = 16  # Levels of the weights where activations are int8
INT8_ACTIVATIONS, DYNAMIC_INT8 = f"{ACTIVATION_LEVELS} levels, int8 activations", "torch's dynamic int8"
STAGES = {
    "quantise": "quantise",
    "save": "save",
    "load": "load",
    "restore": "dequantise all, not needed",
    "place": "put into the UNet",
    "draw": "draw",
}
# The article's own figures: all stages together with SDXL, times read off its files' dates; sizes of the Linear layers.
RECORDED = {"all_stages": "about an hour", "size_of_fp16": {"32": "1/3", "12": "1/4", "7": "about 1/5"}}


def table(results: dict) -> str:
    """Sizes and errors, then times, then the conditions."""
    facts = results["machine"]
    remarks = (
        f"{len(results['captions'])} pictures, {results['steps']} steps of {results['sampler']}, guidance "
        f"{results['guidance']:g}, seed {results['seed']} for each. {results['note']} ¹ Scaled by the number of "
        "weights from what it took for a Gaussian sample, `benchmarks/results/article_by_hand.json`. "
    )
    origin = origin_line(results, f"threads: {results['threads']}", f"torch {facts['torch']}")
    return f"{sizes_table(results)}\n\n{times_table(results)}\n\n{remarks}{origin}"


def sizes_table(results: dict) -> str:
    """Size, error and time of a step of every model, and of the article's format."""
    original, base = results["original_bytes"], results["fp16"]["step_seconds"]["median"]

    def cells(name: str, row: dict, recorded: str = "–") -> list[str]:
        article, step = row.get("article"), row["step_seconds"]
        return [
            name,
            f"{row['file_bytes'] / 1e6:,.2f} MB = {row['file_bytes'] / original:.2f}",
            f"{article['bytes'] / 1e6:.2f} MB, {article['sqnr_db']:.1f} dB" if article else "–",
            recorded,
            *(f"{row[key]:.1f}" if row.get(key) is not None else "–" for key in ("sqnr_db", "psnr_db")),
            f"{spread(step, ' s', 3)} = {step['median'] / base:.2f} ×",
        ]

    recorded = results["article"]["size_of_fp16"]
    rows = [cells("fp16", {"file_bytes": original, **results["fp16"]})]
    rows += [cells(f"{r['levels']} levels", r, recorded.get(str(r["levels"]), "–")) for r in results["levels"]]
    for name, label in (("int8_activations", INT8_ACTIVATIONS), ("torch_dynamic_int8", DYNAMIC_INT8)):
        if "file_bytes" in results.get(name, {}):
            rows.append(cells(label, results[name]))
    header = [f"UNet of {results['model']}", "size, of fp16's", "as the article stores it", "the article says of SDXL"]
    return markdown_table([*header, "weights, dB", "pictures, dB", "a step"], rows)


def times_table(results: dict) -> str:
    """Seconds of every stage by levels, and of the article's own code."""
    levels = results["levels"]
    rows = [[label, *(f"{row['seconds'][name]:.2f}" for row in levels), "–"] for name, label in STAGES.items()]
    total = [f"{sum(row['seconds'].values()):.2f}" for row in levels]
    rows.append(["together", *total, f"{results['article']['all_stages']}, SDXL"])
    by_hand = json.loads((RESULTS / "article_by_hand.json").read_text(encoding="utf-8"))["seconds_per_million_weights"]
    for stage, label in (("quantise", "quantise, save"), ("load", "load, dequantise all")):
        cells = [f"the article's code¹: {label}"]
        for row in levels:
            seconds = by_hand.get(str(row["levels"]))
            cells.append(f"{median(seconds[stage]) * row['quantized_weights'] / 1e6:.2f}" if seconds else "–")
        rows.append([*cells, "–"])
    return markdown_table(["seconds", *(f"{row['levels']} levels" for row in levels), "the article says"], rows)
