"""The decode on a GPU: are the bits right, and how long does it take compared with copies?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from samples import random_buffer

from nfq_core import NFTensor, quantize
from nfq_core.decibels import sqnr_db
from nfq_core.packed import backends, op, torch_decode
from nfq_core.packed.formats import FORMATS, LEVELS, format_by_id

from ...shared import channel_spread, milliseconds, unavailable
from .part import Part, dequantize_q4_0, graphed, random_q4_0, random_state

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
        part.skipped["kernel"] = "kernels are for GPUs only"
    elif backend.name == "torch":
        part.failures["kernel"] = f"not chosen: {backend.reason}"
    else:
        decoders["kernel"] = backends.dequantize_into
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
    if "kernel" in decoders:
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
    data[-2:] = sample[-2:].to(part.device)
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
    blocks = [random_q4_0(tensor.shape, 0.03, part.device) for tensor in tensors]
    nf4: list = []

    def each(work: Callable[..., object], *lists: list) -> Callable[[], None]:
        def call() -> None:
            for items in zip(*lists, strict=True):
                work(*items)

        return call

    def bitsandbytes() -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if not nf4:
            for tensor, out in zip(tensors, outs, strict=True):
                nf4.append(quantize_4bit(tensor.dequantize(out=out), blocksize=64, quant_type="nf4"))
        for (data, state), out in zip(nf4, outs, strict=True):
            dequantize_4bit(data, state, out=out) if part.on_gpu else dequantize_4bit(data, state)

    works = {"decode": each(lambda tensor, out: tensor.dequantize(out=out), tensors, outs)}
    works["copies"] = each(_copy, *_copies(tensors, buffer))

    def as_graphs() -> dict[str, dict]:
        return milliseconds({name: graphed(part.device, work) for name, work in works.items()}, part.device, ROUNDS)

    part.results["graph"] = part.attempt("CUDA graphs", as_graphs) or {}
    works |= {
        "operation": each(lambda t: op.dequantize(t.data, t.format.id, t.shape, torch.float16), tensors),
        "torch": each(lambda t, out: torch_decode.dequantize_into(out, t.data, t.format), tensors, outs),
        "bitsandbytes NF4": bitsandbytes,
        "Q4_0 in torch": each(lambda data, tensor: dequantize_q4_0(data, tensor.shape), blocks, tensors),
    }
    if reason := unavailable("bitsandbytes"):
        part.skipped["bitsandbytes NF4"] = reason
        del works["bitsandbytes NF4"]
    for name, work in works.items():
        # One at a time, so that one that fails leaves the others.
        found = part.attempt(name, lambda name=name, work=work: milliseconds({name: work}, part.device, ROUNDS))
        part.results["eager"] |= found or {}


def _copies(tensors: list[NFTensor], buffer: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """For each weight its packed bytes, a target for them, and words to fill: as many bytes as the decode writes."""
    # Fills are fastest with whole aligned words, so that copies need a target of their own; the last word may be long.
    target = torch.empty(max(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=buffer.device)
    words = torch.empty(-(-buffer.nbytes // 8), dtype=torch.int64, device=buffer.device)
    fills = [words[: -(-(2 * tensor.numel() - tensor.nbytes) // 8)] for tensor in tensors]
    return [tensor.data for tensor in tensors], [target[: tensor.nbytes] for tensor in tensors], fills


def _copy(packed: torch.Tensor, target: torch.Tensor, words: torch.Tensor) -> None:
    target.copy_(packed)
    words.zero_()
