"""Helpers of the commands: showing results and progress, and the type of a command's declaration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import ANY, OVERWRITE, printable
from ..parallel import Progress

Run = Callable[[argparse.Namespace], int]
"""Runs a command; returns its exit code."""

BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left{postfix}"
"""What a progress bar shows; times in minutes and seconds."""

IN_OPTIONS = {OVERWRITE: "--force", ANY: "--any"}
"""Options that mean what messages of Python code name."""

AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]
"""Declares a command by name, function and a line of help; returns its parser, which has `--json` already."""


def show(options: argparse.Namespace, result: Any, text: str, *, document: bool = False) -> int:
    """Print `text`, or with `--json` the result as JSON; returns 0.

    Args:
        options: the command's options.
        result: JSON-ready result.
        text: the result as text.
        document: whether the text is a file's contents, which is written as UTF-8 unless it goes to a terminal.
    """
    output = json.dumps(result, indent=2) if options.json else text
    if document and isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")
    if output:
        # Some terminals and some file names are not Unicode.
        encoding = sys.stdout.encoding or "utf-8"
        print(output.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return 0


def in_options(message: str, options: Mapping[str, str] = IN_OPTIONS) -> str:
    """A message of Python code with the command's options for that code's arguments."""
    for argument, option in options.items():
        message = message.replace(argument, option)
    return message


@contextmanager
def progress_bar(title: str, options: argparse.Namespace, passes: int = 1) -> Iterator[Progress]:
    """A progress callback that draws a bar on a terminal; without one, or with `--json`, it draws nothing.

    Args:
        title: what the command does.
        options: the command's options.
        passes: how often the work may start again at most; the title then counts the passes.
    """
    hidden = True if options.json else None
    bar = tqdm(desc=title, bar_format=BAR, disable=hidden, leave=False)
    with logging_redirect_tqdm(), bar:
        number = 1

        def report(done: int, total: int, name: str) -> None:
            nonlocal number
            if done < bar.n and passes > 1:
                number += 1
                bar.reset()
                bar.set_description_str(f"{title}, pass {number} of at most {passes}")
            bar.total = total
            bar.set_postfix_str(printable(name[-40:]), refresh=False)
            bar.update(done - bar.n)

        yield report
