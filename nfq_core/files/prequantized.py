"""Sources with quantised weights: fp8 and int8 with scales are dequantised, other forms refused by name.

ComfyUI reads these forms: a scale `L.weight_scale` or `L.scale_weight` of `L.weight`; a marker `scaled_fp8`; JSON in a
tensor `L.comfy_quant` or in the metadata entry `_quantization_metadata`. Source: its `QUANTIZATION.md`,
`convert_old_quants` in `comfy/utils.py`, `_load_quantized_module` in `comfy/ops.py`, and comfy-kitchen's layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ..errors import AlreadyQuantizedError, CorruptFileError
from ..models.families import find_family
from ..models.unet import detect
from ..models.unet_keys import CHECKPOINT_PREFIX
from .safetensors_io import Entry
from .untrusted import parse_error_message, parse_json

QUANTIZATION_METADATA = "_quantization_metadata"
"""The metadata entry in which ComfyUI names quantised layers and their formats."""

MX_BLOCK = 32
"""Weights of one row that share a scale in mxfp8."""

ROTATION_GROUP = 256
"""Input channels that ConvRot rotates together, by default."""

MIN_PACKED_BYTES = 1024
"""Smaller integer tensors called `weight` are not packed layers."""

MAX_DESCRIPTION_BYTES = 1 << 16
"""Longest accepted `comfy_quant` tensor."""

_MARKER = "scaled_fp8"
_SCALES = (".weight_scale", ".scale_weight")
_ACTIVATION_SCALES = (".input_scale", ".scale_input")
_CONFIG = ".comfy_quant"
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "int8_tensorwise")
_EIGHT_BIT = ("F8_E4M3", "F8_E5M2", "I8")
_SCALE_DTYPES = ("F32", "F16", "BF16", "F64")

WAY_OUT = "quantise the model's fp16 or bf16 file instead"

_OTHER_FORMS = {
    "bitsandbytes": r"\.weight\.(quant_state\..+|absmax|quant_map|nested_absmax)$|\.SCB$",
    "NVFP4": r"\.weight_scale_2$",
    "asym_w4a8_int8": r"\.weight_s_rel$",
    "SVDQuant (Nunchaku)": r"\.(wscales|wtscale)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "SDNQ": r"\.(zero_point|svd_up|svd_down)$",
    "optimum-quanto": r"\.weight\._(data|scale)$|\.weight_qtype$",
    "NVIDIA ModelOpt": r"_quantizer\._(amax|scale)$",
    "fp8 in blocks": r"\.weight_scale_inv$",
    "a format with scaled inputs": r"\.pre_quant_scale$",
}
"""Unsupported programs and formats, with patterns of their tensor names; the first match counts."""


@dataclass(frozen=True)
class Scaled:
    """The scale of one quantised weight, and how to dequantise it.

    Args:
        scale: fp32; shape () for the whole tensor, (rows, 1, …) for each row, or (rows, blocks) for each MX_BLOCK
            weights of a row.
        rotation: number of input channels rotated together (ConvRot); 0: none.
    """

    scale: torch.Tensor
    rotation: int = 0

    def dequantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The dequantised weight, fp32, in the shape of the stored one."""
        dense = weight.float()
        if self.scale.ndim == 2 and self.scale.shape[1] > 1:
            return (dense.unflatten(1, (-1, MX_BLOCK)) * self.scale.unsqueeze(-1)).flatten(1)
        dense = dense * self.scale
        if not self.rotation:
            return dense
        # The rotation is orthogonal and symmetric, thus its own inverse.
        return (dense.unflatten(1, (-1, self.rotation)) @ rotation_matrix(self.rotation)).flatten(1)


@dataclass(frozen=True)
class Prequantized:
    """The quantised weights of a source.

    Args:
        weights: scale of each scaled weight, by its name.
        consumed: names of tensors that only describe other tensors, such as scales.
        dtype: safetensors dtype of the weights after dequantising, which is the one that a host computes in.
    """

    weights: Mapping[str, Scaled] = field(default_factory=dict)
    consumed: frozenset[str] = frozenset()
    dtype: str = "F16"

    def dequantized_entries(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Header entries after dequantising; offsets and `nbytes` stay those of the stored tensors."""
        return {
            key: Entry(self.dtype, entry.shape, entry.start, entry.end) if key in self.weights else entry
            for key, entry in entries.items()
            if key not in self.consumed
        }


def find_prequantized(
    entries: Mapping[str, Entry], descriptions: Iterable[str], read: Callable[[str], torch.Tensor], where: str
) -> Prequantized:
    """Find the quantised weights of a source.

    Args:
        entries: every tensor of the source by its name.
        descriptions: the QUANTIZATION_METADATA of its files.
        read: reads a stored tensor by its name; called for scales and descriptions only.
        where: name of the source in messages.

    Raises:
        AlreadyQuantizedError: weights are quantised in an unsupported form, or a scale does not fit its weight.
        CorruptFileError: a description is damaged, or a scale is missing.
    """
    _refuse_other_forms(entries, where)
    configs = _configs(entries, descriptions, read, where)
    weights, consumed = {}, set(filter(_is_marker, entries))
    consumed |= {key for key in entries if key.endswith((_CONFIG, *_ACTIVATION_SCALES)) and _layer(key) in entries}
    for suffix in _SCALES:
        for key in (key for key in entries if key.endswith(suffix)):
            weight = _layer(key)
            if weight in entries:
                consumed.add(key)
                configs.setdefault(weight, {})
    dtype = compute_dtype({key: entry for key, entry in entries.items() if key not in consumed})
    for weight, config in configs.items():
        name = config.get("format", "")
        if name and name not in _FORMATS:
            raise _refusal(where, weight, f"as {name}")
        scale_key = next((key for key in _scale_keys(weight) if key in entries), None)
        if scale_key is None:
            if name in ("mxfp8", "int8_tensorwise"):
                raise CorruptFileError(f"{where}: tensor {weight!r} is {name} without a scale; fetch it again")
            continue
        scale = _scale(entries, weight, scale_key, name == "mxfp8", read, where)
        weights[weight] = Scaled(scale, _rotation(entries[weight], weight, config, where))
    _refuse_packed(entries, weights, consumed, where)
    return Prequantized(weights, frozenset(consumed), dtype)


def compute_dtype(entries: Mapping[str, Entry]) -> str:
    """The safetensors dtype in which a host computes with a model's 8-bit weights.

    F16 for UNets, of SDXL's family and others. For other models, the more frequent 16-bit dtype in the file; if there
    is none, BF16 for the known families, which are published in it.
    """
    shapes = {key: entry.shape for key, entry in entries.items()}
    if detect(shapes) is not None:
        return "F16"
    counts = {dtype: sum(prod(e.shape) for e in entries.values() if e.dtype == dtype) for dtype in ("BF16", "F16")}
    is_bf16 = counts["BF16"] > counts["F16"] or (not any(counts.values()) and find_family(shapes) is not None)
    return "BF16" if is_bf16 else "F16"


def rotation_matrix(size: int) -> torch.Tensor:
    """ConvRot's rotation: the regular Hadamard matrix of `size`, a power of four, divided by ``sqrt(size)``."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


def _layer(key: str) -> str:
    """The weight to which a scale or description belongs."""
    return f"{key.rpartition('.')[0]}.weight"


def _scale_keys(weight: str) -> Iterable[str]:
    return (weight.removesuffix(".weight") + suffix for suffix in _SCALES)


def _refusal(where: str, key: str, how: str) -> AlreadyQuantizedError:
    return AlreadyQuantizedError(f"{where}: tensor {key!r} is quantised already {how}; {WAY_OUT}")


def other_form(names: Iterable[str]) -> tuple[str, str] | None:
    """An unsupported program or format that quantised the weights, and the tensor name that identifies it; else None.

    Args:
        names: names of all tensors of a source.
    """
    names = list(names)
    for form, pattern in _OTHER_FORMS.items():
        match = next((name for name in names if re.search(pattern, name)), None)
        if match is not None:
            return form, match
    return None


def scale_name(names: Iterable[str]) -> str | None:
    """The first name of a scale, marker or description of supported quantised weights; else None."""
    endings = (*_SCALES, *_ACTIVATION_SCALES, _CONFIG)
    return next((name for name in names if name.endswith(endings) or _is_marker(name)), None)


def _is_marker(name: str) -> bool:
    return name == _MARKER or name.endswith("." + _MARKER)


def _refuse_other_forms(entries: Mapping[str, Entry], where: str) -> None:
    # The descriptions of ComfyUI's own 4-bit formats name them more exactly.
    described = {key.removesuffix(_CONFIG) for key in entries if key.endswith(_CONFIG)}
    form = other_form(key for key in entries if key.rpartition(".")[0] not in described)
    if form:
        raise _refusal(where, form[1], f"by {form[0]}")
    for key, entry in entries.items():
        scale = entries.get(key.removesuffix(".weight") + ".scale")
        if key.endswith(".weight") and entry.dtype in (*_EIGHT_BIT, "U8") and scale is not None:
            raise _refusal(where, key, "by SDNQ")


def _refuse_packed(
    entries: Mapping[str, Entry], weights: Mapping[str, Scaled], consumed: Iterable[str], where: str
) -> None:
    """Refuse integers in place of a layer's weight: packed weights of some program."""
    for key, entry in entries.items():
        if key in weights or key in consumed or not key.endswith(".weight") or entry.dtype not in ("U8", "I8"):
            continue
        if prod(entry.shape) >= MIN_PACKED_BYTES:
            program = "GGUF or another program" if entry.dtype == "U8" else "an unknown program"
            raise _refusal(where, key, f"by {program} ({entry.dtype} without a scale)")


def _configs(
    entries: Mapping[str, Entry], descriptions: Iterable[str], read: Callable[[str], torch.Tensor], where: str
) -> dict[str, dict[str, Any]]:
    """The source's description of each quantised weight, by the weight's name."""
    configs: dict[str, Any] = {}
    try:
        for text in descriptions:
            for layer, config in _object(_object(parse_json(text))["layers"]).items():
                names = (f"{prefix}{layer}.weight" for prefix in ("", CHECKPOINT_PREFIX))
                configs |= {name: config for name in names if name in entries}
        for key, entry in entries.items():
            if key.endswith(_CONFIG) and _layer(key) in entries:
                if entry.dtype not in ("U8", "I8") or prod(entry.shape) > MAX_DESCRIPTION_BYTES:
                    raise ValueError(f"tensor {key!r} is not a description")
                configs[_layer(key)] = parse_json(bytes(read(key).view(torch.uint8).flatten().tolist()).decode())
        for config in configs.values():
            if not isinstance(_object(config).get("format", ""), str):
                raise ValueError("a format is not text")
    except (ValueError, KeyError, RecursionError) as error:
        reason = parse_error_message(error)
        raise CorruptFileError(
            f"{where}: its description of quantised layers is damaged ({reason}); fetch it again"
        ) from None
    return configs


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a description is not a JSON object")
    return value


def _scale(
    entries: Mapping[str, Entry],
    weight: str,
    key: str,
    blocks: bool,
    read: Callable[[str], torch.Tensor],
    where: str,
) -> torch.Tensor:
    """Read the scale of a weight, in the shape for `Scaled`."""
    entry, shape = entries[key], entries[weight].shape
    stored = f"{entry.dtype} {list(entry.shape)}"
    misfit = AlreadyQuantizedError(
        f"{where}: scale {key!r} ({stored}) does not fit its weight {list(shape)}; {WAY_OUT}"
    )
    if entries[weight].dtype not in (*_EIGHT_BIT, *_SCALE_DTYPES):
        raise _refusal(where, weight, f"as {entries[weight].dtype} with a scale")
    if blocks:
        if len(shape) != 2 or shape[1] % MX_BLOCK or entry.dtype not in ("U8", "F8_E8M0"):
            raise misfit
        bias = entries.get(weight.removesuffix("weight") + "bias")
        rows, columns = shape[0], shape[1] // MX_BLOCK
        if prod(entry.shape) != -(-rows // 128) * -(-columns // 4) * 512 or (bias and bias.shape != (rows,)):
            raise misfit
        return _unswizzled(read(key).view(torch.uint8), rows, columns)
    if entry.dtype not in _SCALE_DTYPES:
        raise misfit
    if prod(entry.shape) == 1:
        return read(key).float().reshape(())
    if not shape or entry.shape[:1] != shape[:1] or prod(entry.shape) != shape[0]:
        raise misfit
    return read(key).float().reshape(-1, *[1] * (len(shape) - 1))


def _unswizzled(codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Block scales, fp32 of shape (rows, columns), from E8M0 codes in cuBLAS' tiles of 128 rows and 4 columns.

    In a tile, byte 16 (r mod 32) + 4 (r div 32) + c is the scale of row r and column c (cuBLAS: "1D block scaling
    factors layout").
    """
    tiles = codes.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    ordered = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :columns]
    exponents = ordered.to(torch.int32) - 127
    scales = torch.ldexp(torch.ones(rows, columns), exponents)
    return torch.where(ordered == 255, torch.nan, scales)


def _rotation(entry: Entry, weight: str, config: Mapping[str, Any], where: str) -> int:
    parameters = config.get("params")
    values = {**(parameters if isinstance(parameters, dict) else {}), **config}
    if config.get("format") != "int8_tensorwise" or not values.get("convrot"):
        return 0
    size = values.get("convrot_groupsize", ROTATION_GROUP)
    # 4**7 exceeds the input channels of any layer.
    is_power_of_four = isinstance(size, int) and size in (4**n for n in range(1, 8))
    if not is_power_of_four or len(entry.shape) != 2 or entry.shape[1] % size:
        raise AlreadyQuantizedError(
            f"{where}: tensor {weight!r} {list(entry.shape)} cannot be rotated in groups of {size!r}; {WAY_OUT}"
        )
    return size
