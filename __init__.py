"""ComfyUI-NFQ: the entry point for ComfyUI."""

import sys
from importlib.util import find_spec

MINIMUM_HOST = (0, 8, 0)


def _refusal() -> str:
    """Why this ComfyUI cannot run the plugin and what to do, in one line; empty if it can."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "older"
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers < MINIMUM_HOST:
        needed = ".".join(map(str, MINIMUM_HOST))
        return f"ComfyUI-NFQ needs ComfyUI {needed} or newer, this is {version}: update ComfyUI"
    for module, package in (("comfy_kitchen", "comfy-kitchen"), ("zstandard", "zstandard")):
        if find_spec(module) is None:
            # As `nfq_core.errors.pip_command`, which cannot be imported without these packages.
            python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
            return f"ComfyUI-NFQ needs {package}, run: {python} -m pip install {package}"
    return ""


_reason = _refusal()
if _reason:
    raise ImportError(_reason)

from .nodes import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
