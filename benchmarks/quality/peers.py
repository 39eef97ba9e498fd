"""The contestants: our formats, the article's, and the peers' own code if it is installed.

Bytes of a weight are its codes, scales, zero points, codebooks and padding, but no tables that all weights share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nfq_core import NFTensor, quantize
from nfq_core.files.article import article_dequantize, article_disk_bytes, article_quantize
from nfq_core.packed.codec import encode
from nfq_core.packed.formats import LEVELS, WRITABLE_IDS, article_format
from nfq_core.planning.settings import DEFAULTS

from ..shared import unavailable
from . import ggml

GROUP = 64  # Weights per scale, for peers where the user chooses
ROTATIONS = (256, 64, 16)  # Columns that comfy-kitchen rotates together; 256 in ComfyUI
OURS, ARTICLE, PALETTE = "NFQ", "article", "palettisation"
PALETTE_ROUNDS = 100


class Stored(NamedTuple):
    """A weight as decoded, its bytes in a file, and its bytes packed in memory."""

    weight: torch.Tensor
    disk_bytes: int
    packed_bytes: int


class Contestant(NamedTuple):
    """One setting of one program, or one of our formats at one effort."""

    name: str
    family: str
    store: Callable[[torch.Tensor], Stored]
    format: str = ""
    effort: str = ""

    @property
    def ours(self) -> bool:
        """Whether this is one of our formats."""
        return self.family == OURS


def stored(tensor: NFTensor) -> Stored:
    """One of our packed weights."""
    frames = encode(tensor.data, tensor.sections)
    return Stored(tensor.dequantize(), sum(map(len, frames)), tensor.nbytes)


def our_formats(effort: str) -> list[Contestant]:
    """All our formats at one effort; a name is the format id, and the effort if it is not the default."""

    def store(id: str, weight: torch.Tensor) -> Stored:
        return stored(quantize(weight, format=id, effort=effort))

    suffix = "" if effort == DEFAULTS.effort else f", {effort}"
    return [Contestant(id + suffix, OURS, partial(store, id), id, effort) for id in WRITABLE_IDS]


def article(weight: torch.Tensor, levels: int) -> Stored:
    """The article's format: on disk as its code writes it, packed as our importer keeps it."""
    tensor = article_quantize(weight, levels)
    packed = article_format(levels).packed_bytes(weight.numel())
    return Stored(article_dequantize(tensor), article_disk_bytes(tensor), packed)


def packaged(families: Iterable[str]) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants of some families of PACKAGES; the reason for each family left out, which is printed too."""
    contestants, skipped = [], {}
    for family in families:
        package, make = PACKAGES[family]
        reason = unavailable(package)
        try:
            contestants += [] if reason else make()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = f"{package} is not as expected ({type(error).__name__}: {error})"
        if reason:
            skipped[family] = reason
            print(f"{family} is left out: {reason}")
    return contestants, skipped


def peers() -> tuple[list[Contestant], dict[str, str]]:
    """All peers; the reason for each family left out."""
    contestants = [Contestant(f"article {n}", ARTICLE, partial(article, levels=n)) for n in LEVELS]
    contestants += [Contestant(f"palette {bits} bit", PALETTE, partial(palette, bits=bits)) for bits in (4, 3, 2)]
    found, skipped = packaged(PACKAGES)
    return contestants + found, skipped


def ggml_stored(weight: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> Stored:
    """One of ggml's types; its bytes in a GGUF file are those in memory."""
    decoded, nbytes = ggml.round_trip(weight, name, importance)
    return Stored(decoded, nbytes, nbytes)


def _ggml() -> list[Contestant]:
    ggml.library()
    return [Contestant(name, "GGUF", partial(ggml_stored, name=name)) for name in ggml.TYPES]


def _bitsandbytes() -> list[Contestant]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def store(weight: torch.Tensor) -> Stored:
        packed, state = quantize_4bit(weight.half(), blocksize=GROUP, compress_statistics=True, quant_type="nf4")
        nbytes = sum(part.nbytes for part in (packed, state.absmax, state.state2.absmax, state.offset))
        return Stored(dequantize_4bit(packed, state), nbytes, nbytes)

    return [Contestant("NF4", "bitsandbytes", store)]


def _hqq() -> list[Contestant]:
    from hqq.core.quantize import Quantizer

    def store(bits: int, weight: torch.Tensor) -> Stored:
        flat = weight.float().reshape(-1)
        groups = F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
        codes, meta = Quantizer.quantize(groups, nbits=bits, group_size=GROUP, axis=1, device="cpu")
        codes, meta = Quantizer.cpu(codes, meta)
        nbytes = codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
        decoded = Quantizer.dequantize(codes, meta).reshape(-1)[: flat.numel()].view(weight.shape)
        return Stored(decoded, nbytes, nbytes)

    return [Contestant(f"HQQ {bits} bit", "HQQ", partial(store, bits)) for bits in (4, 3)]


def _sdnq() -> list[Contestant]:
    from sdnq.quantizer import sdnq_quantize_layer_weight

    def store(dtype: str, options: dict[str, bool], weight: torch.Tensor) -> Stored:
        # SDNQ chooses the groups. Unsigned codes and fp16 scales have the least error at a size.
        kind = "Linear" if weight.dim() == 2 else "Conv2d"
        decode, parts = sdnq_quantize_layer_weight(
            weight.half(),
            layer_class_name=kind,
            weights_dtype=dtype,
            torch_dtype=torch.float16,
            dequantize_fp32=False,
            **options,
        )
        nbytes = sum(part.nbytes for part in parts.values() if part is not None)
        return Stored(decode(**parts, dtype=torch.float32, skip_compile=True), nbytes, nbytes)

    kinds = {"": {}, " Hadamard": {"use_hadamard": True}, " codebook": {"use_codebook": True}}
    return [
        Contestant(f"SDNQ uint{bits}{kind}", "SDNQ" + kind, partial(store, f"uint{bits}", options))
        for kind, options in kinds.items()
        for bits in (3, 4, 5, 6)
    ]


def _kitchen() -> list[Contestant]:
    import comfy_kitchen as kitchen
    from comfy_kitchen.backends.eager import quantization as int8

    def rotation(weight: torch.Tensor) -> int:
        """Columns rotated together: the most of those that the package offers and that fit; 0 if none do."""
        return next((size for size in ROTATIONS if not weight[0].numel() % size), 0)

    def w4a8(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
        codes, scales, channels, correction, codebook = kitchen.quantize_w4a8_int8_weight(
            weight, convrot_groupsize=size
        )
        parts = [part for part in (codes, scales, channels, correction, codebook) if part is not None]
        decoded = kitchen.dequantize_w4a8_int8_weight(
            codes, scales, channels, codebook, correction, convrot_groupsize=size, output_dtype=torch.float32
        )
        return decoded, sum(part.nbytes for part in parts)

    def convrot(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
        codes, scales = int8.quantize_int8_convrot_weight(weight, size)
        return int8.dequantize_int8_convrot_weight(codes, scales, size), codes.nbytes + scales.nbytes

    def store(make: Callable[[torch.Tensor, int], tuple[torch.Tensor, int]], weight: torch.Tensor) -> Stored:
        size = rotation(weight)
        if not size:
            return Stored(weight.half(), 2 * weight.numel(), 2 * weight.numel())
        decoded, nbytes = make(weight.float().flatten(1), size)
        return Stored(decoded.view(weight.shape), nbytes, nbytes)

    return [
        Contestant("W4A8", "comfy-kitchen", partial(store, w4a8)),
        Contestant("int8 ConvRot", "comfy-kitchen", partial(store, convrot)),
    ]


def _torch_int8() -> list[Contestant]:
    from torch.ao.quantization import default_weight_observer

    def store(weight: torch.Tensor) -> Stored:
        observer = default_weight_observer()
        observer(weight.float())
        scale, zero = observer.calculate_qparams()
        decoded = torch.fake_quantize_per_tensor_affine(weight.float(), scale.item(), int(zero), -128, 127)
        nbytes = weight.numel() + scale.nbytes + zero.nbytes
        return Stored(decoded, nbytes, nbytes)

    return [Contestant("int8", "torch", store)]


def palette(weight: torch.Tensor, bits: int) -> Stored:
    """Apple's palettisation as we understand it, not its code: each weight has a table of 2^bits fp16 numbers.

    Lloyd's algorithm finds the table on the weight's distinct fp16 values, starting from quantiles.
    """
    values, numbers, counts = torch.unique(weight.detach().half().float(), return_inverse=True, return_counts=True)
    values = values.double()
    share, mass = (F.pad(part.double().cumsum(0), (1, 0)) for part in (counts, counts * values))
    wanted = (torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits) * share[-1]
    table = values[torch.searchsorted(share[1:], wanted)]
    for _ in range(PALETTE_ROUNDS):
        bounds = torch.searchsorted(values, (table[1:] + table[:-1]) / 2)
        edges = F.pad(F.pad(bounds, (1, 0)), (0, 1), value=len(values))
        members = share[edges].diff()
        moved = torch.where(members > 0, mass[edges].diff() / members.clamp_min(1), table)
        if torch.equal(moved, table):
            break
        table = moved
    nearest = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
    nbytes = -(-weight.numel() * bits // 8) + 2 * len(table)
    return Stored(table.half()[nearest[numbers]].view(weight.shape), nbytes, nbytes)


PACKAGES: dict[str, tuple[str, Callable[[], list[Contestant]]]] = {
    "GGUF": ("xllamacpp", _ggml),
    "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "HQQ": ("hqq", _hqq),
    "SDNQ": ("sdnq", _sdnq),
    "comfy-kitchen": ("comfy_kitchen", _kitchen),
    "torch": ("torch", _torch_int8),
}
"""By family: the package that it needs, and the function that makes its contestants."""
