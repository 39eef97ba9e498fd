"""What a container's header records about a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.container import UNRECORDED, Facts, Source
from ..files.safetensors_io import Entry
from ..files.writer import Plan
from ..models.components import model_name
from ..models.unet import UNetInfo


def facts_about(
    info: UNetInfo | None,
    tensors: Mapping[str, Entry | Plan],
    settings: Mapping[str, Any],
    source: Source = UNRECORDED,
    expected: Mapping[str, float] | None = None,
) -> Facts:
    """The header's facts about a model.

    Args:
        info: the UNet recognised in it; None for a model of another family or a plain state dict.
        tensors: all its tensors by name.
        settings: how it was quantised.
        source: the file it was made from.
        expected: what is expected of its output, see `Facts`.
    """
    layout = info.layout if info else "plain"
    return Facts(
        dict(settings),
        layout,
        model_name(info, {key: tensor.shape for key, tensor in tensors.items()}),
        source,
        dict(expected or {}),
    )
