"""The ComfyUI nodes: thin layers over nfq_core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import routes
from .definitions import NODES


class NFQExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def on_load(self) -> None:
        """Register the page's routes."""
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return NODES


async def comfy_entrypoint() -> NFQExtension:
    """The host's way in."""
    return NFQExtension()
