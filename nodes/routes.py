"""The routes that the page asks about files: read-only, and only for files that the loaders list."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from aiohttp import web
from server import PromptServer

from ..nfq_core import NFQError, NFQFile, Settings
from ..nfq_core.checkpoints.dry_run import forecast_seconds
from ..nfq_core.checkpoints.memory import is_out_of_memory
from ..nfq_core.errors import program
from .bake import DEVICES, quantizing_device
from .host import FOLDERS, file_path, original_path
from .recipe import file_recipe
from .report import file_summary

Answer = tuple[int, dict[str, Any]]
"""HTTP status and body."""

Find = Callable[[str, str], str]
"""The path of a listed file, by folder and name."""

About = Callable[[str, Mapping[str, str]], dict[str, Any]]
"""What the page wants to know of a file, by its path and the query."""


def _about_file(path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """One of our files: its recipe for the workflow and its facts for the reader."""
    with NFQFile(path) as file:
        return {"recipe": file_recipe(file), "facts": file_summary(file, query["name"])}


def _about_time(path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The expected seconds to quantise an original with the form's settings; None on a GPU, whose speed is unknown."""
    try:
        levels = int(query["levels"]), int(query["conv_levels"])
        settings = Settings.from_form(query["preset"], *levels, query["effort"], text_encoders="keep")
        device = DEVICES[DEVICES.index(query["device"])]
    except (KeyError, ValueError) as error:
        raise NFQError(f"not a setting: {error}") from None
    try:
        on_cpu = quantizing_device(device)[0].type == "cpu"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        on_cpu = False
    facts = os.stat(path)
    file = path, facts.st_mtime_ns, facts.st_size
    return {"seconds": _expected_seconds(*file, settings, query.get("calibrated") == "true") if on_cpu else None}


@lru_cache(64)
def _expected_seconds(path: str, mtime_ns: int, size: int, settings: Settings, calibrated: bool) -> float | None:
    """See `forecast_seconds`. The page asks again at each change; time and size of the file are part of the key."""
    return forecast_seconds(path, settings, calibrated)


ROUTES = {"/nfq/file": (file_path, _about_file), "/nfq/time": (original_path, _about_time)}
"""By route: what finds the file, and what answers."""


def _answer(find: Find, about: About, query: Mapping[str, str]) -> Answer:
    """The answer about the file `name` in `folder`, or an error."""
    folder, name = query.get("folder", ""), query.get("name", "")
    if folder not in FOLDERS:
        return 400, {"error": f"folder must be one of {', '.join(FOLDERS)}"}
    try:
        # As errors spell it.
        path = os.path.normpath(find(folder, name))
    except NFQError as error:
        # To make a missing file again, the user needs this machine's Python.
        return 404, {"error": str(error), **({"program": program()} if about is _about_file else {})}
    try:
        return 200, about(path, {**query, "name": name})
    except NFQError as error:
        # Keep the path on this machine out of the answer.
        return 422, {"error": str(error).replace(path, name)}


def register() -> None:
    """Add `GET /nfq/file?folder=…&name=…` and `GET /nfq/time?…` to the host's server, once."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    known = {getattr(route, "path", "") for route in server.routes}
    for path, functions in ROUTES.items():
        if path not in known:
            server.routes.get(path)(_handler(*functions))


def _handler(find: Find, about: About) -> Callable[[web.Request], Any]:
    async def handle(request: web.Request) -> web.Response:
        status, body = await asyncio.to_thread(_answer, find, about, request.query)
        return web.json_response(body, status=status)

    return handle
