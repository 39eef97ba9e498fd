"""Standing in for functions of the program: checked first, undone when it reloads extensions; errors in its page."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import gradio
import torch
from modules import patches, script_callbacks

from ..nfq_core import NFQError
from ..nfq_core.files.safetensors_io import aligned_entries, header_bytes, tensor_bytes
from .loading import NFQLoading

log = logging.getLogger("nfq")

limits: list[str] = []
"""What the extension cannot do in this program, one sentence each; the NFQ tab shows them."""


@dataclass(frozen=True)
class StandIn:
    """A function of the program that ours replaces.

    Args:
        module: where the program looks the function up.
        name: its name there.
        make: ours, given the program's.
        parameters: the parameters that ours can take, in their order; the program's function has them or fewer.
        fault: what is wrong with what the program's function does or returns; empty if nothing is.
    """

    module: ModuleType
    name: str
    make: Callable[[Callable], Callable]
    parameters: Sequence[str] = ()
    fault: Callable[[Callable], str] = lambda _: ""

    def obstacle(self) -> str:
        """Why ours cannot replace the program's function; empty if it can."""
        function = getattr(self.module, self.name, None)
        if not callable(function):
            return f"{self.module.__name__} has no {self.name}"
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        taken = [name for name, found in inspect.signature(function).parameters.items() if found.kind not in kinds]
        known = taken == [name for name in self.parameters if name in taken]
        reason = self.fault(function) if known else f"takes ({', '.join(taken)}), not ({', '.join(self.parameters)})"
        return f"{self.module.__name__}.{self.name} {reason}" if reason else ""

    def put(self) -> None:
        """Replace the program's function until it reloads its extensions."""
        patches.patch(__name__, self.module, self.name, self.make(getattr(self.module, self.name)))
        script_callbacks.on_script_unloaded(lambda: patches.undo(__name__, self.module, self.name))


def stand_in(functions: Sequence[StandIn], otherwise: str) -> bool:
    """Replace all of these functions, or none if the program has changed one of them.

    Args:
        functions: what is replaced together.
        otherwise: what the extension then cannot do, as a sentence.

    Returns:
        Whether they are replaced.
    """
    obstacle = next(filter(None, (function.obstacle() for function in functions)), "")
    if obstacle:
        report_limit(otherwise, obstacle)
        return False
    for function in functions:
        function.put()
    return True


def report_limit(sentence: str, reason: str) -> None:
    """Log what the extension cannot do in this program, and keep it for the NFQ tab."""
    limits.append(f"{sentence}: this program has changed ({reason}); update the extension")
    log.error("%s", limits[-1])


def reader_fault(read: Callable, **named: Any) -> str:
    """What is wrong with what a reader of model files returns for a small file; empty if nothing is.

    Args:
        read: takes a path and returns a dictionary of tensors; if it takes `return_metadata`, then on demand the pair
            of them and of a dictionary of texts.
        named: arguments for every call.
    """
    weight, facts = torch.arange(4, dtype=torch.float16), {"format": "pt"}
    entries = aligned_entries({"weight": ("F16", (4,))})
    # The program may still map the file, which Windows does not let go.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "nfq.safetensors")
        with open(path, "wb") as file:
            file.write(header_bytes(entries, facts) + bytes(tensor_bytes(weight)))
        try:
            found = [read(path, **named)]
            if "return_metadata" in inspect.signature(read).parameters:
                tensors, metadata = read(path, return_metadata=True, **named)
                found.append(tensors)
                if metadata != facts:
                    return "returns no metadata beside the tensors"
        except Exception as error:
            return f"fails for a small file ({type(error).__name__}: {error})".replace("\n", " ")
        for tensors in found:
            read_back = tensors.get("weight") if isinstance(tensors, dict) else None
            if not isinstance(read_back, torch.Tensor) or not torch.equal(read_back.cpu(), weight):
                return "returns no dictionary of a file's tensors"
    return ""


def argument(position: int, name: str, arguments: tuple, named: dict[str, Any]) -> Any:
    """An optional argument of a function, given by position or by name; None if it was not given."""
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
