"""Standing in for functions of the program, so that it can be undone; and telling its page what went wrong."""

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
    """Put `make(previous)` in place of a module's function until the program reloads its extensions."""
    previous = getattr(module, name)
    patches.patch(__name__, module, name, make(previous))
    script_callbacks.on_script_unloaded(lambda: patches.undo(__name__, module, name))


def argument(position: int, name: str, arguments: tuple, named: dict[str, Any]) -> Any:
    """An optional argument of a wrapped function, however it was given; None where it was not."""
    return arguments[position] if len(arguments) > position else named.get(name)


def tell(message: str) -> None:
    """Show one sentence in the page, where a request from the page is being served, and in the log."""
    log.error("%s", message)
    gradio.Warning(message)


@contextmanager
def model_change(loading: NFQLoading) -> Iterator[None]:
    """Around the program's change of its model: an error of ours is told, and nothing that was read ahead stays."""
    try:
        yield
    except NFQError as error:
        tell(str(error))
        raise
    finally:
        loading.forget()
