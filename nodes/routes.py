"""The route that the page asks about files: read-only, and only for files that the loaders list."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from server import PromptServer

from ..nfq_core import NFQError, NFQFile
from .host import FOLDERS, file_path
from .recipe import file_recipe
from .report import file_summary

FILE = "/nfq/file"


async def _file(request: web.Request) -> web.Response:
    status, body = await asyncio.to_thread(_about, request.query.get("folder", ""), request.query.get("name", ""))
    return web.json_response(body, status=status)


def _about(folder: str, name: str) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for one file: its recipe for the workflow and its facts for the reader, or an error."""
    if folder not in FOLDERS:
        return 400, {"error": f"folder must be one of {', '.join(FOLDERS)}"}
    try:
        path = file_path(folder, name)
    except NFQError as error:
        return 404, {"error": str(error)}
    try:
        with NFQFile(path) as file:
            return 200, {"recipe": file_recipe(file), "facts": file_summary(file, name)}
    except NFQError as error:
        # Keep the path on this machine out of the answer.
        return 422, {"error": str(error).replace(path, name)}


def register() -> None:
    """Add `GET /nfq/file?folder=…&name=…` to the host's server, once."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and not any(getattr(route, "path", "") == FILE for route in server.routes):
        server.routes.get(FILE)(_file)
