"""Metadata of a source: which entries a container keeps, and where."""

from __future__ import annotations

import json

PAGE_METADATA = ("workflow", "prompt")
"""Entries that the ComfyUI page reads; a container keeps them as its own metadata, unchanged."""

MAX_METADATA_BYTES = 1 << 20
"""Most bytes that a container's header spends on a source's metadata, as encoded there."""

MAX_METADATA_WARNINGS = 8
"""Most omitted entries that are named one by one."""


def split_metadata(metadata: dict[str, str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Divide a source's metadata between the container's facts and its own metadata.

    The longest entries are omitted if all together exceed MAX_METADATA_BYTES.

    Returns:
        The entries for `Source.metadata`, the entries for the container's own metadata (PAGE_METADATA), and a warning
        for each omitted one.
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
    """Bytes of a text in the header, which encodes it as JSON within JSON."""
    return len(json.dumps(json.dumps(text, ensure_ascii=False), ensure_ascii=False).encode())
