"""The command's parser: like argparse's, with errors of one line, which suggest commands and options that exist."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import command, printable


class Parser(argparse.ArgumentParser):
    """A parser that suggests what a mistyped command or option may have meant.

    Its subparsers must set the default `parser` to themselves.
    """

    commands: dict[str, argparse.ArgumentParser] = {}  # noqa: RUF012
    """Subparsers by command."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse arguments, by default those of the process.

        Raises:
            SystemExit: an argument is not understood; code 2, with one line on stderr.
        """
        args = sys.argv[1:] if args is None else list(args)
        name = next((argument for argument in args if not argument.startswith("-")), None)
        if self.commands and name is not None and name not in self.commands:
            self.error(_no_command(name, self.commands))
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(options, "parser", self)
            parser.error(_not_understood(unknown[0], parser))
        return options

    def error(self, message: str) -> NoReturn:
        """End the process with code 2 and one line; the usage of a command with many options would hide it."""
        name = self.prog.partition(" ")[2]
        self.exit(2, f"nfq: {printable(' '.join(message.split()))} (help: {command(f'{name} --help'.strip())})\n")


def _no_command(name: str, known: Iterable[str]) -> str:
    if os.path.exists(name) or name.endswith(".safetensors"):
        return f"{printable(name)} is no command; to convert a model, write {command(f'quantize {printable(name)}')}"
    advice = _suggestion(name, known) or f"commands: {', '.join(known)}"
    return f"there is no command {printable(name)!r}; {advice}"


def _not_understood(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"too many arguments: {printable(argument)!r} is not expected; put quotes around names with spaces"
    name = argument.partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    longer = [option for option in options if len(name) > 4 and name.lstrip("-") in option]
    advice = _suggestion(name, options, longer)
    return f"there is no option {printable(name)}{advice and f'; {advice}'}"


def _suggestion(name: str, known: Iterable[str], first: Sequence[str] = ()) -> str:
    """A question that names up to two of `known` that are most like `name`; empty if none is.

    Args:
        name: what was typed.
        known: what exists.
        first: those of `known` to name before the others.
    """
    likely = list(dict.fromkeys([*first, *get_close_matches(name, known, n=2)]))[:2]
    return f"did you mean {' or '.join(likely)}?" if likely else ""
