"""The parts of `gpu.py`: the bits of every format; the decode; a step of SDXL's UNet; conversion and loading."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from independent_reader import common_levels
from reference import decode as reference_decode
from safetensors.torch import load_file, save_file
from samples import TINY, random_buffer

import nfq_core
from nfq_core import NFTensor
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.files.container import SUFFIX
from nfq_core.models.unet_keys import SDXL_BASE, UNetArchitecture, tensor_shapes
from nfq_core.packed import backends, torch_decode
from nfq_core.packed.formats import FORMATS, WRITABLE_IDS, format_by_id
from nfq_core.planning.settings import Settings

from ..shared import WEIGHT_STD, summary, synchronize, timed, unavailable
from .gpu_models import BY_LEVELS, contestants, dequantize_q4_0, own_bytes, random_q4_0, random_state, step_of

EFFORTS = ("fast", "best")
SIDE, SMALL_SIDE = 128, 16  # Sides of the latents; SDXL draws 1024 pixels from 128
SIZES, LARGE_SIZE = (1, 63, 64, 65, 24 * 64 + 1), 1280 * 1280
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
HUGE_BYTES = 14 << 30  # Free memory that the largest tensor of a kernel needs
ROUNDS, SECONDS_PER_WORK = 15, 4.0

Result = TypeVar("Result")


@dataclass
class Part:
    """One part at work, and what it has found so far.

    Args:
        device: the device to measure.
        small: tiny shapes, to try the script.
        folder: for files, shared by the parts of a run.
        deadline: from this time on, in `time.time()`, nothing more is begun.
        save: called with the part after each piece of work.
    """

    device: torch.device
    small: bool
    folder: Path
    deadline: float = float("inf")
    save: Callable[[Part], None] = lambda part: None
    results: dict = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether there are CUDA graphs, kernels and separate memory."""
        return self.device.type == "cuda"

    @property
    def architecture(self) -> UNetArchitecture:
        """The UNet to measure."""
        return TINY if self.small else SDXL_BASE

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """Return what `work` returns; if it fails or no time is left, record why and return None."""
        try:
            if time.time() < self.deadline:
                return work()
            self.skipped[name] = "no time left"
        except TimeoutError as error:
            self.skipped[name] = str(error)
        except Exception as error:
            places = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(place.filename).name}:{place.lineno}" for place in reversed(places))
            self.failures[name] = f"{type(error).__name__}: {str(error).strip()[:600]} ({where})"
        finally:
            self.save(self)
        return None

    def times(self, work: Callable[[], object]) -> dict:
        """The `summary` of a work's milliseconds until the device has finished it, after two calls to warm up."""

        def run() -> None:
            work()
            synchronize(self.device)

        run()
        run()
        end, taken = min(time.time() + SECONDS_PER_WORK, self.deadline), []
        while not taken or (len(taken) < ROUNDS and time.time() < end):
            taken.append(1000 * timed(run))
        return summary(taken)

    def graph_times(self, work: Callable[[], object]) -> dict:
        """`times` of a work that uses the same memory at every call, as a CUDA graph: without the host's part."""
        if not self.on_gpu:
            return self.times(work)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self.times(graph.replay)


def bits(part: Part) -> None:
    """Do plain torch and the chosen back-end give the reference's bits in every format, size and dtype?"""
    backend = backends.backend_for(part.device)
    decoders = {"torch": torch_decode.dequantize_into}
    if backend.name != "torch":
        decoders[backend.name] = backends.dequantize_into
    elif part.on_gpu:
        part.failures["kernel"] = f"plain torch decodes: {backend.reason}"
    part.results |= {"backend": backend.name, "reason": backend.reason, "checked": 0, "wrong": []}
    common = common_levels()
    for fmt in FORMATS.values():
        for levels in [None, common[fmt.id]] if fmt.has_common_levels else [None]:
            for weights in SIZES if part.small else (*SIZES, LARGE_SIZE):
                name = f"{fmt.id}, {weights:,} weights{'' if levels is None else ', common levels'}"
                part.attempt(name, partial(_check, part, decoders, fmt.id, levels, weights))
    if part.on_gpu and backend.name != "torch":
        part.attempt("the largest tensor", lambda: _check_largest(part))


def _check(part: Part, decoders: Mapping[str, Callable], format_id: str, levels: object, weights: int) -> None:
    fmt = format_by_id(format_id)
    data = random_buffer(format_id, weights, weights, own_levels=levels is None)
    wanted = torch.from_numpy(reference_decode(data.numpy(), format_id, weights, levels))
    packed = data.to(part.device)
    for (dtype, integers), (name, decode_into) in product(INTEGERS.items(), decoders.items()):
        found = torch.full((weights,), torch.nan, dtype=dtype, device=part.device)
        decode_into(found, packed, fmt)
        different = int((found.view(integers).cpu() != wanted.to(dtype).view(integers)).sum())
        part.results["checked"] += 1
        if different:
            case = {"decoder": name, "dtype": str(dtype), "common_levels": levels is not None, "different": different}
            part.results["wrong"].append({"format": format_id, "weights": weights, **case})
            raise AssertionError(f"{name}, {dtype}: {different:,} of {weights:,} weights differ from the reference")


def _check_largest(part: Part) -> None:
    """Decode the most weights that a kernel takes: its 32-bit indices are nearly used up."""
    if torch.cuda.mem_get_info(part.device)[0] < HUGE_BYTES:
        part.skipped["the largest tensor"] = f"needs {HUGE_BYTES >> 30} GiB of free memory"
        return
    packed = _random_packed("nf16_b64", (backends.MAX_WEIGHTS,), part.device)
    found, wanted = (torch.empty(backends.MAX_WEIGHTS, dtype=torch.float16, device=part.device) for _ in range(2))
    backends.dequantize_into(found, packed.data, packed.format)
    torch_decode.dequantize_into(wanted, packed.data, packed.format)
    if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
        raise AssertionError("the largest tensor has other bits than in plain torch")


def _random_packed(format_id: str, shape: Sequence[int], device: torch.device) -> NFTensor:
    """A weight with random bytes as codes and scales, made on the device."""
    fmt = format_by_id(format_id)
    sections, sample = fmt.sections(prod(shape)), random_buffer(format_id, 64)
    data = torch.randint(0, 256, (sections.end,), dtype=torch.uint8, device=device)
    data[: sections.coarse] = sample[: sections.coarse].to(device)
    data[-2:] = sample[-2:].to(device)
    return NFTensor(data, fmt, shape, torch.float16)


def decode(part: Part) -> None:
    """The decode of the largest layer in every format and of all layers, beside copies of as many bytes and peers."""
    formats, model = part.results["formats"], part.results["model"] = {}, {}
    state = random_state(part.architecture)
    shape = max((tensor.shape for tensor in state.values()), key=prod)
    for format_id in WRITABLE_IDS:
        found = part.attempt(format_id, partial(_format_times, part, format_id, shape))
        formats |= {format_id: found} if found else {}
    tensors = [tensor.to(part.device) for tensor in state.values() if isinstance(tensor, NFTensor)]
    part.results |= {"weights": prod(shape), "layers": len(tensors)}
    works = _model_works(part, tensors)
    if reason := unavailable("bitsandbytes"):
        part.skipped["bitsandbytes NF4"] = reason
        del works["bitsandbytes NF4"]
    for name, work in works.items():
        model |= {name: found} if (found := part.attempt(name, lambda work=work: part.times(work))) else {}


def _model_works(part: Part, tensors: Sequence[NFTensor]) -> dict[str, Callable[[], object]]:
    """What to time on all layers, by name: the decodes, peers' decodes, and copies of as many bytes."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors), dtype=torch.float16, device=part.device)
    outs = [buffer[: tensor.numel()].view(tensor.shape) for tensor in tensors]
    copies = [_copy_of(tensor, buffer) for tensor in tensors]
    blocks = [random_q4_0(tensor.shape, WEIGHT_STD, part.device) for tensor in tensors]
    nf4: list = []

    def bitsandbytes() -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if not nf4:
            nf4.extend(quantize_4bit(tensor.dequantize(), blocksize=64, quant_type="nf4") for tensor in tensors)
        for (data, state), out in zip(nf4, outs, strict=True):
            dequantize_4bit(data, state, out=out) if part.on_gpu else dequantize_4bit(data, state)

    return {
        "decode": lambda: [tensor.dequantize(out=out) for tensor, out in zip(tensors, outs, strict=True)],
        "copies": lambda: [copy() for copy in copies],
        "torch": lambda: [
            torch_decode.dequantize_into(o, t.data, t.format) for t, o in zip(tensors, outs, strict=True)
        ],
        "bitsandbytes NF4": bitsandbytes,
        "Q4_0 in torch": lambda: [dequantize_q4_0(data, t.shape) for data, t in zip(blocks, tensors, strict=True)],
    }


def _format_times(part: Part, format_id: str, shape: Sequence[int]) -> dict[str, dict]:
    """Milliseconds of a weight's decode, of copying as many bytes, and of the decode in plain torch."""
    packed = _random_packed(format_id, shape, part.device)
    out = torch.empty(shape, dtype=torch.float16, device=part.device)
    return {
        "decode": part.graph_times(lambda: packed.dequantize(out=out)),
        "copies": part.graph_times(_copy_of(packed, out)),
        "torch": part.times(lambda: torch_decode.dequantize_into(out, packed.data, packed.format)),
    }


def _copy_of(packed: NFTensor, out: torch.Tensor) -> Callable[[], None]:
    """A function that reads and writes as many bytes as a decode: copies the packed ones, fills the rest of `out`."""
    target = out.view(-1).view(torch.uint8)
    # Fills are fastest with whole aligned words.
    start, end = -(-packed.nbytes // 256) * 256, 2 * packed.numel() // 8 * 8
    rest = target[start : max(start, end)].view(torch.int64)

    def copy() -> None:
        target[: packed.nbytes].copy_(packed.data)
        rest.zero_()

    return copy


def step(part: Part) -> None:
    """A step with every kind of layers, one model after the other, and whether results that have to be equal are."""
    makers, outputs = contestants(part.architecture, part.device), {}
    found = part.results["contestants"] = {}
    if reason := unavailable("bitsandbytes"):
        part.skipped["bitsandbytes NF4"] = reason
        del makers["bitsandbytes NF4"]
    for name, make in makers.items():
        found[name] = {}
        outputs[name] = part.attempt(name, lambda make=make, one=found[name]: _step(part, make(), one))
        # A model refers to itself.
        gc.collect()
    part.attempt("differences", lambda: _compare(part, outputs))


def _step(part: Part, unet: torch.nn.Module, found: dict) -> torch.Tensor:
    """Memory and time of a UNet's step, added to `found`; returns its result on the CPU."""
    call = step_of(unet, part.device, SMALL_SIDE if part.small else SIDE)
    output = call().float().cpu()
    if not output.isfinite().all():
        raise AssertionError("the step's result is not finite")
    found["own_bytes"] = own_bytes(unet, part.device)
    if part.on_gpu:
        synchronize(part.device)
        torch.cuda.reset_peak_memory_stats(part.device)
        before = torch.cuda.memory_allocated(part.device)
        call()
        synchronize(part.device)
        found["step_bytes"] = torch.cuda.max_memory_allocated(part.device) - before
    found["ms"] = part.times(call)
    return output


def _compare(part: Part, outputs: Mapping[str, torch.Tensor | None]) -> None:
    """Packed and offloaded layers compute what dense ones do, bit for bit; LoRAs change it."""
    pairs = {(name, "resident"): True for name in ("fp16", "packed", "packed, offloaded", "fp16, offloaded")}
    pairs |= {(f"packed, {loras}", "packed"): False for loras in ("1 LoRA", "4 LoRAs")}
    pairs["packed, offloaded, 1 LoRA", "packed, 1 LoRA"] = True
    found, wrong = part.results.setdefault("differences", {}), []
    for (name, other), equal in pairs.items():
        if outputs.get(name) is not None and outputs.get(other) is not None:
            difference = found[f"{name} − {other}"] = (outputs[name] - outputs[other]).abs().amax().item()
            wrong += [f"{name} − {other}: {difference}"] if (difference == 0) != equal else []
    if wrong:
        raise AssertionError(f"results that should be equal differ, or the other way round: {', '.join(wrong)}")


def convert(part: Part) -> None:
    """Convert an fp16 file of SDXL's shapes on the device, at both efforts."""
    source = part.attempt("source", lambda: _dense_file(part))
    for effort in EFFORTS if source else ():
        part.attempt(effort, partial(_convert, part, source, effort))


def _dense_file(part: Part) -> Path:
    """The fp16 file of this run's folder, of random weights; made on the device if it is missing."""
    path = part.folder / "unet.safetensors"
    if not path.exists():
        generator, device = torch.Generator(part.device).manual_seed(0), part.device
        state = {}
        for name, shape in tensor_shapes(part.architecture, "ldm").items():
            state[name] = (torch.randn(shape, generator=generator, device=device) * WEIGHT_STD).half().cpu()
        save_file(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return path


def _convert(part: Part, source: Path, effort: str) -> None:
    target, device = part.folder / f"{effort}{SUFFIX}", str(part.device)
    found, started = part.results.setdefault(effort, {}), time.perf_counter()

    def progress(done: int, total: int, name: str) -> None:
        found.update(seconds=time.perf_counter() - started, fraction=done / total)
        part.save(part)
        if time.time() > part.deadline:
            raise TimeoutError(f"no time left after {found['fraction']:.0%} of the bytes")

    quantize_file(source, target, Settings(effort=effort), device=device, progress=progress)
    found.update(seconds=time.perf_counter() - started, fraction=1.0, file_bytes=target.stat().st_size)


def load(part: Part) -> None:
    """Load a packed file and the fp16 file from the page cache to the device."""
    packed_file, dense_file = part.folder / f"fast{SUFFIX}", part.attempt("source", lambda: _dense_file(part))
    if not packed_file.exists():
        state = random_state(part.architecture)
        part.attempt("packed file", lambda: nfq_core.save(state, packed_file, settings=BY_LEVELS.as_dict()))
    works = {
        "NFQ": lambda: nfq_core.load(packed_file, device=part.device),
        "NFQ, resident": lambda: nfq_core.load(packed_file, device=part.device, memory="resident"),
        "fp16, safetensors": lambda: load_file(dense_file, device=str(part.device)),
    }
    found = part.results["ms"] = {}
    for name, work in works.items():
        found |= {name: one} if (one := part.attempt(name, lambda work=work: part.times(work))) else {}
