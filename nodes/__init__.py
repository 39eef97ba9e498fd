"""The ComfyUI nodes: thin layers over nfq_core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host, routes
from .definitions import NODES


class NFQExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return NODES


async def comfy_entrypoint() -> NFQExtension:
    """The host's way in; folder and routes are added here, since hosts before 0.22 never call `on_load`."""
    host.register_calibrations()
    routes.register()
    return NFQExtension()
