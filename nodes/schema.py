"""What the nodes' schemas share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

CATEGORY = "NFQ"

NOTHING = "(none)"
"""The choice of no file."""


def schema(*, search_aliases: list[str], **arguments: Any) -> io.Schema:
    """A node's schema; hosts before 0.22 know no search aliases, and do not repeat what a cached node showed."""
    newer = {"search_aliases": search_aliases, "has_intermediate_output": True}
    known = {name: value for name, value in newer.items() if name in io.Schema.__dataclass_fields__}
    return io.Schema(category=CATEGORY, **known, **arguments)
