"""What a container's header records about a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.container import UNRECORDED, Facts, Source
from ..models.unet import UNKNOWN, UNetInfo


def facts_about(
    info: UNetInfo | None,
    settings: Mapping[str, Any],
    source: Source = UNRECORDED,
    expected: Mapping[str, float] | None = None,
) -> Facts:
    """The header's facts about a model.

    Args:
        info: the UNet recognised in it; None for a plain state dict.
        settings: how it was quantised.
        source: the file it was made from.
        expected: what is expected of its output, see `Facts`.
    """
    if info is None:
        return Facts(dict(settings), "plain", UNKNOWN, source, dict(expected or {}))
    return Facts(dict(settings), info.layout, info.name, source, dict(expected or {}))
