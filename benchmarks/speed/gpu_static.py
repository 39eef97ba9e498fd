"""What the GPU decode costs as far as it shows without a GPU: `python -m benchmarks.speed.gpu_static`.

Instructions: nvcc compiles the CUDA kernels, and Triton its own for comparison, for each architecture; cuobjdump
disassembles them. *Instructions per weight* are all instructions of a kernel ÷ the weights of one thread: reading the
scales and filling the tables are included. The kernels have no loops, which is checked, and instructions with a false
predicate count too. A thread issues so many; how long they take is not measured.

Host: the processor time of one launch, with stubs of the driver and of torch's current stream, which take hardly any,
and that of NVRTC for all kernels of a dtype. What is not installed is left out and named.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from cuda_source import compiled, missing
from samples import random_buffer

from nfq_core.packed import cuda_decode, nvrtc
from nfq_core.packed.cuda_decode import OUTPUTS, blocks_per_unit, kernel_formats
from nfq_core.packed.cuda_driver import Driver
from nfq_core.packed.formats import format_by_id
from nfq_core.packed.layout import BLOCK, BlockFormat

from ..shared import markdown_table, run_command, summary, unavailable
from . import sass

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
"""RTX 20 · A100 · RTX 30 · RTX 40 · H100 · RTX 50."""

MAIN = 86
TRITON_POINTERS = {"data": "*u8", "levels": "*fp16", "mantissas": "*i32", "out": "*fp16"}
TRITON_NUMBERS = ("weights", "groups", "coarse", "fine", "scales")
MULTIPLES_OF_16 = (*TRITON_POINTERS, "weights", "coarse", "fine", "scales")
"""Arguments of Triton's kernel that are multiples of 16 in SDXL's layers, which Triton makes use of."""

LAUNCHES, ROUNDS = 2000, 7


def row(backend: str, fmt: BlockFormat, architecture: int, dtype: torch.dtype, kernel: sass.Kernel, weights: float):
    """The facts of one kernel; `weights` are those of one thread."""
    return {
        "backend": backend,
        "format": fmt.id,
        "arch": f"sm_{architecture}",
        "output_dtype": str(dtype).removeprefix("torch."),
        "instructions_per_weight": round(len(kernel.instructions) / weights, 3),
        "loads_per_weight": round(kernel.count("LDG") / weights, 4),
        "load_bits": kernel.widths("LDG"),
        "store_bits": kernel.widths("STG"),
        "spill_bytes": kernel.spill_bytes,
        "registers": kernel.registers,
        "weights_per_thread": weights,
        "loops": kernel.loops(),
    }


def cuda_rows(skipped: dict[str, str]) -> list[dict]:
    """All formats, dtypes and architectures of the CUDA kernels."""
    rows = []
    for architecture in ARCHITECTURES:
        for dtype in OUTPUTS:
            made = sass.compiled(cuda_decode.source(dtype), architecture)
            if isinstance(made, str):
                skipped[f"sm_{architecture}"] = made
                break
            found = sass.kernels(made)
            for fmt in kernel_formats():
                weights = blocks_per_unit(fmt) * cuda_decode.COLUMNS
                rows.append(row("cuda", fmt, architecture, dtype, found[fmt.id], weights))
    return rows


def triton_rows(skipped: dict[str, str]) -> list[dict]:
    """All formats of the Triton kernel, fp16."""
    if reason := unavailable("triton"):
        skipped["triton"] = reason
        return []
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nfq_core.packed import triton_decode

    rows = []
    for architecture in ARCHITECTURES:
        for fmt in kernel_formats():
            constants = triton_decode.constants(fmt)
            names = [*TRITON_POINTERS, *TRITON_NUMBERS]
            order = ["data", "levels", "mantissas", "out", *TRITON_NUMBERS]
            signature = {name: TRITON_POINTERS.get(name, "i32") for name in order}
            signature |= dict.fromkeys(constants, "constexpr")
            attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in names if name in MULTIPLES_OF_16}
            source = ASTSource(triton_decode._decode, signature, constants, attributes)
            try:
                options = {"num_warps": triton_decode.WARPS}
                made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            except Exception as error:
                skipped[f"triton, sm_{architecture}"] = str(error).strip().partition("\n")[0][:200]
                break
            (kernel,) = sass.kernels(made.asm["cubin"]).values()
            blocks = triton_decode.groups_per_program(fmt) * fmt.coarse_digits
            weights = blocks * BLOCK / (32 * triton_decode.WARPS)
            rows.append(row("triton", fmt, architecture, torch.float16, kernel, weights))
    return rows


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of a work, which other programs on this machine hardly change."""
    started = time.process_time()
    work()
    return time.process_time() - started


def launch_microseconds() -> dict:
    """Processor time of one decode on the host, from the call until the launch returned, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = compiled(Path(folder) / "stub.so", torch.float16, "stub_cuda.h", "-shared", "-fPIC")
        library = ctypes.CDLL(str(path))
        ctypes.c_int.in_dll(library, "idle").value = 1
        image = cuda_decode.source(torch.float16).encode()
        decoder = cuda_decode.CudaDecoder(Driver(library), torch.device("cpu", 0), image)
        stream = SimpleNamespace(cuda_stream=1)
        found = {}
        with mock.patch.object(torch.cuda, "current_stream", lambda device: stream):
            for format_id, own_levels in (("nf16_b64", True), ("t4w8_b64", False)):
                fmt = format_by_id(format_id)
                data, out = random_buffer(format_id, 6400, own_levels=own_levels), torch.empty(6400).half()
                decoder.dequantize_into(out, data, fmt)

                def work(out=out, data=data, fmt=fmt) -> None:
                    for _ in range(LAUNCHES):
                        decoder.dequantize_into(out, data, fmt)

                found[format_id] = summary([1e6 * processor_seconds(work) / LAUNCHES for _ in range(ROUNDS)])
    return found


def compile_seconds(skipped: dict[str, str]) -> dict:
    """Processor seconds of NVRTC for all kernels of each dtype."""
    try:
        library = nvrtc.load_nvrtc()
    except nvrtc.NvrtcError as error:
        skipped["NVRTC"] = str(error)
        return {}
    found = {}
    for dtype in OUTPUTS:
        seconds = processor_seconds(lambda dtype=dtype: library.compile(cuda_decode.source(dtype), f"sm_{MAIN}"))
        found[str(dtype).removeprefix("torch.")] = round(seconds, 2)
    return {"version": library.version, "target": f"sm_{MAIN}", "processor_seconds": found}


def run() -> dict:
    """Everything that can be had on this machine."""
    skipped: dict[str, str] = {}
    rows = []
    if reason := sass.obstacle():
        skipped["instructions"] = reason
    else:
        rows = cuda_rows(skipped) + triton_rows(skipped)
    results = {"rows": rows, "nvrtc": compile_seconds(skipped)}
    if reason := missing("-shared", "-fPIC"):
        skipped["launch"] = reason
    else:
        results["launch_us"] = launch_microseconds()
    for name, why in skipped.items():
        print(f"{name} is left out: {why}")
    return results | {"skipped": skipped}


def table(results: dict) -> str:
    """Instructions per weight by format, then a line about the host."""
    found = {(one["backend"], one["format"], one["arch"], one["output_dtype"]): one for one in results["rows"]}

    def per_weight(*key: str) -> str:
        return f"{found[key]['instructions_per_weight']:.1f}" if key in found else "–"

    rows = []
    for fmt in kernel_formats():
        own = [one for one in results["rows"] if one["backend"] == "cuda" and one["format"] == fmt.id]
        if not own:
            continue
        halves = [one["instructions_per_weight"] for one in own if one["output_dtype"] == "float16"]
        main = found["cuda", fmt.id, f"sm_{MAIN}", "float16"]
        rows.append(
            [
                f"`{fmt.id}`",
                per_weight("cuda", fmt.id, f"sm_{MAIN}", "float16"),
                f"{min(halves):.1f} – {max(halves):.1f}",
                *(per_weight("cuda", fmt.id, f"sm_{MAIN}", name) for name in ("bfloat16", "float32")),
                per_weight("cuda", fmt.id, "sm_75", "bfloat16"),
                per_weight("triton", fmt.id, f"sm_{MAIN}", "float16"),
                f"{main['loads_per_weight']:.2f}",
                str(max(one["spill_bytes"] for one in own)),
            ]
        )
    header = ["format", "fp16", "fp16, all", "bf16", "fp32", "bf16, sm_75", "Triton, fp16", "loads", "spilled bytes"]
    lines = [markdown_table(header, rows)] if rows else []
    if "launch_us" in results:
        times = " – ".join(f"{one['median']:.1f}" for one in sorted(results["launch_us"].values(), key=_median))
        lines.append(f"Processor time of a launch on the host, without the driver's and torch's own: {times} µs.")
    if results["nvrtc"]:
        seconds = results["nvrtc"]["processor_seconds"].values()
        version = results["nvrtc"]["version"]
        lines.append(
            f"NVRTC {version} compiles all formats for one output dtype in {min(seconds):.1f} – {max(seconds):.1f} "
            "processor seconds."
        )
    return "\n\n".join(lines)


def _median(found: dict) -> float:
    return found["median"]


if __name__ == "__main__":
    run_command(__doc__, "gpu_static", run)
