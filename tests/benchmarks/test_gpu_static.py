"""Counting machine code; and the published counts keep what the documents promise."""

from __future__ import annotations

import pytest

from benchmarks.shared import read_results
from benchmarks.speed import gpu_static, sass
from nfq_core.packed import cuda_decode
from nfq_core.packed.cuda_decode import OUTPUTS, blocks_per_unit, kernel_formats
from nfq_core.packed.formats import format_by_id

SASS = """
	.headerflags	@"EF_CUDA_SM86"
		Function : decode
	.headerflags	@"EF_CUDA_SM86"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
                                                                             /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDG.E.64 R6, [R14.64+0x40] ;               /* 0x00000a0000017a02 */
        /*0020*/                   LDG.E.U8 R2, [R8.64] ;                     /* 0x00000a0000017a02 */
        /*0030*/                   LDG.E R3, [R8.64] ;                        /* 0x00000a0000017a02 */
        /*0040*/               @P0 BRA 0x20 ;                                 /* 0x00000a0000017a02 */
        /*0050*/               @P1 STG.E.128 [R2.64], R4 ;                    /* 0x00000a0000017a02 */
        /*0060*/                   EXIT ;                                     /* 0x00000a0000017a02 */
        /*0070*/                   BRA 0x70;                                  /* 0x00000a0000017a02 */
        /*0080*/                   NOP;                                       /* 0x00000a0000017a02 */
		..........


		Function : other
	.headerflags	@"EF_CUDA_SM86"
        /*0000*/                   EXIT ;                                     /* 0x00000a0000017a02 */
"""

USAGE = """
Resource usage:
 Common:
  GLOBAL:0 CONSTANT[3]:32
 Function decode:
  REG:40 STACK:16 SHARED:1536 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function other:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_machine_code_is_counted() -> None:
    found = sass.parsed(SASS, USAGE)
    kernel = found["decode"]
    assert len(kernel.instructions) == 7, "without the padding after EXIT"
    assert kernel.widths("LDG") == {"64": 1, "8": 1, "32": 1} and kernel.widths("STG") == {"128": 1}
    assert (kernel.count("LDG"), kernel.loops(), kernel.spill_bytes, kernel.registers) == (3, 1, 16, 40)
    assert found["other"].instructions == ["EXIT"] and found["other"].spill_bytes == 0


def test_a_compiler_s_refusal_is_a_reason() -> None:
    if reason := sass.obstacle():
        pytest.skip(reason)
    assert "error" in sass.compiled("no program", 86)
    kernel = sass.kernels(sass.compiled('extern "C" __global__ void f(int* a) { a[threadIdx.x] = 7; }', 86))["f"]
    assert kernel.count("STG") == 1 and not kernel.spill_bytes


def test_what_is_missing_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(sass, "tool", lambda name: "")
    monkeypatch.setattr(gpu_static, "missing", lambda *flags: "g++ is not installed")
    monkeypatch.setattr(gpu_static, "compile_seconds", lambda skipped: {})
    results = gpu_static.run()
    assert results["skipped"] == {"instructions": "nvcc and cuobjdump not installed", "launch": "g++ is not installed"}
    assert results["rows"] == [] and gpu_static.table(results) == ""


def published() -> list[dict]:
    return [one for one in read_results("gpu_static")["rows"] if one["backend"] == "cuda"]


def test_every_kernel_is_published() -> None:
    found = {(one["format"], one["arch"], one["output_dtype"]) for one in published()}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in OUTPUTS]
    architectures = [f"sm_{number}" for number in gpu_static.ARCHITECTURES]
    assert found == {(fmt.id, arch, dtype) for fmt in kernel_formats() for arch in architectures for dtype in dtypes}


def test_published_kernels_neither_spill_nor_loop_and_store_wide_words() -> None:
    for one in published():
        assert one["spill_bytes"] == 0 and one["loops"] == 0, one
        assert one["store_bits"].keys() == {"128"}, one


def test_published_kernels_read_no_code_byte_by_byte() -> None:
    """A thread reads two bytes of scale parameters and its share of the scales; all codes come in words."""
    for one in published():
        fmt = format_by_id(one["format"])
        scales = -(-blocks_per_unit(fmt) * cuda_decode.COLUMNS // 64)
        assert one["load_bits"]["8"] == 2 + scales, one
        words = blocks_per_unit(fmt) // fmt.coarse_digits + (blocks_per_unit(fmt) // (fmt.fine_digits or 1 << 30))
        assert one["load_bits"]["64"] == words, one
        assert one["load_bits"].get("32", 0) == (words if fmt.window else 0), one


def test_published_kernels_need_few_instructions() -> None:
    """At sm_86 and fp16: 9 per weight for scalar formats, 12 for trellis formats and for digits of base 6."""
    for fmt in kernel_formats():
        most = 12 if fmt.window or fmt.coarse_radix == 6 else 9
        (one,) = (
            one
            for one in published()
            if (one["format"], one["arch"], one["output_dtype"]) == (fmt.id, "sm_86", "float16")
        )
        assert one["instructions_per_weight"] <= most, one
