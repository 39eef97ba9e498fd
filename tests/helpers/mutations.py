"""What could be wrong with a file: changes drawn at random, many of them made true by a right hash and right checksums.

Every draw comes from a `random.Random`, so that hypothesis can stand behind it, or a seed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import zstandard
from forging import Draft, compressed, plain, signed, split

from nfq_core.files.container import FACTS_KEY, HASH_KEY, NO_SHA256
from nfq_core.files.safetensors_io import METADATA_KEY
from nfq_core.packed.formats import FORMATS

VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 63, 64, 65, 255, 256, 1 << 18, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63),
    *(10**19, -(10**18), 0.0, -0.0, 1.5, 64.0, 1e308, True, False, None, [], {}, [[]], [0], [64, 64], {"a": {}}),
    *("", "0", "U8", "F16", "BF16", "F64", "BOOL", "F8_E8M0", "F99", "Z16", "nf16_b64", "nf7_b64", "t4w8_b64", "../a"),
    *("article7_b64", "__metadata__", "nfq.weight", "weight", "/etc/passwd", "..\\a", "\x1b[2J", "a\nb", "\u202eb"),
    *(
        "\0",
        "é",
        "a" * 300,
        "0" * 64,
        "00000000",
        [1] * 65,
        [1 << 62] * 9,
        [1 << 31, 1 << 31, 2],
        [0, 1 << 62, 1 << 62],
    ),
)
"""What a field may become: sizes at the edges of integers, other types, other formats, names that reach elsewhere."""

NAMES = ("sensitivity", "baked", "imported", "levels", "target_bpw", "workflow", "__metadata__", "nfq", "weight") * 4
"""Fields that a sound file may have, but the ones here do not."""

TEXTS = ("NaN", "Infinity", "1e999", "-0", "1" * 21, "9" * 5000, "[" * 70 + "]" * 70, "[" * 2000, '"\\ud800"')
"""JSON, or what looks like it, that no `json.dumps` writes."""


def mutated(rng: Random, sound: bytes) -> bytes:
    """A container that may be wrong in one to three ways, or in none after all."""
    if rng.random() < 0.2:
        return damaged(rng, sound)
    draft = Draft.of(sound)
    changes = (_edit_header, _edit_facts, _edit_facts, _change_frames, _change_buffer, _change_offsets, _edit_metadata)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(changes)(rng, draft)
    if rng.random() < 0.1:
        return damaged(rng, draft.data())
    if rng.random() < 0.2:
        return _with_odd_text(rng, draft)
    return draft.data()


def damaged(rng: Random, data: bytes) -> bytes:
    """A file some of whose bytes are lost, changed, doubled or added, nothing being made true."""
    data = bytearray(data)
    start, length = rng.randrange(len(data)), rng.randrange(1, 65)
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:]
    elif kind == 2:
        del data[start : start + length]
    elif kind == 3:
        data[start:start] = data[start : start + length]
    elif kind == 4:
        data[start : start + length] = bytes(length)
    elif kind == 5:
        data += bytes(data) if rng.random() < 0.5 else rng.randbytes(length)
    else:
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 7, len(data), 1 << 22, 100_000_000, 1 << 63, (1 << 64) - 1)))
    return bytes(data)


def mutated_plain(rng: Random, sound: bytes, inner: str = "") -> bytes:
    """A safetensors file without checksums that may be wrong, its header, or the JSON in its metadata `inner`."""
    if rng.random() < 0.3:
        return damaged(rng, sound)
    header, payload = split(sound)
    payload = bytearray(payload)
    facts = json.loads(header[METADATA_KEY][inner]) if inner else {}
    for _ in range(rng.choice((1, 1, 2))):
        if inner and rng.random() < 0.5:
            _edit(rng, facts)
        elif payload and rng.random() < 0.6:
            start = rng.randrange(len(payload))
            piece = rng.choice((rng.randbytes(4), b"\xff" * 8, bytes(8), struct.pack("<f", 3e38)))
            payload[start : start + len(piece)] = piece[: len(payload) - start]
        else:
            _edit(rng, header)
    if inner and isinstance(header.get(METADATA_KEY), dict):
        header[METADATA_KEY][inner] = json.dumps(facts)
    return plain(header, bytes(payload))


def _place(rng: Random, value: dict | list) -> tuple[dict | list, Any]:
    """A place in JSON that is not empty, as what holds it and its name or number there: far up or deep down."""
    while True:
        name = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[name]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return value, name
        value = inner


def _edit(rng: Random, value: dict) -> None:
    """Change, remove, rename, add, swap or double something in JSON."""
    if not value:
        return
    holder, name = _place(rng, value)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[name]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(rng.choice(VALUES))] = holder.pop(name)
    elif kind == 2 and isinstance(holder, dict):
        holder[str(rng.choice((*NAMES, *VALUES)))] = deepcopy(rng.choice(VALUES))
    elif kind == 3 and isinstance(holder[name], int):
        holder[name] += rng.choice((-1, 1, 64, -holder[name] * 2, holder[name]))
    elif kind == 4:
        other, place = _place(rng, value)
        holder[name], other[place] = deepcopy(other[place]), deepcopy(holder[name])
    else:
        holder[name] = deepcopy(rng.choice(VALUES))


def _edit_header(rng: Random, draft: Draft) -> None:
    tensors = {name: entry for name, entry in draft.header.items() if name != METADATA_KEY}
    _edit(rng, tensors)
    draft.header = tensors | {METADATA_KEY: draft.header[METADATA_KEY]}


def _edit_metadata(rng: Random, draft: Draft) -> None:
    metadata = draft.header[METADATA_KEY]
    others = {name: text for name, text in metadata.items() if name not in (HASH_KEY, FACTS_KEY)} | {"x": "y"}
    _edit(rng, others)
    draft.header[METADATA_KEY] = others | {name: metadata[name] for name in (HASH_KEY, FACTS_KEY)}


def _edit_facts(rng: Random, draft: Draft) -> None:
    _edit(rng, draft.facts)


def _change_offsets(rng: Random, draft: Draft) -> None:
    entries = [entry for name, entry in draft.header.items() if name != METADATA_KEY and isinstance(entry, dict)]
    if entries:
        sizes = [0, 1, len(draft.payload()), 1 << 40, 1 << 63, -1]
        rng.choice(entries)["data_offsets"] = [rng.choice(sizes), rng.choice(sizes)]


def _settled(change: Callable[[Random, Draft], None]) -> Callable[[Random, Draft], None]:
    """A change of bytes after which the header tells the truth about them, or not."""

    def changed(rng: Random, draft: Draft) -> None:
        before = json.dumps([draft.header, draft.facts])
        try:
            change(rng, draft)
            if rng.random() < 0.9:
                draft.settle()
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, zstandard.ZstdError):
            # What an earlier change has left cannot be told the truth about.
            draft.header, draft.facts = json.loads(before)

    return changed


@_settled
def _change_frames(rng: Random, draft: Draft) -> None:
    """Frames lost, doubled, swapped, cut, added, or of other contents than they should have."""
    frames = draft.frames[rng.choice(list(draft.frames))]
    i, j = rng.randrange(len(frames)), rng.randrange(len(frames))
    kind = rng.randrange(9)
    content = _content(frames[i])
    if kind == 0:
        del frames[i]
    elif kind == 1:
        frames.insert(j, frames[i])
    elif kind == 2:
        frames[i], frames[j] = frames[j], frames[i]
    elif kind == 3:
        frames[i] = damaged(rng, frames[i])
    elif kind == 4:
        frames[i] = compressed(bytes(rng.choice((0, 1, len(content), 1 << 18, 1 << 24))))
    elif kind == 5:
        frames[i] = compressed(content, write_content_size=False)
    elif kind == 6:
        frames[i] = compressed(content, write_checksum=True, level=rng.choice((-5, 1, 19)))
    elif kind == 7:
        # A skippable frame; and one after which others follow.
        frames[i] = rng.choice((b"\x50\x2a\x4d\x18" + struct.pack("<I", len(content)) + content, frames[i] * 2))
    else:
        frames[i] = _claiming(frames[i], rng.choice((0, 1, len(content) + 1, 1 << 18, 1 << 31, (1 << 64) - 1)))


def _content(frame: bytes) -> bytes:
    """What a frame holds; ValueError for one that an earlier change has made to claim too much."""
    if zstandard.get_frame_parameters(frame).content_size > 1 << 24:
        raise ValueError("no frame to open")
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=1 << 20)


def _claiming(frame: bytes, size: int) -> bytes:
    """A frame whose header says that it holds `size` bytes (RFC 8878, 3.1.1.1: a descriptor, window, eight bytes)."""
    blocks = frame[zstandard.frame_header_size(frame) :]
    return frame[:4] + bytes([0b11000000 | frame[4] & 4, 0x40]) + struct.pack("<Q", size) + blocks


@_settled
def _change_buffer(rng: Random, draft: Draft) -> None:
    """Bytes of a packed buffer that no writer makes: levels, exponent and stride, planes, scales."""
    key = rng.choice(list(draft.frames))
    frames = draft.frames[key]
    number = rng.randrange(len(frames))
    content = bytearray(_content(frames[number]))
    levels = FORMATS[draft.facts["quantized"][key]["format"]].levels
    kind = rng.randrange(5)
    start = rng.randrange(len(content))
    if kind == 0:
        even = start // 2 * 2
        half = rng.choice((0x7C00, 0xFC00, 0x7E00, 0x7D01, 0x7BFF, 0xFBFF, 0x0001, 0x8000, 0))
        content[even : even + 2] = struct.pack("<H", half)[: len(content) - even]
    elif kind == 1 and len(content) > 2 * levels + 1:
        content[2 * levels] = rng.randrange(256)
        content[2 * levels + 1] = rng.choice((0, 1, 2, 3, 4, 255))
    elif kind == 2:
        single = struct.pack("<f", rng.choice((3.4e38, -1.0, 1e-45, 0.0)))
        content[start // 4 * 4 : start // 4 * 4 + 4] = single[: len(content) - start // 4 * 4]
    elif kind == 3:
        content[start : start + 64] = bytes([rng.randrange(256)]) * len(content[start : start + 64])
    else:
        content[start] ^= 1 << rng.randrange(8)
    frames[number] = compressed(bytes(content))


def _with_odd_text(rng: Random, draft: Draft) -> bytes:
    """A container in whose JSON, outer or inner, stands what `json.dumps` does not write; its hash is right."""
    facts = json.dumps(draft.facts)
    if rng.random() < 0.5:
        return draft.data(_odd(rng, facts))
    header = draft.header_with()
    header[METADATA_KEY] |= {HASH_KEY: NO_SHA256}
    return signed(_odd(rng, json.dumps(header, separators=(",", ":"))), draft.payload())


def _odd(rng: Random, text: str) -> str:
    kind = rng.randrange(4)
    place = rng.randrange(1, len(text))
    if kind == 0:
        # A number, if there is one from here on, becomes something else.
        digits = next((i for i in range(place, len(text)) if text[i].isdigit() and not text[i - 1].isalnum()), 0)
        return text[:digits] + rng.choice(TEXTS) + text[digits:].lstrip("0123456789") if digits else text
    if kind == 1:
        # An object has its first name twice.
        start = text.find('{"', place) + 1
        end = text.find(":", start)
        return f"{text[:start]}{text[start:end]}:0,{text[start:]}" if 0 < start < end else text
    if kind == 2:
        return text[:-1] + ',"x":' + rng.choice(TEXTS) + "}"
    return text[:place] + rng.choice(' \t\n,:{}[]"\\\0é\ufeff') + text[place:]
