"""Weights that another program has quantised: told by what lies beside them, and refused before they are packed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import NFQError
from ..tensor import QUANTIZABLE_DTYPES

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Without scales they are numbers like others; fp16 holds them exactly."""

_WAY_OUT = "take the model's fp16 or bf16 files"

_SCALED = r"(^|\.)(weight_scale|scale_weight|input_scale|scale_input|scaled_fp8|comfy_quant)$"
"""Tensors beside fp8 and int8 weights in ComfyUI's files."""

_FOREIGN = {
    "bitsandbytes": r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\..+)$|\.SCB$",
    "optimum-quanto": r"\.weight\._(data|scale)$|\.weight_qtype$",
    "SDNQ": r"\.(zero_point|svd_up|svd_down)$",
    "SVDQuant (Nunchaku)": r"\.(wscales|wtscale)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "NVIDIA ModelOpt": r"_quantizer\._(amax|scale)$",
    "fp8 in blocks": r"\.weight_scale_(inv|2)$",
}
"""Names of the tensors beside weights that other programs quantised; the first found counts."""


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """See that no names are of scales of quantised weights.

    Args:
        names: of all tensors of a source.
        where: the source as the message names it.

    Raises:
        NFQError: some are.
    """
    names = list(names)
    for kind, pattern in _FOREIGN.items():
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            raise NFQError(f"{where}: its weights are quantised already, by {kind} ({found!r}); {_WAY_OUT}")
    found = next((name for name in names if re.search(_SCALED, name)), None)
    if found is not None:
        raise NFQError(
            f"{where}: its fp8 or int8 weights have scales ({found!r}); `nfq quantize` undoes them, "
            "load_unet(FILE, FOLDER) reads its result"
        )


def refuse_integers(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """See that all weights are floating numbers.

    Args:
        tensors: of a source, by name.
        where: the source as the message names it.

    Raises:
        NFQError: a weight is of integers, or of floating numbers that are no numbers without scales.
    """
    allowed = (*QUANTIZABLE_DTYPES, *EIGHT_BIT_FLOATS)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype not in allowed:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NFQError(
                f"{where}: weight {name!r} is {kind}, quantised already by another program (such as SDNQ, torchao or "
                "bitsandbytes); {_WAY_OUT}"
            )


def refuse_other_method(config: Any, method: str) -> None:
    """See that a folder's `quantization_config` is of one method.

    Args:
        config: of `config.json`, or as diffusers holds it.
        method: the one that is allowed.

    Raises:
        NFQError: it is of another.
    """
    found = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    found = str(getattr(found, "value", found) or "an unknown method")
    if found != method:
        raise NFQError(
            f"this model's config.json says that it is quantised already, by {found}; leave quantization_config out, "
            f"or {_WAY_OUT}"
        )
