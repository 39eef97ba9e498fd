"""A second reader of `.nfq.safetensors`, written from docs/FORMAT.md alone, with numpy, zstandard and json.

The formats' parameters and the table of mantissas are read from the document itself, so that a row added there is read
here. It is here to be compared with, so it is short rather than fast, holds a file in memory whole, and refuses with
whatever error comes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import zstandard

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "FORMAT.md"
ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| (?:\d+|–) \|", re.MULTILINE)
TABLE = re.compile(r"^`(\w+)`:\n\n((?: {4}[\da-f ]+\n)+)", re.MULTILINE)
MANTISSAS = re.compile(r"^ +M = ([\d ]+)$", re.MULTILINE)

BLOCK = 64
SUPERBLOCK = 256
PIECE = 262_144
HEADER_LIMIT = 4_194_304
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}


class UnsoundError(ValueError):
    """The file is not what docs/FORMAT.md describes."""


@dataclass(frozen=True)
class Kept:
    """A tensor as it stands in the file: dtype as safetensors names it, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Parameters:
    """One row of the document's table, for one format id."""

    id: str
    levels: int
    radix: int
    coarse_per_byte: int
    fine_bits: int

    @property
    def article(self) -> bool:
        return self.id.startswith("article")

    @property
    def trellis(self) -> tuple[int, int] | None:
        """The bits of a code and of a level's number in a trellis format; None for a scalar one."""
        name = re.fullmatch(r"t(\d+)w(\d+)_b64", self.id)
        return (int(name[1]), int(name[2])) if name else None

    def sections(self, blocks: int) -> list[int]:
        """The bytes of head, coarse plane, fine plane and scales."""
        return [
            -(-2 * self.levels // 32) * 32,
            BLOCK * -(-blocks // self.coarse_per_byte),
            BLOCK * -(-blocks * self.fine_bits // 8),
            blocks + (4 * -(-blocks // SUPERBLOCK) if self.article else 2),
        ]


@lru_cache(1)
def document() -> tuple[dict[str, Parameters], np.ndarray]:
    """The document's formats by id, and its sixteen mantissas."""
    text = DOCUMENT.read_text(encoding="utf-8")
    formats = {}
    for names, *numbers in ROW.findall(text):
        for name in re.findall(r"\w+", names):
            formats[name] = Parameters(name, *(int(number.replace(",", "")) for number in numbers))
    return formats, np.array(MANTISSAS.search(text)[1].split(), dtype=np.int64)


@lru_cache(1)
def common_levels() -> dict[str, np.ndarray]:
    """The document's tables of common levels, fp16, by format id."""
    tables = TABLE.findall(DOCUMENT.read_text(encoding="utf-8"))
    return {name: np.array([int(bits, 16) for bits in text.split()], "<u2").view("<f2") for name, text in tables}


def read(path: Path) -> dict[str, np.ndarray | Kept]:
    """All tensors of a file by key, after every checksum and bound: fp16 arrays, and kept tensors as they are."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    require(len(raw) > 8 and 8 + length <= min(len(raw), HEADER_LIMIT) and raw[8:9] == b"{", "the header's length")
    header, data = raw[: 8 + length], raw[8 + length :]
    entries = parse(header[8:].decode("utf-8"))
    metadata = entries.pop("__metadata__")
    require(all(isinstance(text, str) for text in metadata.values()), "metadata")
    facts = parse(metadata["nfq"])
    require(type(facts["container_version"]) is int and facts["container_version"] == 1, "container version")
    check_digest(header, metadata["nfq_header_sha256"])
    check_facts(facts)
    stored = {name: cut(data, entry) for name, entry in entries.items()}
    check_offsets([entry["data_offsets"] for entry in entries.values()], len(data))
    quantized, kept = facts["quantized"], facts["kept"]
    require(not any(key.startswith("nfq.") or key == "__metadata__" for key in [*quantized, *kept]), "a key")
    require(sorted(stored) == sorted([f"nfq.{key}" for key in quantized] + list(kept)), "names of the tensors")
    for name, crc32 in [(f"nfq.{key}", entry["crc32"]) for key, entry in quantized.items()] + list(kept.items()):
        require(f"{zlib.crc32(stored[name].data):08x}" == crc32, f"CRC-32 of {name}")
    tensors: dict[str, np.ndarray | Kept] = {key: stored[key] for key in kept}
    for key, entry in quantized.items():
        tensor, shape = stored[f"nfq.{key}"], entry["shape"]
        require(tensor.dtype == "U8" and len(tensor.shape) == 1, f"dtype of {key}")
        require(entry["dtype"] in ("F16", "BF16", "F32", "F64"), f"former dtype of {key}")
        fmt = document()[0][entry["format"]]
        tensors[key] = decode(fmt, tensor.data, entry["frames"], elements(shape)).reshape(shape)
    return tensors


def decode(fmt: Parameters, stored: bytes, frames: list[int], size: int) -> np.ndarray:
    """The `size` weights, fp16 and flat, of a quantised tensor's bytes."""
    require(size > 0, "a weight without elements")
    blocks = -(-size // BLOCK)
    sections = fmt.sections(blocks)
    if fmt.id in common_levels() and len(frames) == sum(-(-size // PIECE) for size in sections[1:]):
        sections[0] = 0
    head, coarse, fine, scales = unpack(stored, frames, sections)
    levels = head[: 2 * fmt.levels].view("<f2") if head.size else common_levels()[fmt.id]
    require(bool(np.isfinite(levels).all()), "levels")
    require(int(coarse.max()) < fmt.radix**fmt.coarse_per_byte, "coarse plane")
    codes = digits(coarse, fmt.radix, fmt.coarse_per_byte, blocks)
    if fmt.fine_bits:
        codes = (codes << fmt.fine_bits) + digits(fine, 1 << fmt.fine_bits, 8 // fmt.fine_bits, blocks)
    if fmt.trellis is not None:
        numbers = walk(codes, *fmt.trellis)
    else:
        require(int(codes.max()) < fmt.levels, "codes")
        numbers = codes
    if fmt.article:
        scale = article_scales(scales[:-blocks].view("<f4"), scales[-blocks:])
    else:
        exponent, stride = int(scales[-2:].view(np.int8)[0]), int(scales[-1])
        scale = logarithmic_scales(exponent, stride)[scales[:-2]]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product = levels.astype(np.float32)[numbers] * scale.astype(np.float32)[:, None]
        return product.astype(np.float16).ravel()[:size]


def unpack(stored: bytes, frames: list[int], sections: list[int]) -> list[np.ndarray]:
    """The sections of a packed buffer, uint8, from its zstd frames."""
    counts = [-(-size // PIECE) for size in sections]
    require(all(map(is_count, frames)) and len(frames) == sum(counts), "number of frames")
    require(sum(frames) == len(stored), "lengths of frames")
    lengths, start, found = iter(frames), 0, []
    for size in sections:
        plain = b""
        for first in range(0, size, PIECE):
            frame = stored[start : (start := start + next(lengths))]
            facts = zstandard.get_frame_parameters(frame)
            piece = min(PIECE, size - first)
            require(facts.content_size == piece and facts.window_size <= PIECE, "a frame's size or window")
            plain += zstandard.ZstdDecompressor().decompress(frame, max_output_size=piece, allow_extra_data=False)
        require(len(plain) == size, "a section's size")
        found.append(np.frombuffer(plain, dtype=np.uint8))
    return found


def digits(plane: np.ndarray, radix: int, per_byte: int, blocks: int) -> np.ndarray:
    """The digits (blocks, 64) of a plane: byte 64·g + j holds those of element j of blocks g·per_byte and after."""
    groups = plane.reshape(-1, 1, BLOCK).astype(np.int64)
    weights = radix ** np.arange(per_byte).reshape(1, -1, 1)
    return (groups // weights % radix).reshape(-1, BLOCK)[:blocks]


def walk(codes: np.ndarray, bits: int, window: int) -> np.ndarray:
    """The numbers of the levels (blocks, 64): `window` bits of each block's circle of codes, the current code last."""
    number = sum(np.roll(codes, back, axis=1) << (bits * back) for back in range(-(-window // bits)))
    return number % (1 << window)


def logarithmic_scales(exponent: int, stride: int) -> np.ndarray:
    """The table of 256 scales, fp16, of NF and trellis formats."""
    require(stride in (1, 2, 3) and exponent >= -14 and exponent + 126 * stride // 16 <= 15, "exponent and stride")
    steps = np.arange(127) * stride
    positive = np.exp2(exponent + steps // 16) * (1 + document()[1][steps % 16] / 1024)
    return np.concatenate([[0], positive, [0], -positive]).astype(np.float16)


def article_scales(superscales: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The scale of every block, fp32, of article formats."""
    require(bool(np.isfinite(superscales).all()), "superblock scales")
    smallest = np.maximum(scales.astype(np.float32), np.float32(1e-12))
    with np.errstate(over="ignore", under="ignore"):
        return superscales[np.arange(scales.size) // SUPERBLOCK] * smallest / np.float32(255)


def check_digest(header: bytes, digest: str) -> None:
    field = b'"nfq_header_sha256":"' + digest.encode() + b'"'
    require(re.fullmatch("[0-9a-f]{64}", digest) is not None and header.count(field) == 1, "the header's hash")
    blank = header.replace(field, field.replace(digest.encode(), b"0" * 64))
    require(hashlib.sha256(blank).hexdigest() == digest, "the header's hash")


def check_facts(facts: dict) -> None:
    """The fields that are there for people, or for programs other than a decoder."""
    source = facts["source"]
    texts = [facts["writer"], facts["layout"], facts["architecture"], source["name"], source["sha256"]]
    require(all(isinstance(text, str) for text in [*texts, *source["metadata"].values()]), "texts")
    require(isinstance(facts["settings"], dict) and is_count(source["bytes"]), "settings or source")
    sensitivities = [entry.get("sensitivity") for entry in facts["quantized"].values()]
    require(all(value is None or type(value) in (int, float) for value in sensitivities), "sensitivities")


def check_offsets(offsets: list[list[int]], size: int) -> None:
    """Tensors must lie one after the other, from the end of the header to that of the file, without holes."""
    end = 0
    for start, stop in sorted(map(tuple, offsets)):
        require(start == end, "holes or overlaps between tensors")
        end = stop
    require(end == size, "bytes behind the last tensor")


def cut(data: bytes, entry: dict) -> Kept:
    start, stop = entry["data_offsets"]
    require(is_count(start) and is_count(stop) and start <= stop <= len(data), "offsets")
    require(elements(entry["shape"]) * SIZES[entry["dtype"]] == stop - start, "a tensor's size")
    return Kept(entry["dtype"], tuple(entry["shape"]), data[start:stop])


def elements(shape: list[int]) -> int:
    require(isinstance(shape, list) and len(shape) <= 64 and all(map(is_count, shape)), "a shape")
    require(math.prod(max(1, size) for size in shape) < 1 << 63, "a shape's size")
    return math.prod(shape)


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def parse(text: str) -> dict:
    """A JSON object as the document wants it."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        require(len({name for name, _ in pairs}) == len(pairs), "a name that stands twice")
        return dict(pairs)

    def number(digits: str) -> float:
        require(math.isfinite(float(digits)), "a number beyond fp64")
        return float(digits)

    def integer(digits: str) -> int:
        require(len(digits) <= 20, "an integer of too many digits")
        return int(digits)

    def constant(name: str) -> None:
        raise UnsoundError(name)

    found = json.loads(text, object_pairs_hook=unique, parse_float=number, parse_int=integer, parse_constant=constant)
    require(isinstance(found, dict) and depth(found) <= 64, "JSON")
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def depth(value: object) -> int:
    """How many objects and lists stand in one another."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise UnsoundError(what)
