"""Containers taken apart, changed and put together again, everything in them being true: files that lie on purpose."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from nfq_core.files.container import FACTS_KEY, HASH_KEY, NO_SHA256, PREFIX, header_hash
from nfq_core.files.safetensors_io import METADATA_KEY


def split(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def compressed(content: bytes, **options: Any) -> bytes:
    """One frame of `content`, made with options of zstd's."""
    return zstandard.ZstdCompressor(**options).compress(content)


def plain(header: dict | str, payload: bytes = b"") -> bytes:
    """A safetensors file of a header, which may be no JSON at all, and what follows it."""
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + payload


def signed(header: dict | str, payload: bytes = b"") -> bytes:
    """`plain`, with the header's hash, where it has one, made right: in a text, that of 64 zeros."""
    if isinstance(header, dict) and HASH_KEY in header.get(METADATA_KEY, {}):
        header[METADATA_KEY][HASH_KEY] = NO_SHA256
    raw = plain(header)
    return raw.replace(NO_SHA256.encode(), header_hash(raw, NO_SHA256).encode() or NO_SHA256.encode(), 1) + payload


@dataclass
class Draft:
    """A container taken apart.

    `header` and `facts` are its JSON, `facts` being what `header` has as text; `kept` holds the bytes of kept tensors,
    `frames` the frames of quantised ones, by their own names.
    """

    header: dict
    facts: dict
    kept: dict[str, bytes] = field(default_factory=dict)
    frames: dict[str, list[bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> Draft:
        """A sound container."""
        header, payload = split(data)
        draft = cls(header, json.loads(header[METADATA_KEY][FACTS_KEY]))
        for name, entry in header.items():
            if name == METADATA_KEY:
                continue
            start, end = entry["data_offsets"]
            key = name.removeprefix(PREFIX)
            if key in draft.facts["quantized"]:
                draft.frames[key] = []
                for length in draft.facts["quantized"][key]["frames"]:
                    draft.frames[key].append(payload[start : start + length])
                    start += length
            else:
                draft.kept[name] = payload[start:end]
        return draft

    def settle(self) -> None:
        """Have the header tell the truth about the tensors' bytes: offsets, lengths of frames, checksums."""
        position = 0
        for key, data in self.kept.items():
            self.header[key]["data_offsets"] = [position, position := position + len(data)]
            self.facts["kept"][key] = f"{zlib.crc32(data):08x}"
        for key, frames in self.frames.items():
            data = b"".join(frames)
            offsets = [position, position := position + len(data)]
            self.header[PREFIX + key] |= {"shape": [len(data)], "data_offsets": offsets}
            self.facts["quantized"][key] |= {"frames": list(map(len, frames)), "crc32": f"{zlib.crc32(data):08x}"}

    def payload(self) -> bytes:
        """What follows the header."""
        return b"".join([*self.kept.values(), *(frame for frames in self.frames.values() for frame in frames)])

    def header_with(self, facts: str | None = None) -> dict:
        """The header with `facts`, by default its own, as text in it."""
        text = json.dumps(self.facts, separators=(",", ":"), ensure_ascii=False) if facts is None else facts
        return self.header | {METADATA_KEY: self.header[METADATA_KEY] | {FACTS_KEY: text}}

    def data(self, facts: str | None = None) -> bytes:
        """The whole file, its header's hash right."""
        return signed(self.header_with(facts), self.payload())


def forge(path: Path, target: Path, change, *, sign: bool = True) -> Path:
    """A copy of a container whose header is changed, its hash being made right again.

    `change` is called with header and facts, and may return other facts: an object, or a text.
    """
    draft = Draft.of(path.read_bytes())
    payload = draft.payload()
    facts = change(draft.header, draft.facts) or draft.facts
    header = draft.header_with(facts if isinstance(facts, str) else json.dumps(facts, separators=(",", ":")))
    target.write_bytes((signed if sign else plain)(header, payload))
    return target


def replaced(path: Path, target: Path, key: str, make) -> Path:
    """A copy of a container whose tensor `key` has other frames, which `make` makes of its own, the header true."""
    draft = Draft.of(path.read_bytes())
    draft.frames[key] = make(draft.frames[key])
    draft.settle()
    target.write_bytes(draft.data())
    return target
