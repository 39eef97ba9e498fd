"""Weights that another program has quantised: told by what lies beside them, and refused before they are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import NFQError
from ..files.prequantized import other_form, scale_name
from ..packed.tensor import QUANTIZABLE_DTYPES

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Without scales they are numbers like others; fp16 holds them exactly."""

_WAY_OUT = "take the model's fp16 or bf16 files"


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """See that no names are of scales of quantised weights.

    Args:
        names: of all tensors of a source.
        where: the source as the message names it.

    Raises:
        NFQError: some are.
    """
    names = list(names)
    form = other_form(names)
    if form is not None:
        raise NFQError(f"{where}: its weights are quantised already, by {form[0]} ({form[1]!r}); {_WAY_OUT}")
    found = scale_name(names)
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
                f"bitsandbytes); {_WAY_OUT}"
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
