"""What the page asks: read-only, and only about files that the loaders list."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from server import PromptServer

from ..nfq_core import NFQError, NFQFile
from .host import CHECKPOINTS, UNETS, file_path
from .recipe import recipe
from .report import file_summary

FILE = "/nfq/file"


async def _file(request: web.Request) -> web.Response:
    status, told = await asyncio.to_thread(_about, request.query.get("folder", ""), request.query.get("name", ""))
    return web.json_response(told, status=status)


def _about(folder: str, name: str) -> tuple[int, dict[str, Any]]:
    """An HTTP status, and what the page is told of a file: its recipe for the workflow, and facts for the reader."""
    if folder not in (UNETS, CHECKPOINTS):
        return 400, {"error": f"folder must be {UNETS} or {CHECKPOINTS}"}
    try:
        path = file_path(folder, name)
    except NFQError as error:
        return 404, {"error": str(error)}
    try:
        with NFQFile(path) as file:
            return 200, {"recipe": recipe(file), "facts": file_summary(file, name)}
    except NFQError as error:
        # The page need not know where on this machine the file lies.
        return 422, {"error": str(error).replace(path, name)}


def register() -> None:
    """Add `GET /nfq/file?folder=…&name=…` to the host's server, where there is one that has none yet."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and not any(getattr(route, "path", "") == FILE for route in server.routes):
        server.routes.get(FILE)(_file)
