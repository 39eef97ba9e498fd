"""What the page asks: read-only, and only about files that the loaders list."""

from __future__ import annotations

import asyncio

from aiohttp import web
from server import PromptServer

from ..nfq_core import NFQError
from .host import CHECKPOINTS, UNETS
from .recipe import recipe

RECIPE = "/nfq/recipe"


async def _recipe(request: web.Request) -> web.Response:
    folder, name = request.query.get("folder", ""), request.query.get("name", "")
    if folder not in (UNETS, CHECKPOINTS):
        return web.json_response({"error": f"folder must be {UNETS} or {CHECKPOINTS}"}, status=400)
    try:
        return web.json_response(await asyncio.to_thread(recipe, folder, name))
    except NFQError as error:
        return web.json_response({"error": str(error)}, status=404)


def register() -> None:
    """Add `GET /nfq/recipe?folder=…&name=…` to the host's server, where there is one that has none yet."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and not any(getattr(route, "path", "") == RECIPE for route in server.routes):
        server.routes.get(RECIPE)(_recipe)
