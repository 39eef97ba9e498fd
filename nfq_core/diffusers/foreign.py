"""Detect and refuse weights that another program has quantised, before they are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import NFQError, command
from ..files.prequantized import other_form, scale_name
from ..packed.tensor import QUANTIZABLE_DTYPES

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Ordinary weights if they have no scales; fp16 represents them exactly."""

_ADVICE = "use the model's fp16 or bf16 files"


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """Refuse a source that has scales of quantised weights.

    Args:
        names: names of all tensors of the source.
        where: the source, for the message.

    Raises:
        NFQError: the source has such scales.
    """
    names = list(names)
    form = other_form(names)
    if form is not None:
        raise NFQError(f"{where}: its weights are quantised already, by {form[0]} ({form[1]!r}); {_ADVICE}")
    scale = scale_name(names)
    if scale is not None:
        raise NFQError(
            f"{where}: its fp8 or int8 weights have scales ({scale!r}); convert it with {command('quantize')}, then "
            "load the result with load_unet(FILE, FOLDER)"
        )


def refuse_integers(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse a source with weights whose dtype cannot be quantised.

    Args:
        tensors: tensors of the source, by name.
        where: the source, for the message.

    Raises:
        NFQError: a weight has integers, or a floating dtype that needs scales.
    """
    allowed = (*QUANTIZABLE_DTYPES, *EIGHT_BIT_FLOATS)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype not in allowed:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NFQError(
                f"{where}: weight {name!r} is {kind}, quantised already by another program (such as SDNQ, torchao or "
                f"bitsandbytes); {_ADVICE}"
            )


def refuse_other_method(config: Any, method: str) -> None:
    """Refuse a folder whose `quantization_config` has another method.

    Args:
        config: the `quantization_config` from `config.json`, or diffusers' object for it.
        method: the allowed method.

    Raises:
        NFQError: the method is another.
    """
    actual = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    actual = str(getattr(actual, "value", actual) or "an unknown method")
    if actual != method:
        raise NFQError(
            f"this model's config.json says that it is quantised already, by {actual}; leave quantization_config out, "
            f"or {_ADVICE}"
        )
