"""Replacing functions of the program, with a way to undo it, and showing errors in its page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gradio
from modules import patches, script_callbacks

from ..nfq_core import NFQError
from .loading import NFQLoading

log = logging.getLogger("nfq")


def wrap(module: ModuleType, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a module's function by `make(previous)` until the program reloads its extensions."""
    previous = getattr(module, name)
    patches.patch(__name__, module, name, make(previous))
    script_callbacks.on_script_unloaded(lambda: patches.undo(__name__, module, name))


def argument(position: int, name: str, arguments: tuple, named: dict[str, Any]) -> Any:
    """An optional argument of a wrapped function, given by position or by name; None if it was not given."""
    return arguments[position] if len(arguments) > position else named.get(name)


def show_error(message: str) -> None:
    """Log one sentence, and show it in the page if a request from the page is being served."""
    log.error("%s", message)
    gradio.Warning(message)


@contextmanager
def model_change(loading: NFQLoading) -> Iterator[None]:
    """Context of a change of the program's model: shows our errors and frees what was read ahead."""
    try:
        yield
    except NFQError as error:
        show_error(str(error))
        raise
    finally:
        loading.forget()
