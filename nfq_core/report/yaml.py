"""The little YAML that a model card begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def quoted(text: str) -> str:
    """A double-quoted scalar that every YAML reader takes for exactly this text.

    YAML 1.2, section 7.3.1: what is not printable is escaped, and so are line separators, which old readers fold.
    """
    return '"' + "".join(map(_letter, text)) + '"'


def _letter(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def front_matter(fields: Mapping[str, str | Sequence[str]], comments: Mapping[str, str]) -> str:
    """Texts and lists of texts between two lines of dashes.

    Args:
        fields: values by name; names are plain words.
        comments: what stands behind a field's line, by its name.
    """
    lines = ["---"]
    for name, value in fields.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        if isinstance(value, str):
            lines.append(f"{name}: {quoted(value)}{comment}")
        else:
            lines += [f"{name}:{comment}", *(f"  - {quoted(item)}" for item in value)]
    return "\n".join([*lines, "---"])
