"""The ComfyUI nodes: a thin layer over nfq_core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host, routes
from .definitions import NODES


class NFQExtension(ComfyExtension):
    """The extension through which ComfyUI gets the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return all node classes."""
        return NODES


async def comfy_entrypoint() -> NFQExtension:
    """ComfyUI's entry point; it registers folder and route itself because ComfyUI before 0.22 never calls `on_load`."""
    host.register_folders()
    routes.register()
    return NFQExtension()
