"""The decode on a GPU: are the bits right, and how long does it take compared with copies?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from samples import random_buffer

from nfq_core import NFTensor, quantize
from nfq_core.checkpoints.examine import sqnr_db
from nfq_core.packed import backends, op, torch_decode
from nfq_core.packed.formats import FORMATS, LEVELS, format_by_id

from ...shared import channel_spread, milliseconds, unavailable
from .part import Part, graphed, random_state
from .rivals import dequantize_q4_0, random_q4_0

ODD_SIZES = (1, 63, 64, 65, 24 * 64 + 1, 256 * 64 + 1)
LARGE_SIZES = (1280 * 1280, torch_decode.CHUNK_WEIGHTS + 65)
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
HUGE_BYTES = 14 << 30  # Free memory that the largest tensor of the kernel needs
ROUNDS = 15


def correctness(part: Part) -> None:
    """Every format, size and dtype: do both back-ends on the device give the bits of the CPU? Quantising on both."""
    backend = backends.backend_for(part.device)
    decoders: dict[str, Callable] = {"torch": torch_decode.dequantize_into}
    if not part.on_gpu:
        part.skipped["triton"] = "Triton compiles for GPUs only"
    elif backend.name != "triton":
        part.failures["triton"] = f"not chosen: {backend.reason}"
    else:
        decoders["triton"] = backends.dequantize_into
    wrong: list[dict] = []
    checked = 0
    for fmt, weights in product(FORMATS.values(), ODD_SIZES if part.small else ODD_SIZES + LARGE_SIZES):
        packed = NFTensor(random_buffer(fmt.id, weights, weights), fmt, (weights,), torch.float16)
        data = packed.data.to(part.device)
        for (dtype, integers), (name, decode) in product(INTEGERS.items(), decoders.items()):
            found = torch.full((weights,), torch.nan, dtype=dtype, device=part.device)
            decode(found, data, fmt)
            different = int((found.view(integers).cpu() != packed.dequantize(dtype).view(integers)).sum())
            checked += 1
            if different:
                case = {"decoder": name, "format": fmt.id, "weights": weights, "dtype": str(dtype)}
                wrong.append(case | {"different": different})
    if wrong:
        part.failures["bits"] = f"{len(wrong)} of {checked} cases have other bits than the CPU: {wrong[0]}"
    part.results |= {"backend": backend.name, "backend_reason": backend.reason, "checked": checked, "wrong": wrong}
    if "triton" in decoders:
        part.attempt("the largest tensor", lambda: _largest(part))
    part.attempt("quantise", lambda: _quantise_on_both(part))


def _largest(part: Part) -> None:
    """Decode the most weights that the kernel takes: its 32-bit indices are nearly used up."""
    if torch.cuda.mem_get_info(part.device)[0] < HUGE_BYTES:
        part.skipped["the largest tensor"] = f"needs {HUGE_BYTES >> 30} GiB of free memory"
        return
    fmt = format_by_id("nf16_b64")
    sections, sample = fmt.sections(backends.MAX_WEIGHTS), random_buffer(fmt.id, 64)
    data = torch.randint(0, 256, (sections.end,), dtype=torch.uint8, device=part.device)
    data[: sections.coarse] = sample[: sections.coarse].to(part.device)
    found, wanted = (torch.empty(backends.MAX_WEIGHTS, dtype=torch.float16, device=part.device) for _ in range(2))
    backends.dequantize_into(found, data, fmt)
    torch_decode.dequantize_into(wanted, data, fmt)
    if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
        raise AssertionError("the largest tensor has other bits than in plain torch")


def _quantise_on_both(part: Part) -> None:
    """The error of quantising on the CPU and on the device."""
    found = {}
    for levels in LEVELS:
        weight = channel_spread((64, 40) if part.small else (1280, 640), levels)
        here, there = quantize(weight, levels), quantize(weight.to(part.device), levels).to("cpu")
        ratios = (sqnr_db(weight, packed.dequantize(torch.float32)) for packed in (here, there))
        found[here.format.id] = dict(zip(("cpu_db", "device_db"), ratios, strict=True))
    part.results["quantise"] = found


def decode(part: Part) -> None:
    """All quantised layers of a UNet into one fp16 buffer, copies that move as many bytes, and the peers' decodes."""
    tensors = [tensor for tensor in random_state(part).values() if isinstance(tensor, NFTensor)]
    buffer = torch.empty(max(t.numel() for t in tensors), dtype=torch.float16, device=part.device)
    outs = [buffer[: tensor.numel()].view(tensor.shape) for tensor in tensors]
    moved = sum(tensor.nbytes + 2 * tensor.numel() for tensor in tensors)
    part.results |= {"layers": len(tensors), "bytes_moved": moved, "eager": {}}

    def ours() -> None:
        for tensor, out in zip(tensors, outs, strict=True):
            tensor.dequantize(out=out)

    def through_operation() -> None:
        for tensor in tensors:
            op.dequantize(tensor.data, tensor.format.id, tensor.shape, torch.float16)

    def torch_only() -> None:
        for tensor, out in zip(tensors, outs, strict=True):
            torch_decode.dequantize_into(out, tensor.data, tensor.format)

    works = {"decode": ours, "copies": _copies(tensors, buffer)}

    def as_graphs() -> dict[str, dict]:
        return milliseconds({name: graphed(part.device, work) for name, work in works.items()}, part.device, ROUNDS)

    part.results["graph"] = part.attempt("CUDA graphs", as_graphs) or {}
    works |= {"operation": through_operation, "torch": torch_only, **_rivals(part, tensors, outs)}
    for name, work in works.items():
        # One at a time, so that one that fails leaves the others.
        found = part.attempt(name, lambda name=name, work=work: milliseconds({name: work}, part.device, ROUNDS))
        part.results["eager"] |= found or {}


def _copies(tensors: list[NFTensor], buffer: torch.Tensor) -> Callable[[], None]:
    """For each weight a copy that reads its packed bytes, and a fill: together they write as much as the decode."""
    # Fills are fastest with whole aligned words, so that copies need a target of their own; the last word may be long.
    target = torch.empty(max(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=buffer.device)
    words = torch.empty(-(-buffer.nbytes // 8), dtype=torch.int64, device=buffer.device)
    pairs = [(t.data, target[: t.nbytes], words[: -(-(2 * t.numel() - t.nbytes) // 8)]) for t in tensors]

    def work() -> None:
        for packed, to, rest in pairs:
            to.copy_(packed)
            rest.zero_()

    return work


def _rivals(part: Part, tensors: list[NFTensor], outs: list[torch.Tensor]) -> dict[str, Callable[[], None]]:
    blocks = [random_q4_0(tensor.shape, 0.03, part.device) for tensor in tensors]

    def q4_0() -> None:
        for data, tensor in zip(blocks, tensors, strict=True):
            dequantize_q4_0(data, tensor.shape)

    reason = unavailable("bitsandbytes")
    if reason:
        part.skipped["bitsandbytes NF4"] = reason
        return {"Q4_0 in torch": q4_0}
    packed: list = []

    def nf4() -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if not packed:
            for tensor, out in zip(tensors, outs, strict=True):
                packed.append(quantize_4bit(tensor.dequantize(out=out), blocksize=64, quant_type="nf4"))
        for (data, state), out in zip(packed, outs, strict=True):
            dequantize_4bit(data, state, out=out) if part.on_gpu else dequantize_4bit(data, state)

    return {"bitsandbytes NF4": nf4, "Q4_0 in torch": q4_0}
