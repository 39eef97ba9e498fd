"""Files that attack their reader, each made by a few lines: `make_all` writes them into a folder.

What only damages a container or a header is in `tests/files/test_container.py`, `test_safetensors_io.py` and
`tests/packed/test_codec.py`, one file per refusal. Here is what aims at the reader's machine: its
time, memory, terminal and files.
"""

from __future__ import annotations

import bz2
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from forging import Draft, compressed, plain, split
from samples import TINY, random_half

import nfq_core
from nfq_core.calibration.statistics import CALIBRATION_KEY, Calibration, LayerInputs
from nfq_core.files.article import write_article_file
from nfq_core.files.container import FACTS_KEY
from nfq_core.files.safetensors_io import METADATA_KEY
from nfq_core.models.unet_keys import CHECKPOINT_PREFIX, tensor_shapes

MEBIBYTE = 1 << 20

TERMINAL = "\x1b]0;owned\x07\x1b[2J\x1b[31mverified: all sound\x1b[0m"
"""Sets a terminal's title, clears it, and writes what it likes."""

NAMES = {
    "parent": "../../../../tmp/nfq-attack",
    "absolute": "/tmp/nfq-attack",
    "backslashes": "..\\..\\nfq-attack",
    "drive": "C:\\nfq-attack",
    "device": "CON",
    "terminal": TERMINAL,
    "lines": "a\nnfq: all sound\r",
    "nul": "a\0b",
    "c1": "\x9b2J",
    "turned round": "\u202etxt.exe\u2066",
    "invisible": "a\u200b\ufeff",
    "long": "a" * 100_000,
    "empty": "",
    "dots": "..",
    "markup": '<img src=x onerror="alert(1)">',
    "format": "%s%n{0}{name}",
}
"""What a tensor may be called."""


def sound() -> Draft:
    """A container of one weight and one bias."""
    return Draft.of(_sound())


@lru_cache(1)
def _sound() -> bytes:
    tensors = {"a.weight": nfq_core.quantize(random_half(16, 64)), "a.bias": random_half(7)}
    return written(lambda path: nfq_core.save(tensors, path))


def written(write: Callable[[Path], object]) -> bytes:
    """The bytes of a file that `write` makes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "a")
        return (Path(folder) / "a").read_bytes()


def changed(change: Callable[[dict, dict], object]) -> bytes:
    """The sound container with header and facts changed, its hash right."""
    draft = sound()
    change(draft.header, draft.facts)
    return draft.data()


def with_text(old: str, new: str) -> bytes:
    """The sound container with other text in its facts."""
    draft = sound()
    facts = json.dumps(draft.facts)
    assert old in facts
    return draft.data(facts.replace(old, new, 1))


def named(key: str) -> bytes:
    """The sound container, its weight called otherwise."""
    draft = sound()
    draft.header[f"nfq.{key}"] = draft.header.pop("nfq.a.weight")
    draft.facts["quantized"][key] = draft.facts["quantized"].pop("a.weight")
    draft.frames[key] = draft.frames.pop("a.weight")
    return draft.data()


def with_frames(format_id: str, shape: list[int], frames: list[bytes]) -> bytes:
    """A container of one weight with these frames, all that its header says of them being true."""
    draft = sound()
    draft.frames["a.weight"] = frames
    draft.facts["quantized"]["a.weight"] |= {"format": format_id, "shape": shape}
    draft.settle()
    return draft.data()


def everywhere(text: str) -> bytes:
    """The sound container with `text` wherever a file can say something about itself."""

    def change(header: dict, facts: dict) -> None:
        for name in ("writer", "layout", "architecture"):
            facts[name] = text
        facts["settings"] = {text: text, "baked": [text], "levels": {"toString": text}}
        facts["source"] |= {"name": text, "sha256": text, "metadata": {text: text}}
        header[METADATA_KEY] |= {"workflow": text, text: text}

    return changed(change)


def text_encoders(count: int) -> dict:
    """A header with this many text encoders of empty weights."""
    names = ("text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.embeddings.token_embedding.weight")
    return _without_data(f"p{number}.{name}" for number in range(count) for name in names)


def families_of_blocks(count: int) -> dict:
    """A header of a model of a known family, with this many kinds of blocks, each with one of a high number."""
    marks = ("head.modulation", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight")
    return _without_data((*marks, *(f"a{number}blocks.9999.w.weight" for number in range(count))))


def _without_data(names: Iterable[str]) -> dict:
    return {name: {"dtype": "F16", "shape": [0, 64], "data_offsets": [0, 0]} for name in names}


def huge_weight(piece: int = 262_144) -> bytes:
    """Frames for 64 GiB, each a byte: more than most machines have, from a file of 300 kB."""
    pieces = (64 << 30) // piece
    blocks = pieces * piece // 16
    draft = sound()
    sizes = [-(-size // piece) for size in (544, blocks * 16, blocks)]
    draft.frames["a.weight"] = [b"\x28"] * sum(sizes)
    draft.facts["quantized"]["a.weight"] |= {"format": "t2w8_b64", "shape": [blocks, 64]}
    draft.settle()
    return draft.data()


def calibration(change: Callable[[dict, dict], object] | None = None, **arguments: torch.Tensor) -> bytes:
    """A calibration of one weight of shape (16, 64) with the given importance or correlation, its facts changed."""
    given = {"importance": torch.ones(64), "correlation": torch.eye(64).half()} | arguments
    data = written(Calibration({"a.weight": LayerInputs(rows=100, **given)}).save)
    if change is None:
        return data
    header, payload = split(data)
    facts = json.loads(header[METADATA_KEY][CALIBRATION_KEY])
    change(header, facts)
    header[METADATA_KEY][CALIBRATION_KEY] = json.dumps(facts)
    return plain(header, payload)


def article(**parts: bytes) -> bytes:
    """An article's file of one weight, some of its parts replaced by other bytes."""
    weights = {"a.weight": random_half(16, 64)}
    header, stored = split(written(lambda path: write_article_file(path, weights, 16, 32)))
    position, payload = 0, b""
    for name, entry in header.items():
        part = name.rpartition(".")[2]
        content = parts.get(part, stored[slice(*entry["data_offsets"])])
        width = {"I64": 8, "I32": 4, "F32": 4, "U8": 1}[entry["dtype"]]
        entry |= {"shape": [len(content) // width], "data_offsets": [position, position + len(content)]}
        payload += content
        position += len(content)
    return plain(header, payload)


def unet(others: dict[str, tuple[int, ...]]) -> bytes:
    """Plain tensors of no elements or a few, under a UNet's names, beside others."""
    shapes = {name: (0,) * len(shape) for name, shape in tensor_shapes(TINY, "ldm").items()} | others
    return plain({name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()})


def empty(count: int, name: str = "{}") -> dict:
    """So many entries of tensors without elements."""
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    return {name.format(number): entry for number in range(count)}


def bz2_bomb() -> bytes:
    """8 MiB in some hundred bytes, where 1,024 belong."""
    return bz2.compress(bytes(8 * MEBIBYTE))


def quantized(**fields: object) -> bytes:
    """The sound container, fields of its weight changed."""
    return changed(lambda header, facts: facts["quantized"]["a.weight"].update(fields))


def facts(**fields: object) -> bytes:
    """The sound container, fields of its facts changed."""
    return changed(lambda header, facts: facts.update(fields))


FILES: dict[str, Callable[[], bytes]] = {
    **{f"name {name}": lambda key=key: named(key) for name, key in NAMES.items()},
    **{f"said {name}": lambda text=text: everywhere(text) for name, text in NAMES.items()},
    "name of the metadata": lambda: named(METADATA_KEY),
    "name of another tensor": lambda: changed(
        lambda header, facts: (
            header.pop("a.bias"),
            facts.update(kept={"nfq.a.weight": facts["quantized"]["a.weight"]["crc32"]}),
        ),
    ),
    "names that look alike": lambda: plain(empty(1, "e\u0301") | empty(1, "\xe9") | empty(1, "\u0435")),
    "a shape of 100,000 sizes": lambda: quantized(shape=[1 << 62] * 100_000),
    "a shape of 100,000 ones": lambda: quantized(shape=[1] * 100_000),
    "a product that zero hides": lambda: quantized(shape=[1 << 62, 1 << 62, 0]),
    "a plain shape of 100,000 sizes": lambda: plain(
        {"a": {"dtype": "F16", "shape": [1 << 62] * 100_000, "data_offsets": [0, 0]}}
    ),
    "no elements in 2**124": lambda: plain(
        {"a": {"dtype": "F16", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}
    ),
    "settings nested 200 deep": lambda: with_text('"settings": {', '"settings": {"a":' + "[" * 200 + "]" * 200 + ","),
    "settings nested 990 deep": lambda: with_text('"settings": {', '"settings": {"a":' + "[" * 990 + "]" * 990 + ","),
    "settings without end": lambda: with_text('"settings": {', '"settings": {"a":' + "[" * 100_000),
    "a number of 4,000 digits": lambda: with_text('"settings": {', '"settings": {"a":' + "9" * 4000 + ","),
    "a number of 100,000 digits": lambda: with_text('"settings": {', '"settings": {"a":' + "9" * 100_000 + ","),
    "a sensitivity beyond floats": lambda: quantized(sensitivity=10**400),
    "a sensitivity that is text": lambda: quantized(sensitivity="nan"),
    "settings that are pairs": lambda: facts(settings=[["a", 1]]),
    "a writer that is a list": lambda: facts(writer=[[[]]]),
    "100,000 lists": lambda: changed(lambda header, facts: facts.update(x=[[]] * 100_000)),
    "100,000 objects": lambda: changed(lambda header, facts: facts.update(x=[{}] * 100_000)),
    "a header that is all lists": lambda: plain('{"a":[' + "[]," * 100_000 + "[]]}"),
    "a version of 64 bits": lambda: facts(container_version=(1 << 64) - 1),
    "two versions": lambda: with_text('"container_version": 1', '"container_version": 1, "container_version": 2'),
    "a bomb in one frame": lambda: with_frames("nf16_b64", [16, 64], [compressed(bytes(128 * MEBIBYTE))] * 3),
    "64 GiB of frames": huge_weight,
    "5,000 tensors": lambda: plain(empty(5_000)),
    "100,000 texts of metadata": lambda: plain(
        {METADATA_KEY: {str(number): "a" for number in range(100_000)}} | empty(1)
    ),
    "a header of 100 MB announced": lambda: struct.pack("<Q", 100_000_000) + b"{",
    "a header of 2**63 announced": lambda: struct.pack("<Q", 1 << 63) + b"{}",
    "metadata of a container in the source": lambda: changed(
        lambda header, facts: facts["source"].update(metadata={FACTS_KEY: "{}", "__metadata__": "x"})
    ),
    "a UNet of empty weights": lambda: unet({}),
    "a UNet twice": lambda: unet({CHECKPOINT_PREFIX + "input_blocks.0.0.weight": (0, 0, 0, 0)}),
    "a UNet with a block too many": lambda: unet(
        {f"input_blocks.{number}.0.op.weight": (0,) for number in range(2000)}
    ),
    "10,000 text encoders": lambda: plain(text_encoders(10_000)),
    "10,000 families of blocks": lambda: plain(families_of_blocks(10_000)),
    "an empty file": lambda: b"",
    "zeros": lambda: bytes(MEBIBYTE),
    "a pickle": lambda: b"PK\x03\x04" + b"\x80\x02cos\nsystem\nS'touch /tmp/nfq-attack'\n\x85R.",
    "a calibration of huge numbers": lambda: calibration(importance=torch.full((64,), 3e38)),
    "a calibration of correlations beyond 1": lambda: calibration(
        importance=torch.full((64,), 3e38), correlation=torch.full((64, 64), 6e4).half()
    ),
    "a calibration of no correlation": lambda: calibration(correlation=-torch.ones(64, 64).half()),
    "a calibration of tiny numbers": lambda: calibration(importance=torch.full((64,), 1e-45)),
    "a calibration nested 990 deep": lambda: calibration(
        lambda header, facts: facts.update(x=json.loads("[" * 900 + "]" * 900))
    ),
    "a calibration of 100,000 rows": lambda: calibration(lambda header, facts: facts.update(rows=[1] * 100_000)),
    "a calibration that says": lambda: calibration(lambda header, facts: facts.update(architecture=TERMINAL)),
    "an article's bomb": lambda: article(M=bz2_bomb()),
    "an article's weight of 2**31": lambda: article(
        orig_shape=struct.pack("<2q", 1 << 25, 63), param=struct.pack("<5i", 63 << 25, 16, 50, 64, 16384)
    ),
    "an article's shape that wraps": lambda: article(
        orig_shape=struct.pack("<2q", 1 << 62, 4), param=struct.pack("<5i", 0, 16, 50, 64, 16384)
    ),
    "an article's NaN": lambda: article(c2=struct.pack("<f", float("nan"))),
    "an article's scale beyond floats": lambda: article(c2=struct.pack("<f", 3.4e38)),
}
"""Every attack by what it is, and what makes its bytes."""


def _sparse_header(path: Path) -> None:
    """A header of 99 MB that takes no room on the disk: a brace, then zeros."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b"{")
        file.truncate(99_000_008)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


OBJECTS: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a header of 99 MB that is not there": _sparse_header,
    "a link to itself": _loop,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a pipe": lambda path: os.mkfifo(path),
}
"""What can stand under a file's name and is none."""


def make_all(folder: Path) -> dict[str, Path]:
    """Write every attack; returns them by what they are."""
    made = {}
    for number, (attack, make) in enumerate(FILES.items()):
        made[attack] = folder / f"{number}.nfq.safetensors"
        made[attack].write_bytes(make())
    for number, (attack, place) in enumerate(OBJECTS.items(), len(FILES)):
        made[attack] = folder / f"{number}.nfq.safetensors"
        place(made[attack])
    return made
