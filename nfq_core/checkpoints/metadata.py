"""What becomes of a source's metadata in a container."""

from __future__ import annotations

import json

PAGE_METADATA = ("workflow", "prompt")
"""Metadata that the ComfyUI page looks for; it stands in the container as it stood in the source."""

MAX_METADATA_BYTES = 1 << 20
"""So much of a source's metadata finds room in a container's header, as it stands there."""

MAX_METADATA_WARNINGS = 8
"""Entries left out that are named one by one."""


def split_metadata(metadata: dict[str, str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What becomes of a source's metadata.

    Returns:
        What `Source.metadata` records, what stands in the container's own metadata (PAGE_METADATA), and a warning for
        each of the longest texts where all of them are too long for the header: those are left out.
    """
    sizes = {name: _stored_bytes(name) + _stored_bytes(text) for name, text in metadata.items()}
    kept = dict(sorted(metadata.items(), key=lambda item: sizes[item[0]]))
    warnings = []
    total, left_out = sum(sizes.values()), 0
    while total > MAX_METADATA_BYTES:
        name, text = kept.popitem()
        total -= sizes[name]
        left_out += 1
        if left_out <= MAX_METADATA_WARNINGS:
            warnings.append(f"metadata {name!r} is left out: {len(text):,} characters are too many for the header")
    if left_out > MAX_METADATA_WARNINGS:
        warnings.append(f"{left_out - MAX_METADATA_WARNINGS:,} more entries of the metadata are left out")
    page = {name: kept.pop(name) for name in PAGE_METADATA if name in kept}
    return {name: metadata[name] for name in metadata if name in kept}, page, warnings


def _stored_bytes(text: str) -> int:
    """Bytes that a text takes in the header, where it stands in JSON within JSON."""
    return len(json.dumps(json.dumps(text, ensure_ascii=False), ensure_ascii=False).encode())
