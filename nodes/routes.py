"""The routes that the page asks about files: read-only, and only for files that the loaders list."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from server import PromptServer

from ..nfq_core import NFQError, NFQFile, Settings
from ..nfq_core.checkpoints.dry_run import forecast_seconds
from .bake import quantizing_device
from .host import FOLDERS, file_path, original_path
from .recipe import file_recipe
from .report import file_summary

Answer = tuple[int, dict[str, Any]]
"""HTTP status and body."""


def _about_file(path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """One of our files: its recipe for the workflow and its facts for the reader."""
    with NFQFile(path) as file:
        return {"recipe": file_recipe(file), "facts": file_summary(file, query["name"])}


def _about_time(path: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The expected seconds to quantise an original with the form's settings; None on a GPU, whose speed is unknown."""
    try:
        levels = int(query["levels"]), int(query["conv_levels"])
        settings = Settings.from_form(query["preset"], *levels, query["effort"], text_encoders="keep")
    except (KeyError, ValueError) as error:
        raise NFQError(f"not a setting: {error}") from None
    if quantizing_device(query.get("device", "auto")).type != "cpu":
        return {"seconds": None}
    return {"seconds": forecast_seconds(path, settings, query.get("calibrated") == "true")}


ROUTES = {"/nfq/file": (file_path, _about_file), "/nfq/time": (original_path, _about_time)}
"""By route: what finds the file, and what answers."""


def _answer(
    find: Callable[[str, str], str], about: Callable[[str, Mapping[str, str]], dict[str, Any]], query: Mapping[str, str]
) -> Answer:
    """The answer about the file `name` in `folder`, or an error."""
    folder, name = query.get("folder", ""), query.get("name", "")
    if folder not in FOLDERS:
        return 400, {"error": f"folder must be one of {', '.join(FOLDERS)}"}
    try:
        path = find(folder, name)
    except NFQError as error:
        return 404, {"error": str(error)}
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


def _handler(*functions: Any) -> Callable[[web.Request], Any]:
    async def handle(request: web.Request) -> web.Response:
        status, body = await asyncio.to_thread(_answer, *functions, request.query)
        return web.json_response(body, status=status)

    return handle
