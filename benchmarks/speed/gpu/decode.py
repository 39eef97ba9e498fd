"""The decode on a GPU: are the bits right, how near is it to a copy of as many bytes, which settings are best?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nfq_core import NFTensor, quantize
from nfq_core.checkpoints.examine import sqnr_db
from nfq_core.packed import backends, op, torch_decode
from nfq_core.packed.formats import FORMATS, LEVELS, format_by_id

from ...shared import channel_spread
from .part import Part, graphed, layer_formats, measure, random_packed
from .rivals import dequantize_q4_0, random_q4_0, without_bitsandbytes

ODD_SIZES = (1, 63, 64, 65, 24 * 64 + 1, 256 * 64 + 1)
LARGE_SIZES = (1280 * 1280, torch_decode.CHUNK_WEIGHTS + 65)
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}

HUGE_BYTES = 14 << 30
"""Free memory of a device on which the largest tensor that the kernel takes is tried."""

ROUNDS = 15
GRAPH_REPEATS = 5

WORD_BYTES = torch.int64.itemsize

TUNED = ("nf16_b64", "nf32_b64", "nf24_b64", "nf7_b64", "t4w8_b64", "t5w9_b64")
PROGRAM_BLOCKS = (8, 16, 32, 64, 128)
PROGRAM_WARPS = (1, 2, 4, 8)


def correctness(part: Part) -> None:
    """Every format, size and dtype: both back-ends on the device give the bits of the CPU; quantising on both."""
    backend = backends.choose(part.device)
    part.note(backend=backend.name, backend_reason=backend.reason)
    decoders: dict[str, Callable] = {"torch": torch_decode.dequantize_into}
    if not part.on_gpu:
        part.skip("triton", "Triton compiles for GPUs only")
    elif backend.name != "triton":
        part.fail("triton", RuntimeError(f"not chosen: {backend.reason}"))
    else:
        decoders["triton"] = backends.dequantize_into
    wrong: list[dict] = []
    checked = 0
    for fmt in FORMATS.values():
        for weights in ODD_SIZES if part.small else ODD_SIZES + LARGE_SIZES:
            packed = random_packed((weights,), fmt, torch.Generator().manual_seed(weights))
            data = packed.data.to(part.device)
            for dtype, integers in INTEGERS.items():
                wanted = packed.dequantize(dtype).view(integers)
                for name, decode in decoders.items():
                    found = torch.full((weights,), torch.nan, dtype=dtype, device=part.device)
                    decode(found, data, fmt)
                    different = int((found.view(integers).cpu() != wanted).sum())
                    checked += 1
                    if different:
                        case = {"decoder": name, "format": fmt.id, "weights": weights, "dtype": str(dtype)}
                        wrong.append(case | {"different": different})
        part.note(checked=checked, wrong=wrong)
    if wrong:
        part.fail("bits", AssertionError(f"{len(wrong)} of {checked} cases have other bits than the CPU: {wrong[0]}"))
    if "triton" in decoders:
        part.attempt("the largest tensor", lambda: _largest(part))
    part.attempt("quantise", lambda: _quantise_on_both(part))


def _largest(part: Part) -> None:
    """The most weights that the kernel may be given, where numbers of 32 bits are nearly used up."""
    if torch.cuda.mem_get_info(part.device)[0] < HUGE_BYTES:
        part.skip("the largest tensor", f"needs {HUGE_BYTES >> 30} GiB of free memory")
        return
    fmt = format_by_id("nf16_b64")
    packed = random_packed((backends.MAX_WEIGHTS,), fmt, torch.Generator(part.device).manual_seed(0))
    wanted = torch.empty(packed.shape, dtype=torch.float16, device=part.device)
    torch_decode.dequantize_into(wanted, packed.data, fmt)
    equal = torch.equal(packed.dequantize().view(torch.int16), wanted.view(torch.int16))
    part.note(largest_tensor={"weights": packed.numel(), "equal": equal})
    if not equal:
        raise AssertionError("the largest tensor has other bits than plain torch gives")


def _quantise_on_both(part: Part) -> None:
    """What quantising on the device and on the CPU have in common, and the error of each."""
    found = {}
    for levels in LEVELS:
        weight = channel_spread((64, 40) if part.small else (1280, 640), levels)
        here, there = quantize(weight, levels), quantize(weight.to(part.device), levels).to("cpu")
        ratios = [sqnr_db(weight, packed.dequantize(torch.float32)) for packed in (here, there)]
        different = (here.data != there.data).float().mean().item()
        found[here.format.id] = {"different_bytes": different, "cpu_db": ratios[0], "device_db": ratios[1]}
    part.note(quantise=found)
    worst = max(abs(one["cpu_db"] - one["device_db"]) for one in found.values())
    part.target("quantise: the device's error beside the CPU's", worst, 0.02, "dB")


def decode(part: Part) -> None:
    """All quantised layers of a UNet into one fp16 buffer, beside copies that move as many bytes."""
    generator = torch.Generator(part.device).manual_seed(0)
    layers = [(shape, fmt) for shape, fmt in layer_formats(part.architecture).values() if fmt is not None]
    tensors = [random_packed(shape, fmt, generator, 0.03) for shape, fmt in layers]
    weights, packed_bytes = (sum(one) for one in zip(*((t.numel(), t.nbytes) for t in tensors), strict=True))
    buffer = torch.empty(max(t.numel() for t in tensors), dtype=torch.float16, device=part.device)
    outs = [buffer[: tensor.numel()].view(tensor.shape) for tensor in tensors]
    part.note(layers=len(tensors), weights=weights, packed_bytes=packed_bytes, bytes_moved=packed_bytes + 2 * weights)

    def ours() -> None:
        for tensor, out in zip(tensors, outs, strict=True):
            tensor.dequantize(out=out)

    works = {"decode": ours, "copies": _copies(tensors, buffer), "even copies": _even_copies(tensors, part.device)}
    found = part.attempt("CUDA graphs", lambda: _as_graphs(part, works))
    if found:
        part.note(graph=found)
        ratio = found["decode"]["ms"]["median"] / found["copies"]["ms"]["median"]
        part.target("decode of all layers beside copies of as many bytes", ratio, 1.25)

    def through_operation() -> None:
        for tensor in tensors:
            op.dequantize(tensor.data, tensor.format.id, tensor.shape, torch.float16)

    def torch_only() -> None:
        for tensor, out in zip(tensors, outs, strict=True):
            torch_decode.dequantize_into(out, tensor.data, tensor.format)

    works |= {"operation": through_operation, "torch": torch_only}
    works |= _rivals(part, tensors, outs, generator)
    eager = {}
    for name, work in works.items():
        # Each for itself, so that one that fails leaves the others.
        result = part.attempt(name, lambda name=name, work=work: measure(part, {name: work}, ROUNDS)[name])
        if result:
            eager[name] = result | {"host_us_per_layer": 1e3 * result["host_ms"] / len(tensors)}
            part.note(eager=eager)


def _as_graphs(part: Part, works: dict[str, Callable[[], None]]) -> dict[str, dict]:
    graphs = {name: graphed(part.device, work) for name, work in works.items()}
    return measure(part, graphs, ROUNDS, GRAPH_REPEATS if part.on_gpu else 1)


def _copies(tensors: list[NFTensor], buffer: torch.Tensor) -> Callable[[], None]:
    """For each weight a copy that reads its packed bytes, and a fill: both write as many bytes as its decode does."""
    # Fills are fastest where words are whole and aligned: the copies go elsewhere, the last word may be too long.
    target = torch.empty(max(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=buffer.device)
    words = torch.empty(-(-buffer.nbytes // WORD_BYTES), dtype=torch.int64, device=buffer.device)
    pairs = [
        (target[: tensor.nbytes], words[: -(-(2 * tensor.numel() - tensor.nbytes) // WORD_BYTES)], tensor.data)
        for tensor in tensors
    ]

    def work() -> None:
        for to, rest, packed in pairs:
            to.copy_(packed)
            rest.zero_()

    return work


def _even_copies(tensors: list[NFTensor], device: torch.device) -> Callable[[], None]:
    """For each weight a copy that reads half of the bytes its decode moves, from memory of its own, and writes them."""
    lengths = [(tensor.nbytes + 2 * tensor.numel()) // 2 for tensor in tensors]
    source = torch.zeros(sum(lengths), dtype=torch.uint8, device=device)
    target = torch.empty(max(lengths), dtype=torch.uint8, device=device)
    pairs = [(target[: len(piece)], piece) for piece in source.split(lengths)]

    def work() -> None:
        for to, piece in pairs:
            to.copy_(piece)

    return work


def _rivals(
    part: Part, tensors: list[NFTensor], outs: list[torch.Tensor], generator: torch.Generator
) -> dict[str, Callable[[], None]]:
    blocks = [random_q4_0(tensor.shape, 0.03, generator) for tensor in tensors]

    def q4_0() -> None:
        for data, tensor in zip(blocks, tensors, strict=True):
            dequantize_q4_0(data, tensor.shape)

    reason = without_bitsandbytes()
    if reason:
        part.skip("bitsandbytes NF4", reason)
        return {"Q4_0 in torch": q4_0}

    packed: list = []

    def nf4() -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if not packed:
            packed.extend(
                quantize_4bit(t.dequantize(out=out), blocksize=64, quant_type="nf4")
                for t, out in zip(tensors, outs, strict=True)
            )
        for (data, state), out in zip(packed, outs, strict=True):
            dequantize_4bit(data, state, out=out) if part.on_gpu else dequantize_4bit(data, state)

    return {"bitsandbytes NF4": nf4, "Q4_0 in torch": q4_0}


def tuning(part: Part) -> None:
    """The kernel's launch settings: what all layers take with others than those in use."""
    if not part.on_gpu or backends.choose(part.device).name != "triton":
        part.skip("tuning", "needs Triton on a GPU")
        return
    from nfq_core.packed import triton_decode

    generator = torch.Generator(part.device).manual_seed(0)
    layers = [one for one in layer_formats(part.architecture).values() if one[1] is not None]
    found: list[dict] = []
    for format_id in TUNED:
        fmt = format_by_id(format_id)
        # Every eighth layer, all in one format.
        tensors = [random_packed(shape, fmt, generator, 0.03) for shape, _ in layers[::8]]
        buffer = torch.empty(max(t.numel() for t in tensors), dtype=torch.float16, device=part.device)

        def work(tensors: list[NFTensor] = tensors, buffer: torch.Tensor = buffer) -> None:
            for tensor in tensors:
                tensor.dequantize(out=buffer[: tensor.numel()].view(tensor.shape))

        for blocks in PROGRAM_BLOCKS:
            for warps in PROGRAM_WARPS:
                if part.left() < 0:
                    part.skip("tuning", "the rest: no time left")
                    return
                settings = {"format": fmt.id, "blocks_per_program": blocks, "warps": warps}
                triton_decode.BLOCKS_PER_PROGRAM, triton_decode.WARPS = blocks, warps
                triton_decode.constants.cache_clear()
                reading = part.attempt(
                    str(settings), lambda: measure(part, {"": graphed(part.device, work)}, 5, GRAPH_REPEATS)[""]["ms"]
                )
                if reading:
                    found.append(settings | {"ms": reading["median"]})
                    part.note(settings=found)
