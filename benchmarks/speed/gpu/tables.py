"""The results of `benchmarks.speed.gpu` as Markdown."""

from __future__ import annotations

from ...shared import markdown_table, spread

LABELS = {
    "decode": "decode into one buffer",
    "copies": "copies and fills that read and write as many bytes",
    "operation": "decode into new memory, as layers do",
    "torch": "decode in plain torch",
    "bitsandbytes NF4": "bitsandbytes' decode of NF4",
    "Q4_0 in torch": "decode of Q4_0 in torch, as GGUF plugins do",
}


def table(results: dict) -> str:
    """Steps, all other times; then lines about bits, failures and the device."""
    parts, facts, device = results["parts"], results["machine"], results["device"]
    failed = [f"{part}, {name}" for part, found in parts.items() for name in found["failures"]]
    texts = [
        _step_table(parts["step"].get("contestants", {}), parts["compile"].get("compiled", {}), results["small"]),
        _times_table(parts["decode"], parts["files"]),
        _correctness_line(parts["correctness"]),
        f"Failed: {'; '.join(failed)}." if failed else "",
        f"{device['name']}, torch {facts['torch']}, Triton {device['versions']['triton']}, {facts['date']}.",
    ]
    return "\n\n".join(text for text in texts if text)


def _step_table(steps: dict, compiled: dict, small: bool) -> str:
    rows = []
    for group, words in ((steps, ""), (compiled, ", compiled")):
        # A part that was stopped has no times.
        for name, one in ((name, one) for name, one in group.items() if "ms" in one and "ms" in group.get("fp16", {})):
            ratio = "" if name == "fp16" else f" = {one['ms']['median'] / group['fp16']['ms']['median']:.3f} ×"
            own, peak = (f"{one[key] / 1e9:.2f} GB" if key in one else "–" for key in ("own_bytes", "step_bytes"))
            rows.append([name + words, spread(one["ms"], " ms") + ratio, own, peak])
    title = "tiny shapes, to try the script" if small else "SDXL's UNet, 1024 px, CFG"
    return markdown_table([title, "a step", "weights", "a step's peak memory"], rows) if rows else ""


def _times_table(decode: dict, files: dict) -> str:
    rows = [[f"{LABELS[name]}, as a CUDA graph", spread(ms, " ms")] for name, ms in decode.get("graph", {}).items()]
    rows += [[LABELS[name], spread(ms, " ms")] for name, ms in decode.get("eager", {}).items()]
    rows += [["quantise", spread(files["quantise"], " ms")]] if "quantise" in files else []
    rows += [[f"first load: {name}", f"{1e3 * one:.2f} ms"] for name, one in files.get("first_load_s", {}).items()]
    rows += [[f"load from page cache: {name}", spread(ms, " ms")] for name, ms in files.get("load", {}).items()]
    return markdown_table([f"all {decode.get('layers', '')} layers", "time"], rows) if rows else ""


def _correctness_line(found: dict) -> str:
    if "checked" not in found:
        return ""
    line = f"Bits: {found['checked']} decodes ({found['backend']}), {len(found['wrong'])} with others than the CPU's"
    errors = [abs(one["cpu_db"] - one["device_db"]) for one in found.get("quantise", {}).values()]
    return f"{line}; quantised there, errors are within {max(errors):.3f} dB of the CPU's." if errors else f"{line}."
