"""Recognise files that are not safetensors by their first bytes, and say what to do about them."""

from __future__ import annotations

import re
from pathlib import PurePath

from ..errors import command

HEAD_BYTES = 4096
"""Bytes at the start of a file that are needed to recognise it."""

_DOWNLOAD = "download or copy the model again"

PICKLE = (
    "a PyTorch pickle, which can run code when it is opened and is refused for safety; convert it first: load it in "
    "ComfyUI and save it with Save Checkpoint, or with diffusers' save_pretrained"
)
_GGUF = "a GGUF file, which is quantised already; take the original model in safetensors"
_ARCHIVE = "; unpack it and name the .safetensors file in it"

BY_ENDING = {**dict.fromkeys((".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"), PICKLE), ".gguf": _GGUF}
"""Model files of other kinds, by file name ending."""

_ZIP = b"PK\x03\x04"

_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer: the model itself was not downloaded; run `git lfs pull`"),
    (b"GGUF", _GGUF),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive{_ARCHIVE}"),
    (b"Rar!\x1a\x07", f"a RAR archive{_ARCHIVE}"),
    (b"\x1f\x8b", f"a gzip archive{_ARCHIVE}"),
    (b"\xfd7zXZ\x00", f"an xz archive{_ARCHIVE}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive{_ARCHIVE}"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture; name the model's .safetensors file"),
    (b"\xff\xd8\xff", "a JPEG picture; name the model's .safetensors file"),
)
"""First bytes of a file, and what it is."""

_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|\?xml)\b", re.IGNORECASE | re.DOTALL)

_PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
"""First bytes of every pickle since protocol 2: an opcode and the protocol."""

_INDEX_NAME = re.compile(r"\.index(\.[^.]+)?\.json$")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def describe_foreign_file(head: bytes, name: str, file_bytes: int) -> str:
    """Describe a file that is not safetensors, and what to do about it.

    Args:
        head: its first HEAD_BYTES bytes.
        name: its name.
        file_bytes: its size.

    Returns:
        Text to follow "it is"; empty if the file is not recognised.
    """
    if not file_bytes:
        return f"empty; {_DOWNLOAD}"
    if not any(head):
        return f"zeros where its header should be, as after an unfinished download; {_DOWNLOAD}"
    text = head.removeprefix(_BYTE_ORDER_MARK)
    description = next((words for magic, words in _MAGIC if text.startswith(magic)), "")
    if description:
        return description
    if _HTML.match(text):
        return f"a web page, such as one that asks to log in; {_DOWNLOAD}, by its direct link"
    if text.lstrip()[:1] in (b"{", b"["):
        return _json(text, name)
    if head.startswith(_ZIP):
        return PICKLE if _holds_pickle(head, name) else f"a zip archive{_ARCHIVE}"
    if _PICKLE_START.match(head):
        return PICKLE
    if file_bytes < 8:
        return f"{file_bytes} bytes long; {_DOWNLOAD}"
    return BY_ENDING.get(PurePath(name).suffix.lower(), "")


def _holds_pickle(head: bytes, name: str) -> bool:
    """Whether a zip file is PyTorch's: its first entry is the pickle or one of the small files next to it."""
    return b"/data.pkl" in head or b"/byteorder" in head or PurePath(name).suffix.lower() in BY_ENDING


def _json(text: bytes, name: str) -> str:
    if _INDEX_NAME.search(name.lower()) or b'"weight_map"' in text:
        return (
            f"the index of a sharded model, which {command('quantize')}, `compare` and `report` take as the original; "
            "name a single .safetensors file here"
        )
    return "JSON, such as settings or a server's error; name the model's .safetensors file, or download it again"
